"""One real step of each stage, timed before anything is healed; nothing is written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluate.bench.clock import Reading, Stopwatch
from ..recipes import StageBase, TrainingStage
from .fit import Fit
from .healing import DTYPES, in_precision, load_converted, open_trained
from .objective import Objective
from .run import Run
from .schedule import stage_data
from .trainee import Trainee
from .training import StageJob, single_step
from .work_folder import StageState

# The first step pays for what later ones find ready; of long steps one is enough.
LONG_SECONDS = 2.0
MOST_STEPS = 3


@dataclass(frozen=True)
class ProbedStep:
    """What steps of a stage took at one length of sequence.

    Attributes:
        stage: index of the stage in the recipe.
        length: tokens of the sequences; None for images.
        seconds: of the fastest.
        peak_bytes: highest memory above model, adapters and teacher; None if nobody counts it.
        trained: numbers that the stage trains.
    """

    stage: int
    length: int | None
    seconds: float
    peak_bytes: int | None
    trained: int


def probe_steps(run: Run) -> Iterator[ProbedStep]:
    """Load the model, convert it in memory, and run a step of each stage at each of its lengths on the stage's data.

    Args:
        run: a run that was not begun; its work folder is not made.

    Raises:
        TrainingError: a stage cannot be run on this model.
        DataError: the data of a stage cannot be read.
    """
    trainee = load_converted(run, DTYPES[run.recipe.stages[0].precision])
    watch = Stopwatch(run.team.device)
    for index, stage in enumerate(run.recipe.stages):
        trainee = in_precision(run, trainee, index)
        open_trained(run, trainee, index + 1)
        for length in dict.fromkeys(stage.lengths or (None,)):
            with torch.random.fork_rng():
                action, trained = _prepared(run, trainee, index, stage, length)
                seconds, peak = _fastest(watch, action)
            yield ProbedStep(index, length, seconds, peak, trained)


def _fastest(watch: Stopwatch, action: Callable[[], Any]) -> tuple[float, int | None]:
    readings: list[Reading] = []
    while len(readings) < MOST_STEPS and sum(reading.seconds for reading in readings) < LONG_SECONDS:
        readings.append(watch.read(action))
    peaks = [reading.peak_bytes for reading in readings if reading.peak_bytes is not None]
    return min(reading.seconds for reading in readings), max(peaks, default=None)


def _prepared(
    run: Run, trainee: Trainee, index: int, stage: StageBase, length: int | None
) -> tuple[Callable[[], Any], int]:
    """A step that can be run by itself, and how many numbers it trains."""
    objective = stage.objective(trainee, None if stage.adapter is None else trainee.adapters[-1])
    stream, num_steps = run.stream(stage), stage.steps_of(run.team.size)
    number = next(step for step in range(num_steps) if stage.length_at(step, num_steps) == length)
    start = StageState(index, step=number)
    if isinstance(stage, TrainingStage) and isinstance(objective, Objective):
        groups = objective.parameter_groups()
        trained = sum(parameter.numel() for group in groups for parameter in group.parameters.values())
        job = StageJob(index, stage, objective, trainee, stream, run.team, run.work, run.progress)
        return single_step(job, start), trained
    assert isinstance(objective, Fit)
    data = next(stage_data(stage, stream, run.team, start=start, num_steps=num_steps))
    return lambda: [objective.observe(batch) for batch in data.batches], 0
