"""Sharded strides: each head sees its own window and every so manieth block, all heads together see all."""

from pydantic import Field

from ...registry import register
from ..base import SparseAttention
from ..options import BlockOptions
from ..slots.patterns import Strided
from ..slots.slots import Slots


class StridedOptions(BlockOptions):
    """Options of `strided`.

    Attributes:
        local_blocks: blocks before a token's own one that are always attended; the own one always is.
        stride: every so manieth block farther back is attended.
        sharded: whether each KV head begins at another block, so that heads together see all of the text.
    """

    local_blocks: int = Field(8, ge=0)
    stride: int = Field(4, ge=1)
    sharded: bool = True


@register(
    name="strided",
    options=StridedOptions,
    paper="https://arxiv.org/abs/2407.17678",
    summary="a window and every so manieth block before it, other ones in each head; a fixed pattern",
)
class StridedAttention(SparseAttention):
    """A window, and blocks at a stride that heads share among themselves.

    Paper: https://arxiv.org/abs/2407.17678
    """

    options: StridedOptions

    def make_slots(self) -> Slots:
        return self.options.slots(selector=Strided(self.options.stride, self.options.sharded))
