"""The loop of a healing stage: deterministic, resumable after any step, and the same for every kind of stage.

It is a loop of its own on top of accelerate's process state, not `transformers.Trainer`, for three reasons: backward
passes run inside the forward pass; a checkpoint is what trains (a few megabytes) instead of the whole model; and a
resumed run has to give the very same weights, so everything that a step depends on is a function of its number.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InterruptedRun, TrainingError
from ..recipes import StageBase, TrainingStage
from .batches import StepData
from .data import TokenStream
from .health import warn_if_repeated
from .images import ImageStream, unit_of
from .metrics import ExpertLoad, MetricsFile, Record
from .objective import Figures, Objective
from .progress import Progress
from .schedule import stage_data
from .stopping import listening
from .team import Team
from .trackers import Trackers
from .trainee import Trainee
from .work_folder import StageState, WorkFolder

# However slow the steps are, no more than this is lost when the process is killed.
SECONDS_BETWEEN_CHECKPOINTS = 180


def stage_name(index: int, stage: StageBase) -> str:
    """What messages call the stage of a recipe that has this index."""
    return f"Stage {index + 1} ({stage.kind})"


@dataclass(frozen=True)
class StageJob:
    """A stage and all it needs.

    Attributes:
        index: index of the stage in the recipe.
        stage: the recipe's stage.
        objective: what it computes.
        trainee: what it trains.
        stream: its text or images.
        team: the processes that share it.
        work: where checkpoints and metrics go.
        progress: whom to tell.
        trackers: what the lines of metrics are sent to, too.
    """

    index: int
    stage: TrainingStage
    objective: Objective
    trainee: Trainee
    stream: TokenStream | ImageStream
    team: Team
    work: WorkFolder
    progress: Progress
    trackers: Trackers = field(default_factory=Trackers)

    @property
    def label(self) -> str:
        """What messages call it."""
        return stage_name(self.index, self.stage)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole stage; its tokens are shared by all processes."""
        return self.stage.steps_of(self.team.size)

    def length_at(self, step: int) -> int | None:
        """Tokens of the sequences of a step, counted from 0; None for images."""
        return self.stage.length_at(step, self.num_steps)


@dataclass
class Meter:
    """Means over the steps since the last line of metrics."""

    losses: list[float] = field(default_factory=list)
    layers: list[dict[str, float]] = field(default_factory=list)
    loads: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second of training."""
        return self.tokens / max(self.seconds, 1e-9)

    def mean_loss(self) -> float:
        """Mean of the steps' losses."""
        return sum(self.losses) / len(self.losses)

    def mean_layers(self) -> dict[str, float]:
        """Mean of the steps' relative errors, by layer."""
        return {name: sum(step[name] for step in self.layers) / len(self.layers) for name in self.layers[-1]}

    def take(self, step: "StepFigures") -> None:
        """Add what a step measured."""
        self.losses.append(step.loss)
        self.layers.append(step.layers)
        self.loads = {name: load + self.loads.get(name, 0) for name, load in step.loads.items()}

    def shares(self) -> dict[str, ExpertLoad]:
        """Where the steps' tokens went, by router."""
        return {name: ExpertLoad.of(load.tolist()) for name, load in self.loads.items()}


class StepFigures(NamedTuple):
    """What an optimizer step measured, over all processes.

    Attributes:
        loss: what is minimised.
        norm: norm of the gradients before clipping.
        layers: relative errors by layer.
        loads: tokens of each expert, by router.
    """

    loss: float
    norm: float
    layers: dict[str, float]
    loads: dict[str, torch.Tensor]


