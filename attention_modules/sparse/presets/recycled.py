"""Recycled attention: a step that attends to all now and then, and between them the tokens that it looked at most."""

from typing import ClassVar

from pydantic import Field

from ...registry import register
from ..leaders import LeaderAttention, LeaderOptions
from ..slots.scorers import Products
from ..slots.selectors import TopBlocks
from ..slots.slots import Slots


class RecycledOptions(LeaderOptions):
    """Options of `recycled`.

    Attributes:
        block: tokens of a block; 1, so that tokens are chosen one by one, as published.
        interval: tokens from one that attends to all to the next.
        budget: tokens that are chosen of those up to it; those since are attended besides.
        sink_blocks: first blocks of the sequence that are always chosen; none as published.
    """

    block: int = Field(1, ge=1)
    interval: int = Field(50, ge=1)
    budget: int = Field(1024, ge=1)
    sink_blocks: int = Field(0, ge=0)


@register(
    name="recycled",
    options=RecycledOptions,
    paper="https://arxiv.org/abs/2411.05787",
    summary="every n-th token attends to all, those until the next one to what it looked at most; training-free",
)
class RecycledAttention(LeaderAttention):
    """Between tokens `n·interval`, which attend to all: the largest of `Σ_heads softmax(s q Kᵀ)` of the last of those.

    Decoding reads the chosen tokens alone but for every n-th step; a prompt is computed under a mask, which is no
    faster than dense attention. Published with `prefill: dense`, for decoding.

    Paper: https://arxiv.org/abs/2411.05787
    """

    options: RecycledOptions
    leads_dense: ClassVar[bool] = True

    def make_slots(self) -> Slots:
        options = self.options
        chosen = TopBlocks(blocks=max(1, options.budget // options.block))
        return options.slots(scorer=Products(options.block), selector=chosen, by="token")
