"""LServe's pages: scored by the boxes around parts of them, chosen every few tokens."""

from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch import Tensor

from ...geometry import Geometry
from ...registry import register
from ..leaders import LeaderAttention, LeaderOptions
from ..slots.scorers import Boxes
from ..slots.selectors import TopBlocks
from ..slots.slots import Slots


class LServeOptions(LeaderOptions):
    """Options of `lserve`.

    Attributes:
        block: tokens of a page, which is read whole.
        part: tokens of the parts whose boxes stand for a page; divides `block`.
        interval: tokens that share a choice, which the first of them makes; divides `block`.
        budget: tokens that each token attends, in whole pages.
    """

    part: int = Field(16, ge=1)
    budget: int = Field(4096, ge=1)


@dataclass(frozen=True)
class BoxesOfParts(Boxes):
    """The boxes around the parts of a block, of which the one with the largest bound stands for it.

    Attributes:
        columns: how many parts.
    """

    columns: int = 4
    takes_largest: bool = True

    def of_keys(self, blocks: Tensor) -> Tensor:
        parts: Tensor = super().of_keys(blocks.unflatten(-2, (self.columns, -1))).squeeze(-2)
        return parts


@register(
    name="lserve",
    options=LServeOptions,
    paper="https://arxiv.org/abs/2502.14866",
    summary="large pages by the boxes around parts of them, chosen every few tokens; beside heads that stream",
)
class LServeAttention(LeaderAttention):
    """Pages by `max_parts Σ_d max(q_d hi_d, q_d lo_d)`, the choice of one token for the next few.

    This is what LServe's retrieval heads do; its streaming heads are rules for heads with `sliding_window`, and drop
    what they do not look at. Published with `prefill: dense` for the heads that retrieve.

    Paper: https://arxiv.org/abs/2502.14866
    """

    options: LServeOptions

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Parts must fill pages."""
        if options.block % options.part:
            return f"part={options.part} does not divide block={options.block}"
        return super().why_unsupported(geometry, options)

    def make_slots(self) -> Slots:
        options = self.options
        scorer = BoxesOfParts(columns=options.block // options.part)
        pages = TopBlocks(blocks=max(1, options.budget // options.block))
        return options.slots(scorer=scorer, selector=pages, by="token")
