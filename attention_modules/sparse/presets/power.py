"""PowerAttention: blocks at distances of powers of two."""

from pydantic import Field

from ...registry import register
from ..base import SparseAttention
from ..options import BlockOptions
from ..slots.patterns import Powers
from ..slots.slots import Slots


class PowerOptions(BlockOptions):
    """Options of `power`.

    Attributes:
        local_blocks: blocks before a token's own one that are always attended; the own one always is.
    """

    local_blocks: int = Field(4, ge=0)


@register(
    name="power",
    options=PowerOptions,
    paper="https://arxiv.org/abs/2503.03588",
    summary="a window and blocks at distances of powers of two, so that layers reach exponentially far",
)
class PowerAttention(SparseAttention):
    """A window, the first blocks, and those 1, 2, 4, 8 ... blocks back.

    Paper: https://arxiv.org/abs/2503.03588
    """

    options: PowerOptions

    def make_slots(self) -> Slots:
        return self.options.slots(selector=Powers())
