"""BigBird for layers that run from left to right: a window, first blocks, and blocks by chance."""

from pydantic import Field

from ...registry import register
from ..base import SparseAttention
from ..options import BlockOptions
from ..slots.patterns import Scattered
from ..slots.slots import Slots


class BigBirdOptions(BlockOptions):
    """Options of `bigbird`.

    Attributes:
        local_blocks: blocks before a token's own one that are always attended; the own one always is.
        random_blocks: blocks by chance for each block of queries and KV head.
        seed: of the chance.
    """

    local_blocks: int = Field(4, ge=0)
    random_blocks: int = Field(3, ge=0)
    seed: int = Field(0, ge=0)


@register(
    name="bigbird",
    options=BigBirdOptions,
    paper="https://arxiv.org/abs/2007.14062",
    summary="a window, the first blocks and blocks by chance; a fixed pattern",
)
class BigBirdAttention(SparseAttention):
    """A window, global blocks and random ones; of the global tokens the row's first, which all later ones see.

    Paper: https://arxiv.org/abs/2007.14062
    """

    options: BigBirdOptions

    def make_slots(self) -> Slots:
        return self.options.slots(selector=Scattered(self.options.random_blocks, self.options.seed))
