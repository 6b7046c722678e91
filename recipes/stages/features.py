"""Feature distillation, for models without a language-model head: all layers learn together."""

from typing import TYPE_CHECKING, Literal

from .base import STAGES, StageBase

if TYPE_CHECKING:
    from ...distill.objective import Objective
    from ...distill.trainee import Trainee


@STAGES.register
class FeaturesStage(StageBase):
    """Train the new attention of all layers together on the distance of the model's features from the teacher's."""

    kind: Literal["features"] = "features"

    def objective(self, trainee: "Trainee", adapter: str | None) -> "Objective":
        from ...distill.features import FeatureDistillation

        return FeatureDistillation(trainee, self)
