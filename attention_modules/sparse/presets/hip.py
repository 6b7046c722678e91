"""HiP: blocks found by halving stretches of keys, in as many steps as the logarithm of their number."""

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
from ..slots.selectors import TopBlocks
from ..slots.slots import Slots, queries_before
from ..slots.tree import tree_shares


class HipOptions(BlockOptions):
    """Options of `hip`.

    Attributes:
        block: tokens of a block.
        blocks: stretches of keys that go on at each halving, and blocks that are attended in the end, forced ones
            included.
        query: whose queries choose for a block of them: those of the block before, so that a token's output hangs on
            nothing behind it and decoding chooses as prefill does; or its own, as published.
    """

    block: int = Field(32, ge=1)
    blocks: int = Field(16, ge=1)
    query: Literal["previous", "block"] = "previous"


@register(
    name="hip",
    options=HipOptions,
    paper="https://arxiv.org/abs/2406.09827",
    summary="blocks found by halving stretches of keys, one token of each looked at; training-free",
)
class HipAttention(SparseAttention):
    """The best `blocks` halves of stretches go on by `max_i s q_i·k_middle`, until they are single blocks.

    Of N blocks `2 · blocks · log2(N / blocks)` keys are looked at for a block of queries. As published (`query: block`)
    it is for prompts; `decode: dense` goes with it.

    Paper: https://arxiv.org/abs/2406.09827
    """

    options: HipOptions

    def make_slots(self) -> Slots:
        return self.options.slots(selector=TopBlocks(blocks=self.options.blocks), by=self.options.query)

    @property
    def earlier_queries(self) -> int:
        return queries_before(self.options.query, self.options.block)

    def _keep(self, call: Call, canvas: Canvas, columns: Tensor | None) -> Tensor:
        queries, keys = self._choosing(call, canvas), canvas.keys.detach()
        shares = tree_shares(queries, keys, canvas.number, kept=self.options.blocks, scaling=call.scaling)
        return self._keep_by(shares, canvas.number, canvas.num_blocks)

    @torch.no_grad()
    def _choice_of_one(self, call: Call, state: AttentionState, count: Tensor, number: Tensor) -> Tensor:
        call = call.to(torch.promote_types(call.query.dtype, torch.float32))
        return self._keep(call, Canvas.of(call, self.slots.block), None)
