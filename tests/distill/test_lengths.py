"""Stages whose sequences grow: which steps have which length, with the same tokens and to the same bits."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from attnconv.cli import app
from attnconv.distill import Silent
from attnconv.distill.checks import check_data
from attnconv.distill.data import TokenStream
from attnconv.distill.metrics import MetricsFile
from attnconv.distill.schedule import stage_data
from attnconv.distill.team import Team
from attnconv.distill.training import StageJob, run_stage
from attnconv.distill.work_folder import StageState, WorkFolder
from attnconv.errors import InterruptedRun, RecipeError, TrainingError
from attnconv.recipes import DataSection, load_recipe
from attnconv.recipes.stages.base import STAGES
from attnconv.recipes.stages.calibrate import CalibrateStage
from attnconv.recipes.stages.lora import LoraStage
from attnconv.runs import embedded_model_path, run_conversion

RECIPE = """
name: test
attention: [{layers: all, method: lolcats, options: {window: 8}}]
data: {embedded: true}
stages:
  - {kind: attention_transfer, tokens: 500, sequence_length: [24, 48], batch_size: 2, learning_rate: 1.0e-2,
     schedule: cosine, save_every: 1}
  - {kind: logits, steps: 3, sequence_length: [16, 32, 64], learning_rate: 1.0e-3, save_every: 1}
  - {kind: lora, steps: 2, sequence_length: [64, 16], gradient_accumulation: 2, learning_rate: 1.0e-3, rank: 2,
     dropout: 0.3}
