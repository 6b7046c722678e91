"""InfLLM-V2: dense up to a length, behind it blocks by overlapping means of their keys."""

from typing import Any

from pydantic import Field

from ...geometry import Geometry
from ...registry import register
from ..base import SparseAttention
from ..options import BlockOptions
from ..slots.scorers import OverlappingMeans
from ..slots.selectors import TopBlocks
from ..slots.slots import By, Slots


class InfLlm2Options(BlockOptions):
    """Options of `infllm2`.

    Attributes:
        local_blocks: blocks before a token's own one that are always attended; the own one always is.
        dense_len: tokens that a sequence begins with which attend to all before them.
        blocks: how many blocks are attended besides the first and the local ones.
        kernel: tokens of a mean.
        stride: tokens from one mean to the next; divides `block`.
        query: whose queries choose: each token for itself, as published, or those of the block before for all of a
            block, with which prompts are computed by blocks.
    """

    local_blocks: int = Field(32, ge=0)
    dense_len: int = Field(8192, ge=0)
    blocks: int = Field(64, ge=1)
    kernel: int = Field(32, ge=1)
    stride: int = Field(16, ge=1)
    query: By = "token"


@register(
    name="infllm2",
    options=InfLlm2Options,
    paper="https://arxiv.org/abs/2509.24663",
    summary="dense up to a length; behind it the first blocks, a window and blocks by overlapping means of their keys",
)
class InfLlm2Attention(SparseAttention):
    """A block counts for as much as the best of the overlapping means inside it.

    Means that reach from one block into the next are left out, so that a block is scored by its own keys.

    Paper: https://arxiv.org/abs/2509.24663
    """

    options: InfLlm2Options

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Means must lie inside blocks."""
        if options.kernel > options.block or options.block % options.stride:
            return (
                f"kernel={options.kernel} and stride={options.stride} do not fit block={options.block}: a mean lies "
                "inside a block, and strides fill it"
            )
        return super().why_unsupported(geometry, options)

    def make_slots(self) -> Slots:
        options = self.options
        scorer = OverlappingMeans(block=options.block, kernel=options.kernel, stride=options.stride)
        chosen = TopBlocks(blocks=options.blocks + options.sink_blocks + options.local_blocks + 1)
        return options.slots(scorer=scorer, selector=chosen, by=options.query)
