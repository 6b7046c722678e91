"""The data of a stage's steps, at the length of sequence that each of them has."""

from collections.abc import Iterator
from itertools import groupby

from ..recipes import StageBase
from .batches import StepData, step_data
from .data import TokenStream
from .images import ImageStream
from .team import Team
from .work_folder import StageState


def stage_data(
    stage: StageBase,
    stream: TokenStream | ImageStream,
    team: Team,
    *,
    start: StageState,
    num_steps: int,
    accumulation: int = 1,
) -> Iterator[StepData]:
    """The data of the steps that are left; each length begins where the one before ended.

    Args:
        stage: the recipe's stage.
        stream: its text or images.
        team: the processes that share the steps.
        start: where the stage stands.
        num_steps: steps of the whole stage.
        accumulation: micro-batches of one process in one step.
    """
    position = start.position
    for length, steps in groupby(range(start.step, num_steps), key=lambda step: stage.length_at(step, num_steps)):
        batches = step_data(
            stream.sequences(length, position),
            batch_size=stage.batch_of(length),
            accumulation=accumulation,
            team=team,
            collate=stream.collate,
        )
        for _ in steps:
            data = next(batches)
            position = data.end
            yield data
