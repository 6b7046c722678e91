"""FlexPrefill: heads whose attention block means can tell choose by them, the others follow lines."""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from ...registry import register
from ...tokens import Call
from ..segments import SegmentAttention, SegmentOptions
from ..slots.canvas import Canvas
from ..slots.lines import Witnesses, covering_lines, on_lines, square_root_divergence
from ..slots.scorers import Means
from ..slots.selectors import TopMass
from ..slots.slots import By, Slots


class FlexPrefillOptions(SegmentOptions):
    """Options of `flexprefill`.

    Attributes:
        mass: γ, share of the attention that chosen blocks, columns and diagonals are thought to hold.
        divergence: τ; heads for which block means are nearer to the attention that a few queries have than this, by
            the square root of the Jensen-Shannon divergence, choose by them; 0 for none, 1 for all.
    """

    mass: float = Field(0.9, gt=0, le=1)
    divergence: float = Field(0.1, ge=0, le=1)


@register(
    name="flexprefill",
    options=FlexPrefillOptions,
    paper="https://arxiv.org/abs/2502.20766",
    summary="blocks by their means where those tell the attention, else columns and diagonals, by mass; training-free",
)
class FlexPrefillAttention(SegmentAttention):
    """`√JSD(softmax(s q̄ K̄ᵀ), Σ softmax(s q Kᵀ)) < τ` of a few queries: blocks by means; else lines that they saw.

    As published (`query: prompt`) the end of a prompt tells it for the whole, and `decode: dense` goes with it. Heads
    that share keys choose together, and each block of queries by a mass of its own.

    Paper: https://arxiv.org/abs/2502.20766
    """

    options: FlexPrefillOptions

    def make_slots(self) -> Slots:
        options = self.options
        by: By = "previous" if options.query == "refresh" else "block"
        slots = options.slots(scorer=Means(), selector=TopMass(options.mass), by=by)
        return replace(slots, dense_blocks=self.blocks_first)

    def _keep_segment(self, call: Call, canvas: Canvas, seen: Witnesses, by_blocks: Tensor | None) -> Tensor:
        assert by_blocks is not None
        options, keys = self.options, canvas.keys.detach()
        lines = seen.lines(keys, scaling=call.scaling)
        of_blocks = lines.columns.unflatten(-1, (-1, canvas.block)).sum(-1)
        guessed = seen.guess(keys, scaling=call.scaling)
        is_told = square_root_divergence(guessed, of_blocks) < options.divergence
        followed = on_lines(*covering_lines(lines, canvas.block, options.mass), canvas.number)
        return torch.where(is_told[..., None, None], by_blocks, followed)
