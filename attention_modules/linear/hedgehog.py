"""Hedgehog: pure linear attention with learned softmax-like feature maps."""

from typing import Literal

import torch
from torch import Tensor

from ..base import Memory
from ..registry import register
from .base import LinearAttentionModule, LinearOptions, causal_mask, divide
from .chunked import SEGMENT, causal_linear, linear_sums, memory_terms

# The same in every path: prefill and decode must divide alike.
EPSILON = 1e-6


class HedgehogOptions(LinearOptions):
    """Options of `hedgehog`.

    Attributes:
        feature_map: `hedgehog` (LoLCATs form) or `hedgehog_fla` (flash-linear-attention form).
    """

    feature_map: Literal["hedgehog", "hedgehog_fla"] = "hedgehog"


@register(
    name="hedgehog",
    options=HedgehogOptions,
    paper="https://arxiv.org/abs/2402.04347",
    summary="pure linear attention with learned softmax feature maps",
)
class HedgehogAttention(LinearAttentionModule):
    """`y_i = φ(q_i)·Σ φ(k_j) v_jᵀ / (φ(q_i)·Σ φ(k_j) + ε)` over `j ≤ i`, or over all j when not causal.

    Paper: https://arxiv.org/abs/2402.04347
    """

    @property
    def tail_tokens(self) -> int:
        """Nothing is kept exactly."""
        return 0

    def attend_naive(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, memory: Memory
    ) -> Tensor:
        """All products written out."""
        features, weights = self.naive_products(query, keys, valid)
        if self.geometry.causal:
            weights = weights.masked_fill(~causal_mask(weights.shape[-2], weights.shape[-1], query.device), 0.0)
        numerator, denominator = weights @ self.repeat_values(values), weights.sum(-1, keepdim=True)
        if memory:
            past_numerator, past_denominator = memory_terms(features, memory)
            numerator, denominator = numerator + past_numerator, denominator + past_denominator
        return divide(numerator, denominator, EPSILON)

    def attend_torch(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, memory: Memory
    ) -> Tensor:
        """Chunked."""
        if not self.geometry.causal:
            memory = linear_sums(self.key_features(keys, valid), values)
            return divide(*memory_terms(self.query_map(query), memory), EPSILON)
        past = keys.shape[2] - query.shape[2]
        if past:
            memory = self.absorb(
                memory, keys[:, :, :past], values[:, :, :past], None if valid is None else valid[:, :past]
            )
        outs = []
        for start in range(0, query.shape[2], SEGMENT):
            now = slice(past + start, past + start + SEGMENT)
            key_features = self.key_features(keys[:, :, now], None if valid is None else valid[:, now])
            features = self.query_map(query[:, :, start : start + SEGMENT])
            terms, memory = causal_linear(features, key_features, values[:, :, now], memory)
            outs.append(divide(*terms, EPSILON))
        return torch.cat(outs, 2)
