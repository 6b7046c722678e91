"""Gates and indexes of sparse attention: fitted to where the model itself looks, with everything else frozen."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from .base import STAGES, TrainingStage

if TYPE_CHECKING:
    from ...distill.objective import Objective
    from ...distill.trainee import Trainee


@STAGES.register
class GateStage(TrainingStage):
    """Train what chooses blocks or tokens, layer by layer, on the divergence from the model's own attention.

    Attributes:
        pooling: how a block's attention is summed up: `max` takes its largest weight, `mass` the sum of its weights.
        queries: fraction of the queries that are learned from, in (0, 1]; those of each step are drawn anew.
    """

    needs_attention: ClassVar[bool] = True
    kind: Literal["gate"] = "gate"
    pooling: Literal["max", "mass"] = "max"
    queries: Annotated[float, Field(gt=0, le=1)] = 1.0

    def objective(self, trainee: "Trainee", adapter: str | None) -> "Objective":
        from ...distill.choices import ChoiceTraining

        return ChoiceTraining(trainee, self)
