"""What a newcomer pastes from the command line works: names of programs, paths from home, flags without a value."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import attnconv
from attnconv.commands.tables import command_line
from attnconv.distill.data import read_rows
from attnconv.evaluate import read_documents
from attnconv.recipes import DataSection, load_recipe

Run = Callable[..., Result]
ELSEWHERE = "/opt/some where/bin/attnconv"


@pytest.mark.parametrize(
    ("program", "on_path", "expected"),
    [
        ("/usr/bin/attnconv", True, "attnconv eval 'my model'"),
        (ELSEWHERE, False, f"'{ELSEWHERE}' eval 'my model'"),
        (attnconv.__file__.replace("__init__", "__main__"), False, f"{sys.executable} -m attnconv eval 'my model'"),
        ("/lib/pytest/__main__.py", False, "attnconv eval 'my model'"),
    ],
)
def test_commands_can_be_pasted(program: str, on_path: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(shutil, "which", lambda name: program if on_path else None)
    assert command_line("eval", "my model") == expected


@pytest.mark.parametrize("command", [[], ["convert"], ["eval"], ["recipes"], ["recipes", "list"]], ids=" ".join)
def test_flags_have_no_type(run: Run, command: list[str]) -> None:
    assert "bool" not in run(*command, "--help").output.lower()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def test_recipes_from_home(run: Run, home: Path) -> None:
    assert run("recipes", "copy", "lolcats", "~/mine.yaml").exit_code == 0
    assert (home / "mine.yaml").is_file()
    assert run("recipes", "validate", "~/mine.yaml").stdout == "~/mine.yaml: valid\n"
    assert load_recipe("~/mine.yaml").name == "lolcats"


def test_data_from_home(home: Path) -> None:
    (home / "text.jsonl").write_text('{"text": "once"}\n')
    assert [row["text"] for row in read_rows(DataSection(path="~/text.jsonl"))] == ["once"]
    (home / "text.txt").write_text("upon a time")
    assert list(read_documents("~/text.txt")) == ["upon a time"]