"""


class Stopper(Silent):
    """Interrupts the run in a step of a stage, both counted from 1, before that step is saved."""

    def __init__(self, stage, step):
        self.stop = (stage, step)

    def begin(self, text, total, done, unit="tokens"):
        self.stage, self.steps = int(re.match(r"Stage (\d+)", text)[1]), done

    def step(self, loss, per_second):
        self.steps += 1
        if (self.stage, self.steps) == self.stop:
            raise InterruptedRun("stopped", None)


def lora(**changes):
    return LoraStage(**{"steps": 6, "sequence_length": [16, 32, 64], "learning_rate": 1e-3} | changes)


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("lengths", "steps", "expected"),
    [
        ([16, 32, 64], 6, [16, 16, 32, 32, 64, 64]),
        ([64, 16], 5, [64, 64, 64, 16, 16]),
        ([16, 16, 64], 3, [16, 16, 64]),
        ([32], 2, [32, 32]),
        (32, 2, [32, 32]),
    ],
)
def test_lengths_have_equal_shares_in_their_order(lengths, steps, expected):
    stage = lora(steps=steps, sequence_length=lengths)
    assert [stage.length_at(step, steps) for step in range(steps)] == expected


def test_every_step_has_the_same_tokens_in_sequences_of_its_length(tokenizer):
    stage = lora(batch_size=2, gradient_accumulation=3)
    stream = TokenStream(DataSection(embedded=True), tokenizer)
    given = {"num_steps": 6, "accumulation": 3}
    team = Team(torch.device("cpu"))
    steps = list(stage_data(stage, stream, team, start=StageState(0), **given))
    shapes = [[tuple(batch.input_ids.shape) for batch in data.batches] for data in steps]
    assert shapes == [[(128 // length, length)] * 3 for length in (16, 16, 32, 32, 64, 64)]
    assert stage.tokens_per_step == 3 * 128
    # No token is left out or read twice where one length ends.
    read = torch.cat([batch.input_ids.flatten() for data in steps for batch in data.batches])
    plain = stream.sequences(64)
    assert torch.equal(read, torch.cat([next(plain).tokens for _ in range(len(read) // 64)]))
    late = list(stage_data(stage, stream, team, start=StageState(0, step=2, position=steps[1].end), **given))
    assert [data.end for data in late] == [data.end for data in steps[2:]]


def test_a_list_of_one_length_is_that_length(tokenizer):
    stream = TokenStream(DataSection(embedded=True), tokenizer)
    ends = [
        [data.end for data in stage_data(stage, stream, Team(torch.device("cpu")), start=StageState(0), num_steps=6)]
        for stage in (lora(sequence_length=32, batch_size=2), lora(sequence_length=[32], batch_size=2))
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("sequence_length=[]", "got an empty list; give one length such as 1024, or several"),
        ("sequence_length=[512, 1]", "a whole number of at least 2 is wanted, got 1"),
        ("sequence_length=[512, [2]]", "whole number of at least 2 is wanted, got "),
        ("sequence_length=1", "a whole number of at least 2 is wanted, got 1"),
        ("sequence_length=[48, 64]", "48 tokens do not divide the 128 of a batch .batch_size 2 of the longest"),
        ("sequence_length={512: 50%}", "a whole number of at least 2 is wanted, got {"),
        ("tokens=96", "1 step is fewer than the 2 lengths of sequence_length: give the stage more tokens"),
    ],
)
def test_schedules_that_are_none_are_answered_with_one_sentence(recipe_file, changes, said):
    with pytest.raises(RecipeError, match=said) as error:
        load_recipe(str(recipe_file), [f"stages.0.{changes}"])
    assert "\n" not in str(error.value)


def test_schedules_survive_yaml_and_serve_every_kind_of_stage(recipe_file):
    recipe = load_recipe(str(recipe_file))
    assert "sequence_length:\n  - 16\n  - 32\n" in recipe.to_yaml()
    assert [stage.longest for stage in recipe.stages] == [48, 64, 64]
    assert CalibrateStage(tokens=1000, sequence_length=[16, "6_4"]).lengths == (16, 64)


def test_processes_that_leave_too_few_steps_are_refused(recipe_file):
    run = SimpleNamespace(
        recipe=load_recipe(str(recipe_file)),
        team=Team(torch.device("cpu"), size=4),
        checkpoint=SimpleNamespace(config=AutoConfig.from_pretrained(embedded_model_path())),
    )
    with pytest.raises(TrainingError, match=r"fewer steps \(1\) for 4 processes than the 2 lengths"):
        check_data(run)


@pytest.mark.parametrize(("kind", "saved"), [("attention_transfer", 3), ("logits", 4), ("lora", 3)])
def test_a_stage_goes_on_to_the_same_bits_from_either_side_of_a_border(
    kind, saved, make_trainee, tokenizer, tmp_path, monkeypatch
):
    extra = {"rank": 2, "dropout": 0.3} if kind == "lora" else {}
    stage = STAGES.classes[kind](steps=5, sequence_length=[24, 48], learning_rate=1e-2, save_every=1, **extra)
    snapshots = {}

    def make(name):
        trainee = make_trainee()
        adapter = None if stage.adapter is None else trainee.add_adapter(stage.adapter, seed=0)
        work = WorkFolder(tmp_path / name)
        work.begin({})
        stream = TokenStream(DataSection(embedded=True), tokenizer)
        team = Team(torch.device("cpu"))
        return StageJob(0, stage, stage.objective(trainee, adapter), trainee, stream, team, work, Silent())

    whole, late = make("whole"), make("late")
    save = whole.work.save

    def remember(state, *rest):
        save(state, *rest)
        snapshots[state.step] = whole.work.latest()

    monkeypatch.setattr(whole.work, "save", remember)
    run_stage(whole, StageState(0), {})
    middle = snapshots[saved]
    late.trainee.load_trained(middle.trained)
    run_stage(late, middle.state, middle.optimizer)
    ends = [job.trainee.trained_tensors() for job in (whole, late)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_says_the_lengths(recipe_file, tmp_path):
    recipe = load_recipe(str(recipe_file))
    output = run_conversion(embedded_model_path(), recipe, tmp_path / "whole", device="cpu").output
    records = list(MetricsFile(output / "metrics.jsonl").records())
    assert [(record.step, record.sequence_length) for record in records] == [
        *((3, 24), (5, 48)),
        *((1, 16), (2, 32), (3, 64)),
        *((1, 64), (2, 16)),
    ]
    rows = json.loads((output / "receipt.json").read_text())["metrics"]
    assert [row.get("sequence_length") for row in rows] == [[24, 48], [16, 32, 64], [64, 16]]
    assert "| 16, 32, 64 |" in (output / "README.md").read_text()


@pytest.mark.slow
def test_runs_stopped_at_borders_go_on_to_the_same_bits(recipe_file, tmp_path):
    recipe = load_recipe(str(recipe_file))
    whole = run_conversion(embedded_model_path(), recipe, tmp_path / "whole", device="cpu")
    # Saved are the steps before: the last of one length, the first of the next, and the last of one again.
    for number, stop in enumerate([(1, 4), (1, 5), (2, 2)]):
        with pytest.raises(InterruptedRun):
            run_conversion(
                embedded_model_path(),
                recipe,
                tmp_path / "out",
                resume=number > 0,
                device="cpu",
                progress=Stopper(*stop),
            )
    run_conversion(embedded_model_path(), recipe, tmp_path / "out", resume=True, device="cpu")
    files = [path.name for path in whole.output.glob("*.safetensors")]
    assert files
    assert all((tmp_path / "out" / name).read_bytes() == (whole.output / name).read_bytes() for name in files)


def test_inspect_says_the_lengths(recipe_file):
    arguments = ["inspect", str(embedded_model_path()), "--recipe", str(recipe_file)]
    shown = CliRunner().invoke(app, arguments).output
    assert "stage 1 (attention_transfer): 480 tokens in equal shares in sequences of 24, 48; 5 steps of 96" in shown
    shown = CliRunner().invoke(app, [*arguments, "--json", "--set", "stages.1.sequence_length=32"]).output
    assert json.loads(shown)["stages"][1]["lengths"] == [32]
