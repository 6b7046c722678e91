"""Damaged input of every kind ends in one sentence of ours: no Python error, no hang, no dense model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]


@pytest.fixture
def base(teacher: str, tmp_path: Path) -> Path:
    return shutil.copytree(teacher, tmp_path / "base")


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("layers", [10**9, 10**30])
def test_more_layers_than_can_be_built(run: Run, base: Path, layers: int) -> None:
    edit(base, num_hidden_layers=layers)
    result = run("inspect", base)
    assert result.exit_code == 1
    assert f"it sets num_hidden_layers to {layers}, more than any model has" in result.stderr


@pytest.mark.parametrize(
    ("option", "words"),
    [("feature_dim=1000000000", "it would have 128,"), ("feature_dim=1" + 30 * "0", "an option is out of range")],
)
def test_a_method_larger_than_any_memory(run: Run, teacher: str, tmp_path: Path, option: str, words: str) -> None:
    recipe = ["--recipe", "hedgehog", "--set", f"attention.0.options.{option}", "--set", "stages=[]"]
    result = run("convert", teacher, *recipe, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert words in result.stderr
    assert "refused: model.layers" in run("inspect", teacher, *recipe).stdout


@pytest.mark.parametrize("content", ["[]", "3", "null", "{"])
def test_settings_of_generation_that_are_none(run: Run, base: Path, tmp_path: Path, content: str) -> None:
    (base / "generation_config.json").write_text(content)
    for command in (["convert", base, "--recipe", "sliding-window", "-o", tmp_path / "out"], ["eval", base]):
        result = run(*command)
        assert result.exit_code == 1
        assert "generation_config.json is not " in result.stderr


@pytest.mark.parametrize(
    ("recipe", "change", "words"),
    [
        ("hedgehog", "stages.0.batch_size=1000000000", "stages.0.batch_size"),
        ("hedgehog", "data.seed=1e27", "data.seed"),
        ("hedgehog", "evaluate.context=1e24", "evaluate.context"),
        ("gated", "attention.0.options.norm_start=1e308", "norm_start"),
    ],
)
def test_numbers_that_no_run_comes_to_the_end_with(
    run: Run, teacher: str, recipe: str, change: str, words: str
) -> None:
    result = run("inspect", teacher, "--recipe", recipe, "--set", change)
    assert result.exit_code == 1
    assert words in result.stderr
    assert "less than or equal" in result.stderr


def test_a_window_of_one_token_has_nothing_to_predict(run: Run, teacher: str) -> None:
    result = run("inspect", teacher, "--recipe", "quickstart", "--set", "evaluate.context=1")
    assert result.exit_code == 1
    assert "evaluate.context: input should be greater than or equal to 2" in result.stderr


@pytest.mark.parametrize("command", [["inspect"], ["report"], ["eval"], ["convert", "-r", "lolcats", "-o", "out"]])
def test_a_name_that_is_too_long_for_the_system(run: Run, command: list[str]) -> None:
    result = run(command[0], "x" * 5000, *command[1:])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"Error: File name too long: {'x' * 200}..."


def test_memory_that_is_not_there(run: Run, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"
        )

    monkeypatch.setattr("attnconv.evaluate.bench.run_bench", full)
    result = run("bench", teacher, "--batches", "1000000000")
    assert result.exit_code == 1
    assert "There is not enough memory for this: take smaller batches" in result.stderr
    assert "Failed with" not in result.stderr
