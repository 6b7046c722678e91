"""`attnconv data score`: which rows are kept, how they are written, and what is refused."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from attnconv.convert.planning.importance import write_importance
from attnconv.convert.planning.probe import probe
from attnconv.errors import RecipeError
from attnconv.packaged.model import embedded_model_path
from attnconv.runs.data_scores import Part

Run = Callable[..., Result]
TEXTS = [
    "Once upon a time there was a little girl named Lily. Lily had a red ball. Lily loved the red ball.",
    "",
    "One day Tim saw a big dog. The big dog saw Tim. Tim and the big dog ran and ran.",
    "  ",
    "The sun was hot. Sam sat in the sun. Then Sam saw a cat, and the cat saw Sam.",
    "Mia had a doll. The doll had a hat. Mia put the hat on the doll, and the doll was happy.",
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text, "number": number}) for number, text in enumerate(TEXTS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_that_need_the_heads_most_are_kept_whole(run: Run, teacher: str, rows: Path, tmp_path: Path) -> None:
    heads, everything, some = tmp_path / "heads.json", tmp_path / "all.jsonl", tmp_path / "some.jsonl.gz"
    write_heads(heads, [[0.0, 1.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4, [0.5, 0.0, 0.0, 0.0], [0.0] * 4])
    settings = ["--model", teacher, "--importance", heads, "--top", 2, "--batch-size", 4]
    made = run("data", "score", rows, "-o", everything, "--keep", "100%", *settings)
    assert made.exit_code == 0, made.output
    assert "masked, as layer.head: 0.1, 3.0" in made.output
    assert "4 of 6 documents are kept" in made.output
    kept = read(everything)
    assert [row["number"] for row in kept] == [0, 2, 4, 5]
    assert all(row["text"] == TEXTS[row["number"]] for row in kept)
    made = run("data", "score", rows, "-o", some, "--keep", 2, *settings, "--json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert (found["documents"], found["kept"]) == (6, 2)
    best = sorted(kept, key=lambda row: -row["attention_influence"])[:2]
    assert read(some) == sorted(best, key=lambda row: row["number"])
    assert found["least"] == best[1]["attention_influence"]
    # What was written is what a recipe's data section takes.
    again = run("data", "score", some, "-o", tmp_path / "again.jsonl", "--keep", 1, "--model", teacher, "--tokens", 8)
    assert again.exit_code == 0, again.output
    assert len(read(tmp_path / "again.jsonl")) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["-o", "rows.jsonl"], "is the file that is read"),
        (["-o", "kept.txt"], "end its name in .jsonl or .jsonl.gz"),
        (["--field", "story"], 'no field "story"'),
        (["--keep", "0%"], "--keep takes a share such as 20%"),
        (["--top", "five"], "--top takes a share such as 20%"),
        (["--importance", "other.json"], "other.json is about another model"),
        (["--importance", "missing.json"], "there is no file missing.json"),
    ],
)
def test_what_cannot_be_is_said(
    run: Run, teacher: str, rows: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], words: str
) -> None:
    monkeypatch.chdir(rows.parent)
    write_heads(Path("other.json"), [[1.0, 0.0, 0.0, 0.0]])
    made = run("data", "score", "rows.jsonl", "--model", teacher, "-o", "kept.jsonl", *changes)
    assert made.exit_code == 1
    assert words in " ".join(made.stderr.split())
    assert {path.name for path in rows.parent.iterdir()} == {"rows.jsonl", "other.json"}


def test_parts_are_shares_or_numbers() -> None:
    assert Part.parse(" 12.5 % ", "--keep") == Part(share=0.125)
    assert Part.parse("3", "--keep") == Part(count=3)
    assert [Part(share=0.2).of(number) for number in (1, 10, 100)] == [1, 2, 20]
    assert Part(count=3).of(2) == 2
    for text in ("0", "0%", "101%", "-1", "0.2", ""):
        with pytest.raises(RecipeError, match="--keep takes"):
            Part.parse(text, "--keep")


def write_heads(path: Path, scores: list[list[float]]) -> None:
    """A file of importance of the packaged model, or of one with fewer layers."""
    from transformers import AutoConfig, LlamaForCausalLM

    modules = probe(AutoConfig.from_pretrained(embedded_model_path()), LlamaForCausalLM)[: len(scores)]
    write_importance(path, source="tiny", modules=modules, measures={"retrieval": scores}, measure="retrieval")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().splitlines()]