def run_stage(job: StageJob, start: StageState, moments: dict[str, torch.Tensor]) -> StageState:
    """Train a stage from where it stands to its end.

    Args:
        job: the stage.
        start: where it stands: at the beginning, or where a checkpoint left it.
        moments: the optimizer's moments of that checkpoint; empty at the beginning.

    Returns:
        where the stage ended; a checkpoint of that is in the work folder.

    Raises:
        TrainingError: the loss or a gradient is not finite.
        DataError: the data cannot be read, or are too short.
        InterruptedRun: a signal asked to stop; the step that it came in is done and saved.
    """
    optimizer, parameters = _optimizer(job)
    _set_moments(optimizer, parameters, moments)
    state, meter, saved = start, Meter(), time.monotonic()
    metrics = MetricsFile(job.work.metrics)
    job.progress.begin(f"Stage {job.index + 1}: {job.stage.kind}", job.num_steps, state.step, unit_of(job.stream))
    devices = [job.team.device] if job.team.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), listening() as request:
        for data in _data(job, state):
            began = time.perf_counter()
            figures = _step(job, optimizer, data, state.step)
            seconds = time.perf_counter() - began
            tokens = job.stage.tokens_per_step * job.team.size
            if job.team.leads:
                warn_if_repeated(job.label, job.stream.section, state.position, data.end)
            state = replace(
                state,
                step=state.step + 1,
                tokens=state.tokens + tokens,
                seconds=state.seconds + seconds,
                position=data.end,
            )
            meter.take(figures)
            meter.tokens, meter.seconds = meter.tokens + tokens, meter.seconds + seconds
            job.progress.step(meter.mean_loss(), meter.tokens_per_second)
            ends = state.step == job.num_steps
            if job.team.leads and _line_is_due(job, state.step):
                record = _record(job, state, meter, optimizer.param_groups[0]["lr"], figures.norm)
                metrics.append(record)
                job.trackers.log(record)
                meter = Meter()
            stops = job.team.agree(request.signal is not None)
            if job.team.leads and (ends or stops or _save_is_due(job.stage, state.step, time.monotonic() - saved)):
                job.work.save(state, job.trainee.trained_tensors(), {} if ends else _moments(optimizer, parameters))
                saved = time.monotonic()
            if stops:
                raise InterruptedRun(f"step {state.step} of stage {job.index + 1} is saved", request.signal)
    job.trainee.own.push()
    job.progress.end()
    job.team.wait()
    return state


def single_step(job: StageJob, state: StageState) -> Callable[[], Any]:
    """An optimizer step from a state on, on its data, which can be run again and again; nothing of it is written."""
    optimizer, _ = _optimizer(job)
    data = next(_data(job, state))
    return lambda: _step(job, optimizer, data, state.step)


def _optimizer(job: StageJob) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    """The optimizer of a stage, and what it trains, which alone takes gradients from now on."""
    groups = job.objective.parameter_groups()
    parameters = {name: parameter for group in groups for name, parameter in group.parameters.items()}
    job.trainee.train_only(parameters.values())
    job.team.share_start(parameters.values())
    optimizer = torch.optim.AdamW(
        [{"params": list(group.parameters.values()), "lr": group.learning_rate} for group in groups],
        weight_decay=job.stage.weight_decay,
    )
    return optimizer, parameters


def _line_is_due(job: StageJob, step: int) -> bool:
    """Whether to write a line of metrics after some steps; each line is about sequences of one length."""
    if step == job.num_steps or step % job.stage.log_every == 0:
        return True
    return job.length_at(step - 1) != job.length_at(step)


def _save_is_due(stage: TrainingStage, step: int, seconds: float) -> bool:
    """Whether to write a checkpoint after a step, `seconds` after the one before."""
    return stage.save_every is not None and (step % stage.save_every == 0 or seconds > SECONDS_BETWEEN_CHECKPOINTS)


def learning_rate_factor(stage: TrainingStage, step: int, num_steps: int) -> float:
    """What the peak learning rate is multiplied by at a step, counted from 0.

    It rises in equal parts over the warm-up, then stays (`constant`), falls in equal parts (`linear`) or as half a
    cosine (`cosine`); the falling ones reach zero one step behind the last.
    """
    if step < stage.warmup_steps:
        return (step + 1) / (stage.warmup_steps + 1)
    passed = (step - stage.warmup_steps) / max(1, num_steps - stage.warmup_steps)
    if stage.schedule == "linear":
        return 1 - passed
    if stage.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * passed))
    return 1.0


