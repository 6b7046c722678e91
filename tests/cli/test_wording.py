"""What a newcomer pastes from the command line works: names of programs, paths from home, flags without a value."""

import io
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import Result

import attnconv
from attnconv.commands.session import Session
from attnconv.commands.tables import _metrics_table, command_line
from attnconv.distill.data import read_rows
from attnconv.distill.progress import LineProgress
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


def test_the_hub_client_says_once_that_it_asks_again(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session()
    session.configure_logging()
    session.silence_libraries()
    client = logging.getLogger("huggingface_hub.utils._http")
    for _ in range(3):
        client.warning("'[Errno 111] Connection refused' thrown while requesting HEAD http://hub/file")
        client.warning("Retrying in 1s [Retry 1/5].")
    client.warning("something else")
    said = capsys.readouterr().err
    assert said.count("The Hub does not answer; it is asked a few times more") == 1
    assert "Retrying" not in said
    assert "thrown" not in said


def test_the_losses_of_a_step_and_of_several_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    lines = LineProgress()
    lines.begin("Stage 1: lora", 1, 0)
    lines.step(2.0, 1.0)
    assert "step loss 2" in capsys.readouterr().err
    header, row = (line.split() for line in _text_of(_metrics_table([{"stage": "lora", "loss": 2.5}])))
    assert (header, row) == (["after", "mean", "loss"], ["lora", "2.5"])


def _text_of(table: Table) -> list[str]:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().splitlines()
