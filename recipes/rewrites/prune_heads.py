"""Heads left out of every layer."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ..data import CalibrateSection
from ..fields import Count, CountOrZero, exactly_one
from .base import REWRITES, RewriteBase

if TYPE_CHECKING:
    from ...convert.rewriting.steps import Step


@REWRITES.register
class PruneHeadsRewrite(RewriteBase):
    """Leave heads out of every layer, those that matter least or those that are named.

    Attributes:
        unit: `kv` leaves out key/value heads, with the query heads that share them; `query` leaves out query heads,
            equally many of each key/value head's, which shrinks the work and not the cache.
        keep: how many stay in each layer, those that matter most; this or `remove`.
        by: which these are: `contribution`, those that add most to the hidden states, or `usage`, those that are the
            first choice of the most tokens, as head experts are.
        remove: which are left out, counted from 0: one list for all layers, or a list of lists, one for each layer.
        calibrate: the text that `keep` measures them on.
    """

    kind: Literal["prune_heads"] = "prune_heads"
    unit: Literal["kv", "query"] = "kv"
    keep: Count | None = None
    by: Literal["contribution", "usage"] = "contribution"
    remove: list[CountOrZero] | list[list[CountOrZero]] = Field(default_factory=list)
    calibrate: CalibrateSection | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        exactly_one({"keep": self.keep is not None, "remove": bool(self.remove)})
        if self.keep is not None and self.calibrate is None:
            raise ValueError("keep chooses heads by what they do on a text: give calibrate, or say which to remove")
        if self.keep is None and self.calibrate is not None:
            raise ValueError("calibrate has no effect beside remove: leave it out")
        return self

    @property
    def calibration(self) -> CalibrateSection | None:
        return self.calibrate

    def step(self) -> "Step":
        from ...convert.rewriting.selection import PruneHeads

        return PruneHeads(unit=self.unit, keep=self.keep, remove=self.remove, by=self.by)
