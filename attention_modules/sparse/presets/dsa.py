"""DeepSeek sparse attention: each token chooses others by a small index, fitted to where a frozen layer looks."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ...geometry import Geometry
from ...registry import register
from ..learned import LearnedChoice
from ..options import BudgetOptions
from ..slots.slots import Slots


class DsaOptions(BudgetOptions):
    """Options of `dsa`.

    Attributes:
        block: tokens that are chosen together; each by itself as published.
        index_dim: entries of the index of a token and KV head.
        budget: tokens that each token attends; null where `density` or `mass` says it.
        density: share of the tokens before it that each token attends, instead of `budget`.
        mass: share of what the index gives to all, which the chosen ones hold together, instead of `budget`.
        sink_blocks: first blocks of the sequence that are always attended.
        local_blocks: blocks before a token's own one that are always attended; the own one always is.
    """

    block: int = Field(1, ge=1)
    index_dim: int = Field(16, ge=1)
    budget: int | None = Field(2048, ge=1)


@register(
    name="dsa",
    options=DsaOptions,
    paper="https://arxiv.org/abs/2512.02556",
    summary="each token chooses others by a small trained index, which foretells where a frozen layer looks",
)
class DeepSeekSparseAttention(LearnedChoice):
    """`logit(t, s) = Σ_h w_h(t) ReLU(W_q^h q_t · W_k k_s)` over the query heads of a KV head, `w_h(t) = 1 + u_h · q_t`.

    The published index is one for all heads and made of the layer's input; this one is made of a frozen layer's queries
    and keys, one for a KV head, so that little is to be learned: where it starts is known in closed form (stage
    `calibrate`), and the stage `gate` brings it near.

    Paper: https://arxiv.org/abs/2512.02556
    """

    options: DsaOptions

    def __init__(self, geometry: Geometry, options: DsaOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        dim, width = geometry.head_dim, options.index_dim
        self.index_query = nn.Parameter(torch.empty(geometry.num_heads, dim, width))
        self.index_key = nn.Parameter(torch.empty(geometry.num_kv_heads, dim, width))
        self.index_weight = nn.Parameter(torch.empty(geometry.num_heads, dim))
        self.reset_parameters()

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """One way to say how many are chosen."""
        if options.density is not None and options.mass is not None:
            return "give density or mass, not both"
        return super().why_unsupported(geometry, options)

    def make_slots(self) -> Slots:
        return self.options.slots(selector=self.options.selector, by="token")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.index_key)
        start = self.index_key.repeat_interleave(self.geometry.num_groups, 0)
        self.index_query.copy_(start + torch.randn_like(start) * 0.02 / math.sqrt(start.shape[1]))
        self.index_weight.zero_()

    @torch.no_grad()
    def start_from(self, query: Tensor, key: Tensor) -> None:
        """Take over an index for queries and one for keys, `[KV, D, any]` each, as far as there is room for it."""
        width = min(key.shape[-1], self.options.index_dim)
        self.index_query.zero_()[..., :width] = query[..., :width].repeat_interleave(self.geometry.num_groups, 0)
        self.index_key.zero_()[..., :width] = key[..., :width]
        self.index_weight.zero_()

    def of_queries(self, queries: Tensor, places: Tensor, scaling: float) -> Tensor:
        mean = queries.mean(-2)
        weights = self.index_query.to(mean.dtype).unflatten(0, (self.geometry.num_kv_heads, -1))
        index = torch.einsum("bkrgd,kgde->bkrge", mean, weights) * scaling
        of_head = self.index_weight.to(mean.dtype).unflatten(0, (self.geometry.num_kv_heads, -1))
        weight = 1 + (mean * of_head[:, None]).sum(-1, keepdim=True)
        return torch.cat([index, weight], -1)

    def of_keys(self, blocks: Tensor) -> Tensor:
        return blocks.mean(-2) @ self.index_key.to(blocks.dtype)

    def logits(self, rows: Tensor, columns: Tensor) -> Tensor:
        index, weight = rows[..., :-1], rows[..., -1:]
        products = (index.flatten(2, 3) @ columns.transpose(-1, -2)).relu().unflatten(2, index.shape[2:4])
        summed: Tensor = (products * weight).sum(3)
        return summed
