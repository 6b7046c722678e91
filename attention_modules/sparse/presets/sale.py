"""SALE: blocks in which a product of four-bit queries and keys stands out from what sinks and neighbours get."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...registry import register
from ...state import AttentionState
from ...tokens import Call
from ..base import SparseAttention
from ..options import BlockOptions
from ..slots.canvas import Canvas
from ..slots.relative import Above, relative_scores
from ..slots.slots import Slots, queries_before


class SaleOptions(BlockOptions):
    """Options of `sale`.

    Attributes:
        local_blocks: blocks before a token's own one that are always attended; the own one always is.
        dense_len: tokens that a sequence begins with which attend to all before them.
        threshold: a block is attended if one of its products weighs so much beside all those of the first and local
            blocks together; 0 for all.
        query: whose queries choose for a block of them: those of the block before, so that a token's output hangs on
            nothing behind it and decoding chooses as prefill does; or its own, as published.
    """

    local_blocks: int = Field(2, ge=0)
    dense_len: int = Field(1024, ge=0)
    threshold: float = Field(0.004, ge=0)
    query: Literal["previous", "block"] = "previous"


@register(
    name="sale",
    options=SaleOptions,
    paper="https://arxiv.org/abs/2505.24179",
    summary="blocks in which a four-bit product stands out from those of sinks and neighbours; training-free",
)
class SaleAttention(SparseAttention):
    """Blocks with `exp(s q_i·k_j) / Σ_near exp(s q_i·k_n) ≥ threshold`, of queries and keys in four bits an entry.

    Each vector is rounded with a factor of its own. Not as published: keys are not centred on the mean of the prompt,
    which hangs on its end; one threshold serves all heads, and heads that share keys choose together. As published
    (`query: block`) it is for prompts; `decode: dense` goes with it.

    Paper: https://arxiv.org/abs/2505.24179
    """

    options: SaleOptions

    def make_slots(self) -> Slots:
        return self.options.slots(selector=Above(self.options.threshold), by=self.options.query)

    @property
    def earlier_queries(self) -> int:
        return queries_before(self.options.query, self.options.block)

    def _keep(self, call: Call, canvas: Canvas, columns: Tensor | None) -> Tensor:
        last = canvas.number - (1 if self.slots.by == "previous" else 0)
        near = self.slots.forced.of(last, canvas.num_blocks)
        queries = self._choosing(call, canvas)
        scores = relative_scores(queries, canvas.keys.detach(), last, near, scaling=call.scaling)
        return self._keep_by(scores, canvas.number, canvas.num_blocks)

    @torch.no_grad()
    def _choice_of_one(self, call: Call, state: AttentionState, count: Tensor, number: Tensor) -> Tensor:
        call = call.to(torch.promote_types(call.query.dtype, torch.float32))
        return self._keep(call, Canvas.of(call, self.slots.block), None)
