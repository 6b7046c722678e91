"""SnapKV: what the newest queries look at most decides what the next tokens attend."""

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...geometry import Geometry
from ...registry import register
from ...tokens import Call
from ..leaders import LeaderAttention, LeaderOptions
from ..slots.canvas import Canvas
from ..slots.lines import Witnesses
from ..slots.scorers import Products
from ..slots.selectors import Forced, TopBlocks
from ..slots.slots import Slots


class SnapOptions(LeaderOptions):
    """Options of `snap`.

    Attributes:
        block: tokens of a block; 1, so that tokens are chosen one by one, as published.
        interval: tokens from one choice to the next.
        window: newest tokens whose queries choose; they are attended themselves.
        budget: tokens that are attended, the window included; those since the choice besides.
        kernel: tokens over which shares are pooled, so that neighbours of a strong token are chosen with it; odd.
        pooling: how.
        sink_blocks: first blocks of the sequence that are always attended; none as published.
        local_blocks: blocks before the choosing token's own one that are always attended, if more than the window.
    """

    block: int = Field(1, ge=1)
    interval: int = Field(32, ge=1)
    window: int = Field(32, ge=1)
    budget: int = Field(1024, ge=1)
    kernel: int = Field(5, ge=1)
    pooling: Literal["mean", "max"] = "mean"
    sink_blocks: int = Field(0, ge=0)


@register(
    name="snap",
    options=SnapOptions,
    paper="https://arxiv.org/abs/2404.14469",
    summary="tokens that the last few queries look at most, and their neighbours, chosen every so often; training-free",
)
class SnapAttention(LeaderAttention):
    """The largest of `pool(Σ_window softmax(s q Kᵀ))` before a window of queries, for the tokens until the next choice.

    As published the end of the prompt chooses once for all tokens behind it, and the others are dropped. Here a choice
    is made every `interval` tokens out of all, so that prompts, chunks and decoding agree, and the end of a prompt has
    its say that soon. Published with `prefill: dense`, for decoding.

    Paper: https://arxiv.org/abs/2404.14469
    """

    options: SnapOptions

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """There must be a middle of what is pooled, and something to choose."""
        if options.kernel % 2 == 0:
            return f"kernel={options.kernel} must be odd, so that a token stands in the middle of what is pooled"
        if options.budget <= options.window:
            return f"budget={options.budget} leaves nothing to choose beside window={options.window}"
        return super().why_unsupported(geometry, options)

    @property
    def earlier_queries(self) -> int:
        return super().earlier_queries + self.options.window - 1

    def make_slots(self) -> Slots:
        options = self.options
        chosen = TopBlocks(blocks=max(1, options.budget // options.block))
        slots = options.slots(scorer=Products(options.block), selector=chosen, by="token")
        local = max(options.local_blocks, -(-(options.window - 1) // options.block))
        return replace(slots, forced=Forced(options.sink_blocks, local))

    def _shares(self, leader: Tensor, call: Call, canvas: Canvas, columns: Tensor) -> Tensor:
        queries = call.query if call.queries is None else call.queries.to(call.query.dtype)
        shares = [self._shares_of(at, queries.detach(), canvas, call.scaling) for at in leader.unbind(1)]
        return torch.stack(shares, 2)

    def _shares_of(self, leader: Tensor, queries: Tensor, canvas: Canvas, scaling: float) -> Tensor:
        """What windows that end with the tokens at `[B]` think that each block holds, `[B, KV, N]`."""
        options = self.options
        window = Witnesses.before(leader + 1, queries, canvas, number=options.window)
        seen = window.lines(canvas.keys.detach(), scaling=scaling).columns
        place = torch.arange(seen.shape[-1], device=seen.device)
        # Neighbours of the window are not chosen for its own sake.
        seen = seen.masked_fill((place > (leader - options.window)[:, None])[:, None], 0.0)
        pool = F.avg_pool1d if options.pooling == "mean" else F.max_pool1d
        pooled = pool(seen, options.kernel, 1, options.kernel // 2)
        shares: Tensor = pooled.unflatten(-1, (-1, options.block)).mean(-1)
        return shares
