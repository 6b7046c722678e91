"""`inspect --estimate`: what is measured and what is computed, and that nothing is written."""

import json

import pytest
from typer.testing import CliRunner

from attnconv.cli import app
from attnconv.distill import probing
from attnconv.distill.work_folder import WorkFolder
from attnconv.packaged.model import embedded_model_path
from attnconv.recipes import load_recipe
from attnconv.runs import estimate as estimating
from attnconv.runs import run_conversion
from attnconv.runs.estimate import estimate

RECIPE = """
name: test
attention: [{layers: all, method: lolcats, options: {window: 8}}]
data: {embedded: true}
stages:
  - {kind: attention_transfer, tokens: 500, sequence_length: [24, 48], batch_size: 2, learning_rate: 1.0e-2,
     save_every: 1}
  - {kind: lora, steps: 3, sequence_length: 16, learning_rate: 1.0e-3, rank: 2, targets: [q_proj]}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def ask(recipe_file, tmp_path, monkeypatch):
    """Runs `inspect --estimate` in an empty folder, which it must leave so."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(probing, "LONG_SECONDS", 0.0001)

    def run(*arguments, recipe=recipe_file):
        given = ["inspect", str(embedded_model_path()), "--estimate", "--device", "cpu", *arguments]
        answer = CliRunner().invoke(app, [*given, *(["--recipe", str(recipe)] if recipe else [])])
        assert not list(folder.iterdir())
        return answer

    return run


def test_steps_of_each_stage_and_length_are_measured_and_the_rest_computed(ask):
    answer = ask("--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)["estimate"]
    transfer, lora = found["stages"]
    assert [len(stage["step_seconds"]) for stage in (transfer, lora)] == [2, 1]
    assert transfer["seconds"] == pytest.approx(3 * transfer["step_seconds"][0] + 2 * transfer["step_seconds"][1])
    assert found["seconds"] == pytest.approx(transfer["seconds"] + lora["seconds"])
    assert (transfer["reads"]["tokens"], transfer["reads"]["lengths"]) == (480, [24, 48])
    assert (transfer["teacher_bytes"], found["not_measured"], found["device"]) == (0, None, "cpu")
    # Five projections of 64 x 64, each with two matrices of rank 2; gradient and two moments of each number.
    assert lora["training_bytes"] == 12 * 5 * 2 * (64 + 64)
    assert lora["weights_bytes"] - transfer["weights_bytes"] == 4 * 5 * 2 * (64 + 64)


def test_the_table_says_what_is_measured(ask):
    lines = ask().stdout
    assert "2: lora" in lines
    assert "measured: single steps of this model on the recipe's data" in lines
    assert "computed: all other memory, activations roughly, and the disk" in lines


def test_what_cannot_be_measured_is_computed_and_says_why(ask, monkeypatch, recipe_file):
    answer = ask(recipe="pool-heads")
    assert "measured: nothing, for the rewritten weights would have to be written first" in answer.stdout
    monkeypatch.setattr(estimating, "weight_files", lambda folder: ["not-here.safetensors"])
    found = estimate(str(embedded_model_path()), load_recipe(str(recipe_file)))
    assert found.not_measured == "the weights are not on this machine"
    assert (found.seconds, found.stages[1].training_bytes) == (None, 12 * 5 * 2 * (64 + 64))


def test_it_needs_a_recipe_and_one_that_is_not_refused(ask):
    assert "--estimate needs --recipe" in ask(recipe=None).output
    assert "No estimate: a conversion would be refused" in ask("--set", "attention.0.layers=nothing").output


def test_the_disk_is_what_a_run_takes(recipe_file, tmp_path, monkeypatch):
    recipe = load_recipe(str(recipe_file), ["stages.1.steps=1", "stages.0.tokens=200"])
    sizes = []
    save = WorkFolder.save

    def watched(work, *given):
        save(work, *given)
        sizes.append(sum(path.stat().st_size for path in work.path.rglob("*.safetensors")))

    monkeypatch.setattr(WorkFolder, "save", watched)
    monkeypatch.setattr(estimating, "probe_steps", lambda run: [])
    result = run_conversion(embedded_model_path(), recipe, tmp_path / "out", device="cpu")
    found = estimate(str(embedded_model_path()), recipe)
    written = sum(path.stat().st_size for path in result.output.glob("*.safetensors"))
    assert found.result_bytes == pytest.approx(written, rel=0.05)
    assert max(sizes) <= found.work_bytes <= 3 * max(sizes)
