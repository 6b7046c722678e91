"""MoBA: each token chooses blocks by the mean of their keys."""

from pydantic import Field

from ...registry import register
from ..base import SparseAttention
from ..options import BlockOptions
from ..slots.scorers import Means
from ..slots.selectors import TopBlocks
from ..slots.slots import Slots


class MobaOptions(BlockOptions):
    """Options of `moba`.

    Attributes:
        block: tokens of a block.
        top_k: blocks that each token attends, its own included.
        sink_blocks: first blocks of the sequence that are always attended; none as published.
    """

    block: int = Field(512, ge=1)
    top_k: int = Field(3, ge=1)
    sink_blocks: int = Field(0, ge=0)


@register(
    name="moba",
    options=MobaOptions,
    paper="https://arxiv.org/abs/2502.13189",
    summary="each token chooses a few large blocks by the mean of their keys, as experts are chosen",
)
class MobaAttention(SparseAttention):
    """The own block and those whose mean keys are nearest to the query.

    Heads that share keys choose together, by the sum of their votes, so that a block is read once.

    Paper: https://arxiv.org/abs/2502.13189
    """

    options: MobaOptions

    def make_slots(self) -> Slots:
        return self.options.slots(scorer=Means(), selector=TopBlocks(blocks=self.options.top_k), by="token")
