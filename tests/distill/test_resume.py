"""A killed run goes on to the very bits of one that was not."""

import signal
import subprocess
import sys

import pytest

from attnconv.errors import TrainingError
from attnconv.recipes import load_recipe
from attnconv.runs import embedded_model_path, run_conversion

RECIPE = """
name: test
attention: [{layers: all, method: lolcats, options: {window: 8, initialization: kaiming}}]
data: {embedded: true}
evaluate: {embedded: true, tokens: 600, context: 128}
stages:
  - {kind: attention_transfer, steps: 7, sequence_length: 64, batch_size: 2, learning_rate: 1.0e-2, schedule: cosine,
     save_every: 3, log_every: 2}
  - {kind: lora, steps: 7, sequence_length: 48, gradient_accumulation: 2, learning_rate: 1.0e-3, warmup_steps: 2,
     rank: 2, dropout: 0.3, targets: [q_proj, v_proj], train_cores: true, save_every: 3, log_every: 2}
  - {kind: logits, steps: 4, sequence_length: 48, learning_rate: 1.0e-3, lora: {rank: 2, targets: [o_proj]},
     save_every: 3, log_every: 2}
"""

CHILD = """
import os, re, signal, sys
from attnconv.distill import Silent
from attnconv.runs import embedded_model_path, run_conversion
from attnconv.recipes import load_recipe

recipe, output, resume, kill_stage, kill_step = sys.argv[1:]


class Killer(Silent):
    def begin(self, text, total, done, unit):
        self.stage, self.steps = int(re.search(r"Stage (\\d+)", text)[1]), done

    def step(self, loss, tokens_per_second):
        self.steps += 1
        if (self.stage, self.steps) == (int(kill_stage), int(kill_step)):
            os.kill(os.getpid(), signal.SIGKILL)


run_conversion(
    embedded_model_path(), load_recipe(recipe), output, resume=resume == "resume", device="cpu", progress=Killer()
)
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def run_until(recipe_file, output, *, kill, resume):
    """Run a conversion in a process of its own, which kills itself in the given stage and step."""
    script = recipe_file.with_name("child.py")
    script.write_text(CHILD)
    arguments = [str(recipe_file), str(output), "resume" if resume else "new", *map(str, kill)]
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, timeout=250)


@pytest.mark.compat
@pytest.mark.slow
def test_killed_in_both_stages_it_ends_with_the_same_bits(tmp_path, recipe_file):
    whole = run_conversion(embedded_model_path(), load_recipe(str(recipe_file)), tmp_path / "whole", device="cpu")
    output = tmp_path / "killed"
    for kill, resume in (((1, 5), False), ((2, 5), True)):
        child = run_until(recipe_file, output, kill=kill, resume=resume)
        assert child.returncode == -signal.SIGKILL, child.stderr.decode()
        assert not output.exists()
    child = run_until(recipe_file, output, kill=(0, 0), resume=True)
    assert child.returncode == 0, child.stderr.decode()
    first = "model-00001-of-00002.safetensors"
    assert (output / first).read_bytes() == (whole.output / first).read_bytes()
    assert not (tmp_path / ".killed.attnconv-work").exists()
    lines = [(folder / "metrics.jsonl").read_text().count("\n") for folder in (whole.output, output)]
    assert lines[0] == lines[1]


@pytest.fixture
def unfinished(tmp_path, recipe_file, monkeypatch):
    """The output of a run that stopped in its first stage, in this process."""

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("attnconv.distill.healing.measure_distance", stop)
    with pytest.raises(KeyboardInterrupt):
        run_conversion(embedded_model_path(), load_recipe(str(recipe_file)), tmp_path / "model")
    monkeypatch.undo()
    return tmp_path / "model"


def test_a_changed_recipe_cannot_resume(unfinished, recipe_file):
    changed = load_recipe(str(recipe_file), ["stages.0.learning_rate=2e-2"])
    with pytest.raises(
        TrainingError, match=r"has another recipe \(it differs in stages\.0\.learning_rate\): resume it unchanged, or"
    ):
        run_conversion(embedded_model_path(), changed, unfinished, resume=True)


def test_a_mistake_found_before_the_first_checkpoint_leaves_nothing_behind(tmp_path, recipe_file):
    wrong = load_recipe(str(recipe_file), ["stages.1.targets=[qq]"])
    with pytest.raises(TrainingError, match='no module "qq"'):
        run_conversion(embedded_model_path(), wrong, tmp_path / "model")
    assert not list(tmp_path.glob(".model*"))


def test_a_mistake_leaves_what_others_began_and_what_can_be_gone_on_with(unfinished, recipe_file, monkeypatch):
    work = unfinished.parent / ".model.attnconv-work"
    changed = load_recipe(str(recipe_file), ["stages.0.steps=5"])
    with pytest.raises(TrainingError, match="another recipe"):
        run_conversion(embedded_model_path(), changed, unfinished, resume=True)
    assert (work / "run.json").is_file()
    (work / "checkpoint-0-3").mkdir()
    with pytest.raises(TrainingError, match="is damaged"):
        run_conversion(embedded_model_path(), load_recipe(str(recipe_file)), unfinished, resume=True)
    assert (work / "checkpoint-0-3").is_dir()


def test_an_unfinished_run_is_not_thrown_away_unasked(unfinished, recipe_file):
    recipe = load_recipe(str(recipe_file), ["stages.0.steps=1", "stages.1.steps=1", "stages.2.steps=1"])
    with pytest.raises(TrainingError, match="go on with --resume, or start over with --overwrite"):
        run_conversion(embedded_model_path(), recipe, unfinished)
    assert run_conversion(embedded_model_path(), recipe, unfinished, overwrite=True).output.is_dir()
