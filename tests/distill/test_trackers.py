"""Lines of metrics that are sent on: which, by which names and steps, and what happens where a tracker fails."""

import math

import pytest
from accelerate import tracking
from typer.testing import CliRunner

from attnconv.cli import app
from attnconv.distill.metrics import ExpertLoad, MetricsFile, Record
from attnconv.distill.trackers import Trackers, check_trackers, figures_of
from attnconv.errors import PlanError, TrainingError
from attnconv.recipes import load_recipe
from attnconv.runs import embedded_model_path, run_conversion

RECIPE = """
name: test
attention: [{layers: "0", method: lolcats, options: {window: 8}}]
data: {embedded: true}
stages:
  - {kind: attention_transfer, steps: 2, sequence_length: [16, 32], learning_rate: 1.0e-2}
  - {kind: logits, steps: 2, sequence_length: 16, learning_rate: 1.0e-3, log_every: 1}
"""
RECORD = Record(1, "lora", 5, 80, 2.5, 1e-3, math.nan, 10.0, {"a": 0.5}, experts={"r": ExpertLoad([1.0, 0.0], 0.0)})


@pytest.fixture
def opened(monkeypatch):
    """Trackers that were opened, in place of those that are installed; both keep what they are given."""
    made = []

    class Fake:
        requires_logging_directory = False
        fails_at = ""

        def __init__(self, *args, **kwargs):
            self.made, self.logged, self.config, self.finished = (args, kwargs), [], None, 0
            made.append(self)

        def start(self):
            if "start" in self.fails_at:
                raise RuntimeError("no login.\nand more")

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None):
            if "log" in self.fails_at:
                raise ConnectionError("gone")
            self.logged.append((step, values))

        def finish(self):
            if "finish" in self.fails_at:
                raise ConnectionError("gone")
            self.finished += 1

    class WandB(Fake):
        name = "wandb"

    class TensorBoard(Fake):
        name = "tensorboard"
        requires_logging_directory = True

    classes = {"wandb": WandB, "tensorboard": TensorBoard}
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", classes)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: list(classes))
    return made


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_every_line_of_metrics_goes_to_each_tracker_once(opened, recipe_file, tmp_path):
    arguments = ["convert", str(embedded_model_path()), "-r", str(recipe_file), "-o", str(tmp_path / "out")]
    answer = CliRunner().invoke(app, [*arguments, "--log-to", "wandb", "--log-to", "tensorboard", "--device", "cpu"])
    assert answer.exit_code == 0, answer.output
    wandb, board = opened
    assert wandb.made == (("attnconv",), {"name": "out"})
    assert board.made == (("out", tmp_path / "attnconv-logs"), {})
    records = list(MetricsFile(tmp_path / "out" / "metrics.jsonl").records())
    expected = [(step, figures_of(record)) for step, record in zip((1, 2, 3, 4), records, strict=True)]
    assert wandb.logged == board.logged == expected
    assert expected[0][1]["1_attention_transfer/sequence_length"] == 16
    assert wandb.config == {"recipe": "test", "model": embedded_model_path().name}
    assert (wandb.finished, board.finished) == (1, 1)


def test_numbers_have_the_stage_in_their_names_and_what_is_none_is_left_out():
    assert figures_of(RECORD) == {
        "2_lora/tokens": 80,
        "2_lora/loss": 2.5,
        "2_lora/learning_rate": 1e-3,
        "2_lora/tokens_per_second": 10.0,
        "2_lora/layer_error/a": 0.5,
        "2_lora/expert_entropy/r": 0.0,
    }


def test_a_tracker_that_fails_later_is_given_up_and_the_others_go_on(opened, tmp_path, caplog):
    trackers = Trackers(("wandb", "tensorboard", "wandb"), tmp_path / "out", steps=(10, 20))
    with trackers.running():
        opened[0].fails_at = "log"
        trackers.log(RECORD)
        trackers.log(RECORD)
    assert [step for step, _ in opened[1].logged] == [15, 15]
    assert caplog.text.count("wandb takes no more metrics: gone; the run goes on") == 1
    trackers.log(RECORD)
    assert (len(opened), len(opened[1].logged), opened[1].finished) == (2, 2, 1)


def test_one_that_cannot_be_closed_takes_nothing_with_it(opened, tmp_path, caplog):
    trackers = Trackers(("wandb", "tensorboard"), tmp_path / "out")
    with trackers.running():
        opened[0].fails_at = "finish"
    assert opened[1].finished == 1
    assert "wandb could not be closed: gone; its last lines may be missing" in caplog.text


def test_one_that_cannot_be_started_is_a_sentence(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.LOGGER_TYPE_TO_CLASS["tensorboard"], "fails_at", "start")
    with (
        pytest.raises(TrainingError, match="^The tracker 'tensorboard' cannot be started: no login; mend that"),
        Trackers(("wandb", "tensorboard"), tmp_path / "out").running(),
    ):
        pass
    assert opened[0].finished == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "trackio",
            r"The tracker 'trackio' is not installed: run `pip install trackio`, or leave --log-to trackio out",
        ),
        ("tensorbord", "There is no tracker 'tensorbord' to log to; did you mean 'tensorboard'?"),
        ("x", "There is no tracker 'x' to log to; use one of: tensorboard, trackio, wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_told_before_anything_is_read(opened, name, said, recipe_file, tmp_path):
    with pytest.raises(TrainingError) as error:
        run_conversion("no/model", load_recipe(str(recipe_file)), tmp_path / "out", log_to=("wandb", name))
    assert str(error.value) == said
    assert not opened


def test_without_stages_there_is_nothing_to_log(opened, tmp_path):
    with pytest.raises(PlanError, match="'sliding-window' has no stages, so there is nothing to log: leave --log-to"):
        run_conversion("no/model", load_recipe("sliding-window"), tmp_path / "out", log_to=["wandb"])
    check_trackers(["wandb"])
