"""TokenSelect: all heads of a layer vote for tokens, and like queries keep what was chosen."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...geometry import Geometry
from ...padding import take_tokens
from ...registry import register
from ...tokens import Call
from ..base import SparseAttention
from ..leaders import LeaderAttention, LeaderOptions
from ..slots.scorers import Products
from ..slots.selectors import TopBlocks
from ..slots.slots import Slots


class TokenSelectOptions(LeaderOptions):
    """Options of `token_select`.

    Attributes:
        block: tokens of a block; 1, so that tokens are chosen one by one, as published.
        budget: tokens that each token attends, the first and the newest ones included; those since the choice besides.
        similarity: cosine of a token's queries, of all heads as one vector, with those of the token that chose last,
            from which on what that one chose is kept; 1 for tokens that choose anew each.
        interval: tokens of which the first chooses in any case, counted from each row's first real token.
        sink_blocks: first blocks of the sequence that are always attended.
        local_blocks: blocks before a token's own one that are always attended; the own one always is.
    """

    block: int = Field(1, ge=1)
    budget: int = Field(2048, ge=1)
    similarity: float = Field(0.9, gt=-1, le=1)
    interval: int = Field(16, ge=1)
    sink_blocks: int = Field(128, ge=0)
    local_blocks: int = Field(512, ge=0)


@register(
    name="token_select",
    options=TokenSelectOptions,
    paper="https://arxiv.org/abs/2411.02886",
    summary="tokens chosen by a vote of all heads of a layer, kept while queries stay alike; training-free",
)
class TokenSelectAttention(LeaderAttention):
    """The largest of `Σ_heads softmax(s q Kᵀ)` over all heads of the layer, of the last token unlike the one before it.

    Decoding reads the chosen tokens alone; a prompt is computed under a mask, in which each token counts by itself
    where the published form takes the mean query of a chunk. Choices go no further than `interval` tokens, so that few
    queries have to be kept.

    Paper: https://arxiv.org/abs/2411.02886
    """

    options: TokenSelectOptions

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """There must be something to choose."""
        forced = (options.sink_blocks + options.local_blocks + 1) * options.block
        if options.budget < forced:
            return f"budget={options.budget} is less than the {forced} tokens that are always attended"
        return super().why_unsupported(geometry, options)

    def make_slots(self) -> Slots:
        options = self.options
        chosen = TopBlocks(blocks=max(1, options.budget // options.block))
        return options.slots(scorer=Products(options.block), selector=chosen, by="token")

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        """As many as where no two queries are alike."""
        return SparseAttention.tokens_attended(self, rank, total)

    def _keep_by(self, shares: Tensor | None, number: Tensor, num_blocks: int) -> Tensor:
        assert shares is not None
        keep = super()._keep_by(shares.mean(1, keepdim=True), number, num_blocks)
        return keep.expand_as(shares)

    def _leaders(self, call: Call, position: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        interval = self.options.interval
        first = position[:, :1] // interval * interval
        # Whole intervals, as many as a row can touch.
        intervals = (call.length - 2) // interval + 2
        at = first + torch.arange(intervals * interval, device=position.device)
        at = torch.minimum(at, (count[:, None] - 1).clamp_min(0))
        led_by = first_alike(self._unit_queries(at, call, count), interval, self.options.similarity)
        return at, led_by.gather(1, position - first)

    def _unit_queries(self, at: Tensor, call: Call, count: Tensor) -> Tensor:
        """`[B, R, heads * D]` queries of all heads at positions `[B, R]`, of length 1."""
        queries = (call.query if call.queries is None else call.queries).detach()
        held = queries.shape[2]
        taken = take_tokens(queries, (at + (held - count)[:, None]).clamp(0, held - 1))
        wide = taken.to(torch.promote_types(taken.dtype, torch.float32))
        return F.normalize(wide.transpose(1, 2).flatten(2), dim=-1)


def first_alike(vectors: Tensor, interval: int, similarity: float) -> Tensor:
    """Which vector stands for each: the one that stood for that before it, as long as they are alike, else itself.

    Args:
        vectors: `[B, R, E]` of length 1, R a multiple of `interval`.
        interval: so many of which the first stands for itself.
        similarity: the least product of those that are alike; from 1 on none are.

    Returns:
        `[B, R]` int64, numbers of vectors.
    """
    number = torch.arange(vectors.shape[1], device=vectors.device).expand(vectors.shape[:2])
    if similarity >= 1:
        return number
    each, numbers = vectors.unflatten(1, (-1, interval)), number.unflatten(1, (-1, interval))
    leading, found = each[:, :, 0], [numbers[:, :, 0]]
    for step in range(1, interval):
        is_alike = (leading * each[:, :, step]).sum(-1) >= similarity
        found.append(torch.where(is_alike, found[-1], numbers[:, :, step]))
        leading = torch.where(is_alike[..., None], leading, each[:, :, step])
    return torch.stack(found, -1).flatten(1)
