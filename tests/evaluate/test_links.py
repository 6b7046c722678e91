"""A model's folder from elsewhere may hold links; nothing is written through them, and nothing read from outside."""

import json
from pathlib import Path

import pytest

from attnconv.errors import DataError, OutputError
from attnconv.evaluate.engine.journal import Journal
from attnconv.evaluate.engine.results import results_folder, write_results
from attnconv.evaluate.engine.schema import EvaluationFile, MeasuredModel
from attnconv.evaluate.report.gathering import gather
from attnconv.evaluate.report.writing import write_page
from attnconv.files.json_files import write_json
from attnconv.files.whole_files import write_atomically


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user's, outside of any model."""
    path = tmp_path / "home" / "precious"
    path.parent.mkdir()
    path.write_text("precious")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted model's folder, as far as a folder must look like one."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "receipt.json").write_text(json.dumps({"tool": "attnconv"}))
    return folder


def test_the_names_of_unfinished_files_cannot_be_foreseen(folder: Path, victim: Path) -> None:
    (folder / "results").mkdir()
    for name in (".eval.json.tmp", "eval.json"):
        (folder / "results" / name).symlink_to(victim)
    path = write_results(results_folder(folder), EvaluationFile(model=MeasuredModel(), tasks={}))
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    assert json.loads(path.read_text())["kind"] == "eval"
    assert path.stat().st_mode == victim.stat().st_mode


def test_results_that_are_a_link_are_not_written_to(folder: Path, victim: Path) -> None:
    (folder / "results").symlink_to(victim.parent)
    with pytest.raises(OutputError, match=r"results is a link to .*home"):
        results_folder(folder)
    with pytest.raises(OutputError, match=r"results is a link to .*home"):
        gather(folder)


def test_pictures_do_not_leave_the_folder(folder: Path, victim: Path) -> None:
    (folder / "images").symlink_to(victim.parent)
    with pytest.raises(OutputError, match="is a link"):
        write_page(folder / "a.html", "", folder / "a.md", "", {"images/precious": b"picture"})
    assert victim.read_text() == "precious"


def test_a_journal_that_is_a_link_is_neither_read_nor_written(folder: Path, victim: Path) -> None:
    (folder / "journal").symlink_to(victim)
    with pytest.raises(OutputError, match="is a link"), Journal(folder / "journal") as journal:
        journal.add("key", 1)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["recipe.yaml", "README.md", "metrics.jsonl", "results/eval.json"])
def test_a_report_does_not_tell_what_lies_elsewhere(folder: Path, victim: Path, name: str) -> None:
    (folder / "results").mkdir()
    (folder / name).symlink_to(victim)
    with pytest.raises(DataError, match="outside the folder"):
        gather(folder)


def test_json_and_other_files_replace_links(folder: Path, victim: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(victim)
    write_json(folder / "config.json", {"a": 1})
    (folder / "page").symlink_to(victim)
    write_atomically(folder / "page", b"text")
    assert victim.read_text() == "precious"
    assert (folder / "page").read_bytes() == b"text"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "page", "receipt.json"]
