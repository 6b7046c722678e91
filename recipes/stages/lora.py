"""Low-rank updates of the model's own weights on the next-token loss."""

from typing import TYPE_CHECKING, Literal

from .base import STAGES, CoreTraining, LoraPart, NextTokenStage

if TYPE_CHECKING:
    from ...distill.objective import Objective
    from ...distill.trainee import Trainee


@STAGES.register
class LoraStage(CoreTraining, LoraPart, NextTokenStage):
    """Train low-rank updates on the next-token loss."""

    kind: Literal["lora"] = "lora"

    @property
    def adapter(self) -> LoraPart:
        return self

    def objective(self, trainee: "Trainee", adapter: str | None) -> "Objective":
        from ...distill.lora import LoraTuning

        return LoraTuning(trainee, self, str(adapter))
