"""What `attnconv methods` says, which it reads from a list beside the code so as not to import torch."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from attnconv.attention_modules import available
from attnconv.commands.method_list import LIST_FILE, make_method_list, method_list_text

Run = Callable[..., Result]


def test_the_list_is_what_the_code_says() -> None:
    made = make_method_list()
    again = "run `python -m attnconv.commands.method_list` and commit the file"
    assert LIST_FILE.read_text(encoding="utf-8") == method_list_text(made), again
    assert tuple(method.name for method in made) == available()


@pytest.mark.parametrize("method", make_method_list(), ids=lambda method: method.name)
def test_every_option_has_a_meaning(method) -> None:
    assert [option.name for option in method.options if not option.meaning] == []


def test_methods(run: Run) -> None:
    result = run("methods")
    assert result.exit_code == 0
    assert all(f"{name}: " in result.stdout for name in available())
    one = run("methods", "lolcats").stdout
    assert "window=64: whole number from 1\n" in one
    assert "newest tokens attended exactly" in one
    assert "num_sinks=0: whole number from 0\n" in one
    assert "window_terms=relative: relative or absolute\n" in one
    assert "\nhedgehog: " not in one
    assert max(map(len, one.splitlines())) < 600, "no line is filled up to the width of the file"
    (described,) = json.loads(run("methods", "gated_delta", "--json").stdout)
    options = {option["name"]: option for option in described["options"]}
    assert options["output_norm"]["values"] == "true or false"
    assert options["output_norm"]["default"] == "true"
    assert options["output_gate_rank"]["default"] == "null"


def test_the_readme_has_the_tables_that_the_commands_print(run: Run, repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    for command in (["methods"], ["recipes", "list"]):
        printed = run(*command, "--markdown")
        assert printed.exit_code == 0
        again = f"put what `attnconv {' '.join(command)} --markdown` prints into README.md"
        assert f"\n\n{printed.stdout}\n" in readme, again
        assert run(*command, "--markdown", "--json").exit_code == 2
