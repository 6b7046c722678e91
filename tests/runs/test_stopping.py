"""SIGINT and SIGTERM in the middle of a stage lose nothing, and slow steps are saved by the clock."""

import os
import signal

import pytest

from attnconv.distill import Silent, training
from attnconv.distill.stopping import listening
from attnconv.distill.work_folder import WorkFolder
from attnconv.errors import InterruptedRun
from attnconv.runs import run_conversion


class Signaller(Silent):
    """Sends this process a signal in its second step, and counts the steps."""

    def __init__(self, number):
        self.number, self.steps = number, 0

    def step(self, loss, per_second):
        self.steps += 1
        if self.steps == 2:
            os.kill(os.getpid(), self.number)


LONG = ("stages.0.steps=4", "stages.0.save_every=null")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_the_run_goes_on_to_the_same_bits(base, recipe, tmp_path, number):
    before = signal.getsignal(number)
    whole = run_conversion(base, recipe(*LONG), tmp_path / "whole", device="cpu")
    progress = Signaller(number)
    with pytest.raises(InterruptedRun, match="step 2 of stage 1 is saved") as interrupt:
        run_conversion(base, recipe(*LONG), tmp_path / "out", device="cpu", progress=progress)
    assert interrupt.value.signal == number
    assert progress.steps == 2
    assert signal.getsignal(number) is before
    work = WorkFolder(tmp_path / "out")
    assert (work.latest().state.step, work.saved()) == (2, "step 2 of stage 1 is saved; ")
    resumed = run_conversion(base, recipe(*LONG), tmp_path / "out", resume=True, device="cpu")
    files = [path.name for path in whole.output.glob("*.safetensors")]
    assert files
    assert all((resumed.output / name).read_bytes() == (whole.output / name).read_bytes() for name in files)


def test_a_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), listening() as request:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_nothing_saved_is_said(tmp_path):
    assert WorkFolder(tmp_path / "out").saved() == "no step of it is saved yet; "


def test_slow_steps_are_saved_by_the_clock(recipe, monkeypatch):
    stage = recipe().stages[0]
    assert not training._save_is_due(stage, 3, 10.0)
    assert training._save_is_due(stage, 3, training.SECONDS_BETWEEN_CHECKPOINTS + 1)
    assert training._save_is_due(stage, stage.save_every, 0.0)
    assert not training._save_is_due(recipe("stages.0.save_every=null").stages[0], 3, 1e6)
