"""An infinitely long learned prefix before every text, as one matrix and one vector of each head."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import AttentionOptions, Memory
from ..geometry import Geometry
from ..query_blocks import grouped_logits, grouped_values, in_query_blocks, visible_keys
from ..registry import register
from ..softmax import SoftmaxAttention
from ..state import AttentionState
from ..tokens import Call
from ..window import LEAST_LEVEL, LOG2E, divide, softmax_terms


class NtkPrefixOptions(AttentionOptions):
    """`ntk_prefix` has no options."""


@register(
    name="ntk_prefix",
    options=NtkPrefixOptions,
    paper="https://arxiv.org/abs/2406.14036",
    summary="softmax attention behind an infinitely long learned prefix, kept as a matrix and a vector of each head",
)
class NtkPrefixAttention(SoftmaxAttention):
    """`y = (Σ_j e^{s q·k_j} v_j + φ(q) Z) / (Σ_j e^{s q·k_j} + φ(q)·max(z, 0))`, `φ(x) = elu(x / d^¼) + 1`.

    In the limit of a long prefix what it adds to both sides of the fraction is a function of the query alone, which `Z`
    `[head_dim, value_dim]` and `z` `[head_dim]` stand for: d² + d numbers of each query head, whatever the length. Both
    start at zero, which is softmax attention without a prefix.

    Paper: https://arxiv.org/abs/2406.14036
    """

    def __init__(self, geometry: Geometry, options: AttentionOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        self.prefix_values = nn.Parameter(torch.zeros(geometry.num_heads, geometry.head_dim, geometry.value_dim))
        self.prefix_keys = nn.Parameter(torch.zeros(geometry.num_heads, geometry.head_dim))
        self._weighs_only = False

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.prefix_values)
        nn.init.zeros_(self.prefix_keys)

    @property
    def is_normalized(self) -> bool:
        """The prefix has a share."""
        return False

    def attention_weights(self, *args: Any, **kwargs: Any) -> Tensor:
        # What the prefix adds is the same for all values, and no weight of a key.
        self._weighs_only = True
        try:
            return super().attention_weights(*args, **kwargs)
        finally:
            self._weighs_only = False

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        visible = visible_keys(call, causal=self.geometry.causal)
        terms = softmax_terms(grouped_logits(call) * LOG2E, visible, grouped_values(call))
        features = F.elu(call.query / call.query.shape[-1] ** 0.25) + 1
        prefix = features @ self.prefix_values.to(features.dtype)
        if self._weighs_only:
            prefix = torch.zeros_like(prefix)
        mass = (features * self.prefix_keys.to(features.dtype).clamp_min(0)[:, None]).sum(-1, keepdim=True)
        # Both in units of the larger of the two levels, so that neither overflows.
        level = terms.peak.clamp_min(LEAST_LEVEL)
        own, other = (terms.peak - level).exp2(), (-level).exp2()
        denominator = own * terms.denominator + other * mass
        return divide(own * terms.numerator + other * prefix, denominator)

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        return in_query_blocks(call, lambda part: self.attend_naive(part, {}), causal=self.geometry.causal)

    def decode_torch(self, call: Call, state: AttentionState) -> Tensor:
        return self.attend_naive(call.over(call.query, state.append(call.tokens).to(call.query.dtype)), {})
