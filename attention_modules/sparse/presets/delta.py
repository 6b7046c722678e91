"""DELTA and TidalDecode: a few layers look at everything and choose pages, the layers behind them read those."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...contract import Memory
from ...registry import register
from ...softmax import attend_dense, attend_dense_naive, decode_dense
from ...state import AttentionState
from ...tokens import Call
from ..base import SparseAttention
from ..options import BlockOptions
from ..slots.canvas import Canvas
from ..slots.scorers import Products
from ..slots.selectors import TopBlocks
from ..slots.slots import Slots

PAGES = "delta pages"


class DeltaOptions(BlockOptions):
    """Options of `delta`.

    Attributes:
        role: `select` attends to all tokens and hands on which pages hold most of each token's attention; `reuse`
            attends to the pages that the nearest such layer before it handed on.
        block: tokens of a page.
        budget: tokens that each token attends where pages are reused, in whole pages.
    """

    role: Literal["select", "reuse"] = "select"
    block: int = Field(16, ge=1)
    budget: int = Field(1024, ge=1)


@register(
    name="delta",
    options=DeltaOptions,
    paper="https://arxiv.org/abs/2510.09883",
    summary="a few layers attend to all and choose pages by what they saw, the layers behind them read those alone",
)
class DeltaAttention(SparseAttention):
    """Pages chosen by true attention in one layer, for itself and those behind it.

    What is chosen goes from layer to layer on the board of a forward pass and is gone with it, so that each token
    chooses anew. TidalDecode (https://arxiv.org/abs/2410.05076) is the same with one layer that chooses again in the
    middle.

    Paper: https://arxiv.org/abs/2510.09883
    """

    reads_board = True
    options: DeltaOptions

    def make_slots(self) -> Slots:
        options = self.options
        pages = TopBlocks(blocks=max(1, options.budget // options.block))
        return options.slots(scorer=Products(options.block), selector=pages, by="token")

    @property
    def selects(self) -> bool:
        """Whether the layer attends to all tokens and chooses."""
        return self.options.role == "select"

    @property
    def chooser(self) -> "DeltaAttention | None":
        """One that selects, for a layer that reuses."""
        if self.selects:
            return None
        return DeltaAttention(self.geometry, self.options.model_copy(update={"role": "select"}), self.implementation)

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        """All of them where pages are selected, those of the pages where they are reused."""
        return rank if self.selects else super().tokens_attended(rank, total)

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        if not self.selects:
            return super().attend_naive(call, memory)
        self._hand_on(call)
        return attend_dense_naive(call, causal=True)

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        if not self.selects:
            return super().attend_torch(call, memory)
        self._hand_on(call)
        return attend_dense(call, causal=True)

    def decode_torch(self, call: Call, state: AttentionState) -> Tensor:
        if not self.selects:
            return super().decode_torch(call, state)
        call = call.over(call.query, state.append(call.tokens))
        self._hand_on(call.over(call.query.to(torch.promote_types(call.query.dtype, torch.float32)), call.tokens))
        return decode_dense(call)

    @torch.no_grad()
    def _hand_on(self, call: Call) -> None:
        """Choose, and write it on the board."""
        self._note_all(call)
        if self._is_dense(call):
            return
        canvas = Canvas.of(call.to(call.query.dtype), self.slots.block)
        assert call.board is not None
        call.board[PAGES] = super()._keep(call, canvas, self._columns(call, canvas))

    def _keep(self, call: Call, canvas: Canvas, columns: Tensor | None) -> Tensor:
        return self._handed_on(call, canvas.num_blocks)

    def _columns(self, call: Call, canvas: Canvas) -> Tensor | None:
        return super()._columns(call, canvas) if self.selects else None

    def _choice_of_one(self, call: Call, state: AttentionState, count: Tensor, number: Tensor) -> Tensor:
        return self._handed_on(call, -(-call.tokens.length // self.slots.block))

    def _handed_on(self, call: Call, num_blocks: int) -> Tensor:
        """What the nearest selecting layer chose.

        Raises:
            ValueError: there is none, or its pages or heads are others.
        """
        assert call.board is not None
        wanted = len(call.query), self.geometry.num_kv_heads, call.length, num_blocks
        keep = call.board.get(PAGES)
        if keep is None:
            raise ValueError("no layer before this one chose pages: give an earlier one `role: select`")
        if tuple(keep.shape) != wanted:
            raise ValueError(
                f"the layer that chose pages has others than this one: {tuple(keep.shape)} instead of {wanted} rows, "
                "KV heads, tokens and pages; `block` must be the same in both"
            )
        return keep
