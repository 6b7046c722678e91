"""Calibration: what a method needs to know of the model is observed, then settled in closed form."""

from typing import TYPE_CHECKING, ClassVar, Literal

from ..fields import Positive
from .base import STAGES, StageBase

if TYPE_CHECKING:
    from ...distill.fit import Fit
    from ...distill.trainee import Trainee


@STAGES.register
class CalibrateStage(StageBase):
    """Observe what a method wants to know: what heads contribute (`moh`, `shrp`), or queries and keys (`dsa`).

    Routers of `moh` are fitted by ridge regression, `shrp` counts usage, an index of `dsa` follows from second moments.

    Attributes:
        ridge: weight of the penalty on the routers' size, in mean squares of the inputs; of an index what is added to
            the mean squares of queries and keys, as a part of them.
    """

    needs_attention: ClassVar[bool] = True
    kind: Literal["calibrate"] = "calibrate"
    ridge: Positive = 0.1

    def objective(self, trainee: "Trainee", adapter: str | None) -> "Fit":
        from ...distill.index_fit import IndexFit, indexed_layers
        from ...distill.routers import RouterFit

        return IndexFit(trainee, self) if indexed_layers(trainee) else RouterFit(trainee, self)
