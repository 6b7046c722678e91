import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import Result

from attnconv.convert import converted_modules
from attnconv.recipes import load_recipe
from attnconv.runs import demo as demo_module

pytestmark = pytest.mark.compat

Run = Callable[..., Result]
# One step of each stage, and a look at two windows.
SHORT = ["stages.*.tokens=768", "stages.*.sequence_length=384", "stages.*.batch_size=2", "evaluate.tokens=768"]


def short() -> list[str]:
    return [part for change in SHORT for part in ("--set", change)]


def test_a_recipe_without_training(run: Run, teacher: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("-q", "convert", teacher, "--recipe", "sliding-window", "--output", output)
    assert result.exit_code == 0, result.stderr
    assert "5 of 5 attention modules to sliding_window" in result.stdout
    assert str(output) in result.stdout
    assert f"attnconv eval {output} --against {teacher}" in result.stdout.splitlines()[-1]
    assert result.stderr == ""
    assert len(converted_modules(AutoModelForCausalLM.from_pretrained(output))) == 5
    again = run("convert", teacher, "--recipe", "sliding-window", "--output", output)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    (output / "notes.txt").write_text("mine")
    kept = run("-q", "convert", teacher, "-r", "sliding-window", "-o", output, "--overwrite")
    assert (kept.exit_code, (output / "notes.txt").read_text()) == (1, "mine")
    assert "(notes.txt)" in kept.stderr
    (output / "notes.txt").unlink()
    assert run("-q", "convert", teacher, "-r", "sliding-window", "-o", output, "--overwrite").exit_code == 0
    assert "converted already" in run("inspect", output).stdout
    twice = run("-q", "convert", output, "-r", "sliding-window", "-o", tmp_path / "twice")
    assert twice.exit_code == 1
    assert "converted already" in twice.stderr


def test_a_recipe_with_training(run: Run, teacher: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("convert", teacher, "--recipe", "quickstart", "--output", output, *short())
    assert result.exit_code == 0, result.stderr
    stages = [stage.kind for stage in load_recipe("quickstart").stages]
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert rows[: 3 + len(stages)] == ["after", "teacher", "swap", *stages]
    # Stderr is no terminal here, so progress comes as lines.
    assert "step 1 of 1" in result.stderr
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little girl named Lily.\n" * 20)
    compared = run("eval", output, "--against", teacher, "--text", text, "--tokens", "128", "--json")
    document = json.loads(compared.stdout)
    assert [document[role]["converted"] for role in ("base", "model")] == [False, True]
    (figure,) = (row for row in document["tasks"]["text"]["figures"] if row["metric"] == "perplexity")
    assert figure["paired"]
    assert figure["change"] == pytest.approx(figure["model"] / figure["base"])
    assert document["path"] == str(output / "results" / "eval.json")


def test_convert_and_push(run: Run, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def push_folder(folder: Path, repo_id: str, *, private: bool = False) -> str:
        calls.append((folder, repo_id, private))
        return "https://hub/user/name"

    monkeypatch.setattr("attnconv.convert.writing.hub.push_folder", push_folder)
    output = tmp_path / "out"
    arguments = ["-q", "convert", teacher, "-r", "sliding-window", "-o", output, "--push", "user/name", "--private"]
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert calls == [(output, "user/name", True)]
    assert "https://hub/user/name" in result.stdout


def test_the_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "load_recipe", lambda name: load_recipe(name, SHORT))
    monkeypatch.setattr(demo_module, "NEW_TOKENS", 8)
    output = tmp_path / "demo"
    result = run("-q", "demo", "--output", output)
    assert result.exit_code == 0, result.stderr
    assert "5 of 5 attention layers converted to lolcats (window" in result.stdout
    for word in ("teacher", "swap", "5 recurrent states", "key/value cache", "Try next:", str(output)):
        assert word in result.stdout
    assert result.stdout.count(demo_module.PROMPT) == 2
    document = json.loads(run("-q", "demo", "--output", output, "--json").stdout)
    assert document["converted"]["recurrent_layers"] == 5
    assert document["metrics"][0]["stage"] == "teacher"


def test_the_demo_spares_folders_of_others(run: Run, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    result = run("-q", "demo", "--output", tmp_path)
    assert result.exit_code == 1
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_quickstart_promises_what_the_demo_shows() -> None:
    recipe = load_recipe("quickstart")
    (rule,) = recipe.attention
    assert rule.layers == "all"
    assert rule.method == "lolcats"
    assert rule.options["window"] <= 32
    assert recipe.evaluate is not None
    assert recipe.evaluate.embedded
    assert torch.get_default_dtype() == torch.float32
