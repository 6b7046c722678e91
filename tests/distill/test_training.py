"""The loop: schedules, accumulation, clipping, metrics, checkpoints, and what stops it."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from attnconv.distill.data import TokenStream
from attnconv.distill.metrics import MetricsFile
from attnconv.distill.progress import Silent
from attnconv.distill.team import Team, find_team
from attnconv.distill.training import StageJob, learning_rate_factor, run_stage
from attnconv.distill.transfer import AttentionTransfer
from attnconv.distill.work_folder import StageState, WorkFolder
from attnconv.errors import TrainingError
from attnconv.recipes import DataSection
from attnconv.recipes.stages.attention_transfer import AttentionTransferStage

SEQUENCE = 40


def transfer_stage(**changes):
    settings = {"steps": 6, "sequence_length": SEQUENCE, "learning_rate": 1e-2, "log_every": 2, "save_every": 3}
    return AttentionTransferStage(**settings | changes)


@pytest.fixture
def make_job(tmp_path, make_trainee, tokenizer):
    """A job on a fresh trainee, in a work folder of its own."""
    numbers = itertools.count()

    def make(stage, **changes):
        work = WorkFolder(tmp_path / f"out{next(numbers)}")
        work.begin({})
        trainee = make_trainee()
        stream = TokenStream(DataSection(embedded=True), tokenizer)
        team = Team(torch.device("cpu"))
        settings = {"stream": stream, "team": team, "work": work, "progress": Silent()}
        return StageJob(
            index=0, stage=stage, objective=AttentionTransfer(trainee, stage), trainee=trainee, **settings | changes
        )

    return make


def trained(job):
    return {name: tensor.clone() for name, tensor in job.trainee.trained_tensors().items()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_stage_trains_the_cores_and_nothing_else(make_job):
    job = make_job(transfer_stage(steps=20))
    before = {name: parameter.clone() for name, parameter in job.trainee.model.named_parameters()}
    state = run_stage(job, StageState(0), {})
    assert (state.step, state.tokens) == (20, 20 * SEQUENCE)
    for name, parameter in job.trainee.model.named_parameters():
        assert torch.equal(parameter, before[name]) != (".attnconv." in name), name
    losses = [record.loss for record in MetricsFile(job.work.metrics).records()]
    assert losses[-1] < losses[0] / 2


def test_metrics_say_what_happened(make_job):
    job = make_job(transfer_stage(steps=5, schedule="linear"))
    run_stage(job, StageState(0), {})
    records = list(MetricsFile(job.work.metrics).records())
    assert [record.step for record in records] == [2, 4, 5]
    assert [record.tokens for record in records] == [80, 160, 200]
    assert records[-1].learning_rate == pytest.approx(1e-2 / 5)
    assert all(record.stage == "attention_transfer" and record.tokens_per_second > 0 for record in records)
    assert set(records[0].layers) == {f"model.layers.{number}.self_attn" for number in range(5)}
    assert all(record.grad_norm > 0 for record in records)


def test_the_same_stage_twice_gives_the_same_bits(make_job):
    first, second = (make_job(transfer_stage()) for _ in range(2))
    run_stage(first, StageState(0), {})
    run_stage(second, StageState(0), {})
    assert_equal(trained(first), trained(second))


def test_a_checkpoint_continues_to_the_same_bits(make_job):
    whole, half = make_job(transfer_stage()), make_job(transfer_stage())
    run_stage(whole, StageState(0), {})
    saved = []
    save = half.work.save

    def remember(*args):
        save(*args)
        saved.append(half.work.latest())

    half.work.save = remember
    run_stage(half, StageState(0), {})
    middle = saved[0]
    assert middle.state.step == 3
    rest = make_job(transfer_stage())
    rest.trainee.load_trained(middle.trained)
    end = run_stage(rest, middle.state, middle.optimizer)
    assert end.position == saved[-1].state.position
    assert_equal(trained(whole), trained(rest))


def test_accumulation_equals_a_larger_batch(make_job):
    together, apart = (
        make_job(transfer_stage(batch_size=4)),
        make_job(transfer_stage(batch_size=1, gradient_accumulation=4)),
    )
    ends = [run_stage(job, StageState(0), {}) for job in (together, apart)]
    assert ends[0].position == ends[1].position
    assert ends[0].tokens == ends[1].tokens == 6 * 4 * SEQUENCE
    for name, tensor in trained(together).items():
        torch.testing.assert_close(trained(apart)[name], tensor, rtol=1e-3, atol=2e-4)


def test_gradients_are_clipped_to_the_norm(make_job, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def watched(optimizer, *args, **kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run_stage(make_job(transfer_stage(max_grad_norm=0.01)), StageState(0), {})
    assert norms == pytest.approx([0.01] * 6, rel=1e-3)
    norms.clear()
    run_stage(make_job(transfer_stage(max_grad_norm=None)), StageState(0), {})
    assert min(norms) > 0.02


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule):
    stage = transfer_stage(steps=24, schedule=schedule, warmup_steps=4)
    factors = [learning_rate_factor(stage, step, 24) for step in range(24)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    middle = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}[schedule]
    assert factors[14] == pytest.approx(middle)
    assert factors[-1] > 0
    assert factors[4:] == sorted(factors[4:], reverse=True)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_stage_and_keeps_the_last_checkpoint(make_job, poison, monkeypatch):
    job = make_job(transfer_stage())
    backward = type(job.objective).backward
    calls = itertools.count()

    def poisoned(objective, batch, total):
        figures = backward(objective, batch, total)
        figures.loss.mul_(poison if next(calls) == 4 else 1)
        return figures

    monkeypatch.setattr(type(job.objective), "backward", poisoned)
    with pytest.raises(TrainingError) as caught:
        run_stage(job, StageState(0), {})
    message = str(caught.value)
    assert message.startswith(f"Stage 1 (attention_transfer) stopped at step 5 because the loss is {poison}")
    assert "step 3 of stage 1" in message
    assert "\n" not in message
    snapshot = job.work.latest()
    assert snapshot.state.step == 3
    assert all(torch.isfinite(tensor).all() for tensor in snapshot.trained.values())
    monkeypatch.undo()
    rest, whole = make_job(transfer_stage()), make_job(transfer_stage())
    rest.trainee.load_trained(snapshot.trained)
    run_stage(rest, snapshot.state, snapshot.optimizer)
    run_stage(whole, StageState(0), {})
    assert_equal(trained(whole), trained(rest))


def test_a_gradient_that_is_not_finite_stops_the_stage(make_job, monkeypatch):
    job = make_job(transfer_stage())
    backward = type(job.objective).backward

    def poisoned(objective, batch, total):
        figures = backward(objective, batch, total)
        next(iter(objective.group.parameters.values())).grad.fill_(math.nan)
        return figures

    monkeypatch.setattr(type(job.objective), "backward", poisoned)
    with pytest.raises(TrainingError, match="step 1 because the norm of the gradients is nan; there was no checkpoint"):
        run_stage(job, StageState(0), {})


def test_sequences_within_the_window_are_refused(make_job):
    with pytest.raises(TrainingError, match="nothing to learn from sequences that are no longer than the window"):
        run_stage(make_job(transfer_stage(sequence_length=8)), StageState(0), {})


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launch_that_splits_the_model_is_refused(monkeypatch, flag):
    monkeypatch.setenv(flag, "true")
    with pytest.raises(TrainingError, match="does not split the model's weights"):
        find_team("cpu")


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(TrainingError, match='no device "abacus"'):
        find_team("abacus")


TEAM_SCRIPT = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from attnconv.convert import convert_model
from attnconv.distill.data import TokenStream
from attnconv.packaged.model import embedded_model_path
from attnconv.distill.progress import Silent
from attnconv.distill.team import find_team
from attnconv.distill.trainee import Trainee
from attnconv.distill.training import StageJob, run_stage
from attnconv.distill.transfer import AttentionTransfer
from attnconv.distill.work_folder import StageState, WorkFolder
from attnconv.recipes import DataSection
from attnconv.recipes.stages.attention_transfer import AttentionTransferStage
from transformers import AutoTokenizer

folder, batch_size = Path(sys.argv[1]), int(sys.argv[2])
team = find_team("cpu")
# Every process starts from other weights: the team must agree on those of the first.
torch.manual_seed(team.rank)
model = AutoModelForCausalLM.from_pretrained(embedded_model_path())
trainee = Trainee(convert_model(model, "lolcats", window=8, initialization="kaiming"))
stage = AttentionTransferStage(tokens=480, sequence_length=40, batch_size=batch_size, learning_rate=1e-2)
work = WorkFolder(folder / "out")
if team.leads:
    work.begin({})
team.wait()
stream = TokenStream(DataSection(embedded=True), AutoTokenizer.from_pretrained(embedded_model_path()))
job = StageJob(0, stage, AttentionTransfer(trainee, stage), trainee, stream, team, work, Silent())
state = run_stage(job, StageState(0), {})
torch.save(trainee.trained_tensors() | {"step": torch.tensor(state.step)}, folder / f"rank{team.rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    script = tmp_path / "team.py"
    script.write_text(TEAM_SCRIPT)
    results = {}
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        command = [sys.executable] if size == 1 else command
        subprocess.run(
            [*command, str(script), str(folder), str(2 // size)],
            check=True,
            env={**os.environ, "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            timeout=240,
        )
        results[size] = [torch.load(folder / f"rank{rank}.pt") for rank in range(size)]
    (alone,), (first, second) = results[1], results[2]
    assert int(alone["step"]) == int(first["step"]) == 6
    assert_equal(first, second)
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=2e-4)


def test_data_used_up_many_times_are_said_once(make_job, tokenizer, tmp_path, caplog):
    text = tmp_path / "short.txt"
    text.write_text(2 * "Once upon a time there was a little dog who liked to run in the park with his friend. ")
    stream = TokenStream(DataSection(path=str(text)), tokenizer)
    job = make_job(transfer_stage(steps=24, save_every=None), stream=stream)
    run_stage(job, StageState(0), {})
    said = [record.getMessage() for record in caplog.records if "by heart" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"Stage 1 (attention_transfer) has read the data file {text} 10 times: ")
