"""What is settled in closed form: some text is observed, then what follows from it is put in."""

import time
from abc import ABC, abstractmethod
from dataclasses import replace

from ..recipes.stages.calibrate import CalibrateStage
from .batches import Batch
from .data import TokenStream
from .images import ImageStream
from .schedule import stage_data
from .team import Team
from .work_folder import StageState


class Fit(ABC):
    """A kind of thing that a stage `calibrate` settles on one model.

    Attributes:
        stage: the recipe's stage.
    """

    stage: CalibrateStage

    @abstractmethod
    def observe(self, batch: Batch) -> None:
        """Add what some sequences show."""

    @abstractmethod
    def settle(self, team: Team) -> None:
        """Put in what follows.

        Args:
            team: the processes that have each observed a part.
        """


def run_fit(fit: Fit, state: StageState, stream: TokenStream | ImageStream, team: Team) -> StageState:
    """Observe a stage's tokens and settle what follows from them.

    It takes seconds, so one that was interrupted begins anew.

    Args:
        fit: what to observe and settle.
        state: where the stage stands: at its beginning or at its end.
        stream: its data.
        team: the processes that share it.

    Returns:
        where it ended.
    """
    stage = fit.stage
    num_steps = stage.steps_of(team.size)
    if state.step >= num_steps:
        return state
    began = time.monotonic()
    for data in stage_data(stage, stream, team, start=state, num_steps=num_steps):
        for batch in data.batches:
            fit.observe(batch)
        tokens = state.tokens + stage.tokens_per_step * team.size
        state = replace(state, step=state.step + 1, tokens=tokens, position=data.end)
    fit.settle(team)
    return replace(state, seconds=state.seconds + time.monotonic() - began)
