"""Fewer key/value heads, each standing for several."""

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator
from typing_extensions import Self

from ..data import CalibrateSection
from ..fields import Count
from .base import REWRITES, RewriteBase

if TYPE_CHECKING:
    from ...convert.rewriting.steps import Step


@REWRITES.register
class PoolHeadsRewrite(RewriteBase):
    """Make one key/value head of several neighbouring ones, so that the cache shrinks as their number does.

    Attributes:
        kv_heads: how many key/value heads each layer shall have; a divisor of how many it has.
        how: `pca` keeps most of all heads, by principal components of keys and values; `mean` and `select`, the mean
            and the head that matters most, are much worse and there to compare with.
        calibrate: the text on which keys and values are measured; `mean` needs none.
    """

    kind: Literal["pool_heads"] = "pool_heads"
    kv_heads: Count
    how: Literal["pca", "mean", "select"] = "pca"
    calibrate: CalibrateSection | None = None

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if self.calibrate is None and self.how != "mean":
            raise ValueError(f"{self.how} goes by what keys and values are like on a text: give calibrate")
        if self.calibrate is not None and self.how == "mean":
            raise ValueError("calibrate has no effect beside how: mean: leave it out")
        return self

    @property
    def calibration(self) -> CalibrateSection | None:
        return self.calibrate

    def step(self) -> "Step":
        from ...convert.rewriting.pooling import PoolHeads

        return PoolHeads(kv_heads=self.kv_heads, how=self.how)
