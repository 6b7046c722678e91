"""Key/value heads repeated, so that fewer query heads share one, or none."""

from typing import TYPE_CHECKING, Literal

from ..fields import Count
from .base import REWRITES, RewriteBase

if TYPE_CHECKING:
    from ...convert.rewriting.steps import Step


@REWRITES.register
class DegroupRewrite(RewriteBase):
    """Repeat the key/value heads of a model whose query heads share them; it computes what it did before.

    Attributes:
        kv_heads: how many key/value heads there shall be; null = one for each query head.
    """

    kind: Literal["degroup"] = "degroup"
    kv_heads: Count | None = None

    def step(self) -> "Step":
        from ...convert.rewriting.selection import Degroup

        return Degroup(self.kv_heads)
