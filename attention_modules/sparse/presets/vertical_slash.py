"""MInference's vertical and slash lines: a few queries are looked at in full, others see the lines that those saw."""

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from ...registry import register
from ...tokens import Call
from ..segments import SegmentAttention, SegmentOptions
from ..slots.canvas import Canvas
from ..slots.lines import StrongestLines, Witnesses, on_lines
from ..slots.slots import Slots


class VerticalSlashOptions(SegmentOptions):
    """Options of `vertical_slash`.

    Attributes:
        columns: blocks that are attended for the strongest columns in them.
        diagonals: blocks of distances that are attended for the strongest diagonals in them; each lies in two blocks of
            keys.
        local_blocks: blocks before a token's own one that are always attended; the own one always is.
    """

    columns: int = Field(8, ge=0)
    diagonals: int = Field(4, ge=0)
    local_blocks: int = Field(1, ge=0)


@register(
    name="vertical_slash",
    options=VerticalSlashOptions,
    paper="https://arxiv.org/abs/2407.02490",
    summary="columns and diagonals of the attention map, as the last queries before see them; training-free",
)
class VerticalSlashAttention(SegmentAttention):
    """`A = softmax(s q Kᵀ)` of a block of queries; the largest of `Σ_i A_ic` are columns, of `Σ_i A_i,i-d` diagonals.

    As published (`query: prompt`) the end of a prompt tells it for the whole, and `decode: dense` goes with it.

    Paper: https://arxiv.org/abs/2407.02490
    """

    options: VerticalSlashOptions

    @property
    def strongest(self) -> StrongestLines:
        """What chooses."""
        return StrongestLines(self.options.columns, self.options.diagonals)

    def make_slots(self) -> Slots:
        return replace(self.options.slots(selector=self.strongest), dense_blocks=self.blocks_first)

    def _keep_segment(self, call: Call, canvas: Canvas, seen: Witnesses, by_blocks: Tensor | None) -> Tensor:
        lines = seen.lines(canvas.keys.detach(), scaling=call.scaling)
        return on_lines(*self.strongest.choose(lines, canvas.block), canvas.number)
