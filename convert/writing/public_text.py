"""What a push publishes of files that this package wrote: paths of this machine are cut down to their last name."""

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ...files.own_files import CARD_FILE, METRICS_FILE, RECEIPT_FILE, RECIPE_FILE

OURS = (RECIPE_FILE, RECEIPT_FILE, CARD_FILE, METRICS_FILE, "results/*", "adapter/*.json", "adapter/*.md")
TEXT = (".yaml", ".json", ".jsonl", ".md", ".html")
# A whole value, and a path inside of a longer text, which begins where a word may begin.
WHOLE = re.compile(r"(?:[/~]|[A-Za-z]:[\\/])[^\n]*[\\/][^\n]*")
INSIDE = re.compile(
    r"(?<![\w/:.<~&;)\]-])(?:~|/(?:home|Users|root|tmp|mnt|media|data|srv|var|opt|work\w*|scratch))/[^\s\"'<>|`,)]*"
)
YAML_VALUE = re.compile(r"(?m)((?::|-)[ ]+['\"]?)((?:[/~]|[A-Za-z]:\\).*[\\/])")


def public_content(folder: Path, name: str) -> bytes | None:
    """A file's content as it is published; None if that is the file as it is.

    Args:
        folder: the folder of a converted model.
        name: the file's POSIX path in it.
    """
    path = folder / name
    if path.suffix not in TEXT or not any(fnmatch(name, pattern) for pattern in OURS):
        return None
    try:
        text = path.read_bytes().decode()
        found = _public(text, path.suffix, _known(folder))
    # What is no text, or no JSON, did not come from this package.
    except (ValueError, RecursionError):
        return None
    return None if found == text else found.encode()


def _known(folder: Path) -> Mapping[str, str]:
    """Paths that any file may repeat: the folder's own, and those that the measurements name."""
    paths = {str(folder)}
    for path in (folder / "results").glob("*.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        for key in ("model", "base"):
            source = (document.get(key) or {}).get("source") if isinstance(document, dict) else None
            if isinstance(source, str) and WHOLE.fullmatch(source):
                paths.add(source)
    return {path: _last(path) for path in sorted(paths, key=len, reverse=True)}


def _public(text: str, suffix: str, known: Mapping[str, str]) -> str:
    if suffix == ".json":
        value = json.loads(text)
        cleaned = _clean(value, known)
        return text if cleaned == value else json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"
    if suffix == ".jsonl":
        return "".join(_public_line(line, known) for line in text.splitlines(keepends=True))
    if suffix == ".yaml":
        text = YAML_VALUE.sub(r"\1", text)
    return _clean_text(text, known)


def _public_line(line: str, known: Mapping[str, str]) -> str:
    value = json.loads(line) if line.strip() else None
    cleaned = _clean(value, known)
    return line if cleaned == value else json.dumps(cleaned, ensure_ascii=False) + "\n"


def _clean(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {_clean(key, known): _clean(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, known) for item in value]
    if not isinstance(value, str):
        return value
    return _last(value) if WHOLE.fullmatch(value) else _clean_text(value, known)


def _clean_text(text: str, known: Mapping[str, str]) -> str:
    for path, name in known.items():
        text = text.replace(path, name)
    return INSIDE.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    """The last name of a path of any system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
