"""The attention of each layer copied, for a gate to mix the copies."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ..fields import Count
from .base import REWRITES, RewriteBase

if TYPE_CHECKING:
    from ...convert.rewriting.steps import Step


@REWRITES.register
class WidenRewrite(RewriteBase):
    """Put several copies of each layer's attention side by side, as heads of one; the method `moa` then mixes them.

    Attributes:
        num_experts: how many.
        share_kv: whether they share one set of keys and values, so that the cache stays as it is; otherwise it grows
            with their number.
    """

    needs_method: ClassVar[str | None] = "moa"
    kind: Literal["widen"] = "widen"
    num_experts: Annotated[Count, Field(ge=2)] = 2
    share_kv: bool = False

    def step(self) -> "Step":
        from ...convert.rewriting.widen import Widen

        return Widen(num_experts=self.num_experts, share_kv=self.share_kv)
