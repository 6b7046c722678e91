"""What is settled in closed form: some text is observed, then what follows from it is put in."""

import time
from abc import ABC, abstractmethod
from dataclasses import replace

from ..recipes.stages.calibrate import CalibrateStage
from .batches import Batch, step_data
from .data import TokenStream
from .images import ImageStream
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
    num_steps = max(1, stage.num_steps // team.size) if stage.steps is None else stage.steps
    if state.step >= num_steps:
        return state
    began = time.monotonic()
    sequences = stream.sequences(stage.sequence_length, state.position)
    steps = step_data(sequences, batch_size=stage.batch_size, accumulation=1, team=team, collate=stream.collate)
    for _ in range(num_steps):
        data = next(steps)
        for batch in data.batches:
            fit.observe(batch)
        tokens = state.tokens + stage.tokens_per_step * team.size
        state = replace(state, step=state.step + 1, tokens=tokens, position=data.end)
    fit.settle(team)
    return replace(state, seconds=state.seconds + time.monotonic() - began)
