"""LoLCATs: exact softmax inside a sliding window, linear attention before it, one shared normaliser."""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from ..base import Memory
from ..geometry import Geometry
from ..registry import register
from ..window import softmax_terms, window_mask, windowed_softmax
from .base import LinearAttentionModule, LinearOptions, causal_mask, divide
from .chunked import add_memory, causal_linear, linear_sums, memory_terms, shifted


class LolcatsOptions(LinearOptions):
    """Options of `lolcats`.

    Attributes:
        window: newest tokens attended exactly, itself included; when not causal, as many on either side.
        mixing: start of the factor γ on the softmax terms, in (0, 1); learned per head.
    """

    window: int = Field(64, ge=1)
    mixing: float = Field(0.1, gt=0, lt=1)


@register(
    name="lolcats",
    options=LolcatsOptions,
    paper="https://arxiv.org/abs/2410.10254",
    summary="softmax in a sliding window, linear attention before it",
)
class LolcatsAttention(LinearAttentionModule):
    """Sliding form: softmax terms of the window W (the last w tokens) and linear terms of all tokens P before it.

    `y_i = [γ Σ_W e^{s q·k - c_i} v + Σ_P φ(q)·φ(k) v] / [γ Σ_W e^{s q·k - c_i} + Σ_P φ(q)·φ(k)]`, `c_i` = max over W.

    Paper: https://arxiv.org/abs/2410.10254
    """

    options: LolcatsOptions

    def __init__(self, geometry: Geometry, options: LolcatsOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        self.window = options.window
        self.mixing = nn.Parameter(torch.empty(geometry.num_heads))
        self._reset_mixing()

    @torch.no_grad()
    def _reset_mixing(self) -> None:
        self.mixing.fill_(math.log(self.options.mixing / (1 - self.options.mixing)))

    def reset_parameters(self) -> None:
        """Start the feature maps and the mixing factors again."""
        super().reset_parameters()
        self._reset_mixing()

    @property
    def tail_tokens(self) -> int:
        """With the next token these fill the window."""
        return self.window - 1

    def attend_naive(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, memory: Memory
    ) -> Tensor:
        """All weights written out."""
        keys_repeated, values_repeated = self.repeat_values(keys), self.repeat_values(values)
        num_queries, num_keys = query.shape[2], keys.shape[2]
        inside = window_mask(num_queries, num_keys, self.window, causal=self.geometry.causal, device=query.device)
        before = ~inside
        if self.geometry.causal:
            before = before & causal_mask(num_queries, num_keys, query.device)
        visible = inside if valid is None else inside & valid[:, None, None, :]
        logits = query @ keys_repeated.transpose(-1, -2) * scaling
        window_terms = softmax_terms(logits, visible, values_repeated)
        features, weights = self.naive_products(query, keys, valid)
        weights = weights.masked_fill(~before, 0.0)
        past_terms = weights @ values_repeated, weights.sum(-1, keepdim=True)
        if memory:
            past_terms = _add(past_terms, memory_terms(features, memory))
        return self._mix(window_terms, past_terms)

    def attend_torch(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, memory: Memory
    ) -> Tensor:
        """Both terms in blocks."""
        window_terms = windowed_softmax(
            query, keys, values, valid, scaling=scaling, window=self.window, causal=self.geometry.causal
        )
        num_queries, num_keys = query.shape[2], keys.shape[2]
        reach = num_keys - self.window
        if reach <= 0 and not memory:
            return divide(*window_terms)
        features = self.query_map(query)
        if reach <= 0:
            return self._mix(window_terms, memory_terms(features, memory))
        key_features = self.key_features(keys, valid)
        if self.geometry.causal:
            # Tokens that are out of the window of even the first query.
            past = max(reach - num_queries, 0)
            if past:
                memory = add_memory(memory, linear_sums(key_features[:, :, :past], values[:, :, :past]))
            past_terms = self._before_window(features, key_features, values, memory)
        else:
            behind = self._before_window(features, key_features, values, {})
            ahead = self._before_window(features.flip(2), key_features.flip(2), values.flip(2), {})
            past_terms = _add(behind, (ahead[0].flip(2), ahead[1].flip(2)))
        return self._mix(window_terms, past_terms)

    def _before_window(
        self, features: Tensor, key_features: Tensor, values: Tensor, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        length = features.shape[2]
        return causal_linear(
            features, shifted(key_features, self.window, length), shifted(values, self.window, length), memory
        )

    def _mix(self, window_terms: tuple[Tensor, Tensor], past_terms: tuple[Tensor, Tensor]) -> Tensor:
        gamma = self.mixing.to(window_terms[0].dtype).sigmoid()[:, None, None]
        return divide(gamma * window_terms[0] + past_terms[0], gamma * window_terms[1] + past_terms[1])


def _add(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return first[0] + second[0], first[1] + second[1]
