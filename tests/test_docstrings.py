"""One dialect: Google style, whose items begin in lower case unless they begin with a name."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")
NAMED = re.compile(r"[\w.`*, ]+?: (\S+)")
# Words of one capital letter and small ones that are names all the same.
NAMES = {"Hugging", "Triton", "Python", "True", "False", "None"}


def items(docstring: str) -> Iterator[tuple[str, str]]:
    """Section and first word of every item."""
    section, first = "", False
    for line in docstring.split("\n"):
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section, first = line[:-1], True
            continue
        if line and not line.startswith(" "):
            section = ""
        item = line[4:] if line.startswith("    ") and not line.startswith("     ") else ""
        found = (
            NAMED.match(item) if section in SECTIONS[:3] else re.match(r"(\S+)", item) if section and first else None
        )
        if found:
            yield section, found[1]
        first = False


def begins_like_a_sentence(word: str) -> bool:
    return word[0].isupper() and not re.search("[A-Z]", word[1:]) and word.rstrip(".,:;") not in NAMES


@pytest.mark.parametrize(
    "docstring", ["Args:\n    model: The model.", "Returns:\n    The model.", "Raises:\n    E: No."]
)
def test_a_sentence_is_seen(docstring: str) -> None:
    assert [word for _, word in items(f"Do.\n\n{docstring}") if begins_like_a_sentence(word)]


def test_items_begin_in_lower_case(repository: Path) -> None:
    files = [path for path in repository.rglob("*.py") if not path.relative_to(repository).parts[0].startswith(".")]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for section, word in items(ast.get_docstring(node) or ""):
                if begins_like_a_sentence(word):
                    found.append(f"{path.relative_to(repository)}: {getattr(node, 'name', '')}, {section}: {word}")
    assert len(files) > 200
    assert found == []
