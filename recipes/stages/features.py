"""Feature distillation, for models without a language-model head: all layers learn together."""

from typing import TYPE_CHECKING, ClassVar, Literal

from ..fields import NotNegative
from .base import STAGES, TrainingStage

if TYPE_CHECKING:
    from ...distill.objective import Objective
    from ...distill.trainee import Trainee


@STAGES.register
class FeaturesStage(TrainingStage):
    """Train the new attention of all layers together on the distance of the model's features from the teacher's.

    Attributes:
        balance: weight of the balance loss of methods that route tokens to heads.
    """

    needs_attention: ClassVar[bool] = True
    has_teacher: ClassVar[bool] = True
    kind: Literal["features"] = "features"
    balance: NotNegative = 0.0

    def objective(self, trainee: "Trainee", adapter: str | None) -> "Objective":
        from ...distill.features import FeatureDistillation

        return FeatureDistillation(trainee, self)
