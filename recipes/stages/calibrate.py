"""Calibration: what a method needs to know of the model is observed, then settled in closed form."""

from typing import TYPE_CHECKING, ClassVar, Literal

from ..fields import Positive
from .base import STAGES, StageBase

if TYPE_CHECKING:
    from ...distill.routers import RouterFit
    from ...distill.trainee import Trainee


@STAGES.register
class CalibrateStage(StageBase):
    """Observe what each head contributes: routers of `moh` are fitted to it by ridge regression, `shrp` counts usage.

    Attributes:
        ridge: weight of the penalty on the routers' size, in mean squares of the inputs.
    """

    needs_attention: ClassVar[bool] = True
    kind: Literal["calibrate"] = "calibrate"
    ridge: Positive = 0.1

    def objective(self, trainee: "Trainee", adapter: str | None) -> "RouterFit":
        from ...distill.routers import RouterFit

        return RouterFit(trainee, self)
