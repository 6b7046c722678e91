"""Mixture of attention heads: several attentions side by side as blocks of heads, mixed by a router."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..contract import AttentionOptions
from ..geometry import Geometry
from ..registry import register
from .gate import HeadGate, Routing


class MoaOptions(AttentionOptions):
    """Options of `moa`.

    Attributes:
        num_experts: attentions that the layer's heads are made up of, as the rewrite `widen` puts them side by side.
        active: how many of them a token goes through; null mixes all.
        share_kv: whether all experts share keys and values, so that heads stand by KV head and then by expert, and not
            by expert alone.
    """

    num_experts: int = Field(2, ge=1)
    active: int | None = Field(None, ge=1)
    share_kv: bool = False


@register(
    name="moa",
    options=MoaOptions,
    paper="https://arxiv.org/abs/2408.08274",
    summary="several softmax attentions as blocks of heads of a wide one, mixed for each token by a router",
)
class MoaAttention(HeadGate):
    """`Σ_e softmax(W x)_e MHA_e(x)`, as `W_o (gates ⊙ heads)` with the experts' heads side by side in one layer.

    Where all experts are equal that is any of them, whatever the router.

    Paper: https://arxiv.org/abs/2408.08274
    """

    options: MoaOptions

    def __init__(self, geometry: Geometry, options: MoaOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        self.router = nn.Parameter(torch.empty(options.num_experts, int(geometry.hidden_size or 0)))
        self.reset_parameters()

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Experts are equal blocks of heads."""
        count = geometry.num_groups if options.share_kv else geometry.num_heads
        of = "query heads of each KV head" if options.share_kv else "query heads"
        if count % options.num_experts:
            given = f"num_experts={options.num_experts} does not divide the {count} {of}"
            return f"{given}: give as many as the rewrite widen made"
        if options.active is not None and options.active > options.num_experts:
            return f"active={options.active} is more than there are experts ({options.num_experts})"
        return super().why_unsupported(geometry, options)

    def reset_parameters(self) -> None:
        """Small random weights, which can be told apart."""
        nn.init.normal_(self.router, std=0.02)

    @property
    def tie(self) -> str | None:
        if self.options.active is None or bool((self.router != self.router[0]).any()):
            return None
        return "the rows of its router are equal, so every token would go through the same experts"

    def routing(self, query: Tensor, hidden_states: Tensor | None) -> Routing:
        assert hidden_states is not None
        scores = hidden_states @ self.router.to(hidden_states.dtype).T
        return Routing.of(scores, self.options.active or self.options.num_experts)

    def gates(self, query: Tensor, hidden_states: Tensor | None) -> Tensor:
        shares = self.routing(query, hidden_states).shares().transpose(1, 2)
        blocks = self.geometry.num_kv_heads if self.options.share_kv else 1
        each = self.geometry.num_heads // self.options.num_experts // blocks
        return shares.repeat_interleave(each, 1).repeat(1, blocks, 1)