def _data(job: StageJob, state: StageState) -> Iterator[StepData]:
    """The data of the steps that are left."""
    accumulation = job.stage.gradient_accumulation
    return stage_data(job.stage, job.stream, job.team, start=state, num_steps=job.num_steps, accumulation=accumulation)


def _step(job: StageJob, optimizer: torch.optim.Optimizer, data: StepData, step: int) -> StepFigures:
    """One optimizer step."""
    factor = learning_rate_factor(job.stage, step, job.num_steps)
    for group, settings in zip(optimizer.param_groups, job.objective.parameter_groups(), strict=True):
        group["lr"] = settings.learning_rate * factor
    # All randomness of a step comes from its number, so a resumed run draws the same dropout.
    torch.manual_seed(_seed(job.stream.section.seed, job.index, step, job.team.rank))
    count = torch.tensor(float(sum(job.objective.count(batch) for batch in data.batches)), device=job.team.device)
    job.team.add_up([count])
    figures = Figures.total([job.objective.backward(batch, max(1, int(count))) for batch in data.batches])
    gradients = _gradients(job, optimizer)
    numbers = torch.stack([figures.loss.float(), *(value.float() for value in figures.layers.values())])
    job.team.add_up([numbers, *figures.loads.values(), *gradients])
    norm = float(nn.utils.get_total_norm(gradients))
    loss, *errors = numbers.tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise _not_finite(job, step, loss, norm)
    if job.stage.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(
            _trained(optimizer), job.stage.max_grad_norm, torch.tensor(norm, device=job.team.device)
        )
    optimizer.step()
    optimizer.zero_grad()
    loads = {name: load.cpu() for name, load in figures.loads.items()}
    return StepFigures(loss, norm, dict(zip(figures.layers, errors, strict=True)), loads)


def _trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _gradients(job: StageJob, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The step's gradients in this process, the same parameters' in all processes."""
    if all(parameter.grad is None for parameter in _trained(optimizer)):
        raise TrainingError(
            f"{job.label} has nothing to learn from sequences that are no longer than the window of the new attention."
        )
    if job.team.size > 1:
        for parameter in _trained(optimizer):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return [parameter.grad for parameter in _trained(optimizer) if parameter.grad is not None]


def _not_finite(job: StageJob, step: int, loss: float, norm: float) -> TrainingError:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradients is {norm}"
    snapshot = job.work.latest() if job.work.exists() else None
    kept = "there was no checkpoint yet"
    if snapshot is not None:
        place = f"step {snapshot.state.step} of stage {snapshot.state.stage + 1}"
        kept = f"the last good checkpoint, {place}, is kept in {job.work.path}"
    return TrainingError(
        f"{job.label} stopped at step {step + 1} because {what}; {kept}; "
        "a lower learning_rate or precision: fp32 may help."
    )


def _record(job: StageJob, state: StageState, meter: Meter, learning_rate: float, norm: float) -> Record:
    return Record(
        index=job.index,
        stage=job.stage.kind,
        step=state.step,
        tokens=state.tokens,
        loss=meter.mean_loss(),
        learning_rate=learning_rate,
        grad_norm=norm,
        tokens_per_second=meter.tokens_per_second,
        unit=unit_of(job.stream),
        sequence_length=job.length_at(state.step - 1),
        layers=meter.mean_layers(),
        experts=meter.shares(),
    )


def _seed(*parts: int) -> int:
    """A number that depends on all the parts and on nothing else."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def _moments(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def _set_moments(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], moments: dict[str, torch.Tensor]
) -> None:
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[name]
        # AdamW counts steps on the CPU whatever the device of the parameter.
        optimizer.state[parameter][moment] = value.clone() if moment == "step" else value.to(parameter.device)
