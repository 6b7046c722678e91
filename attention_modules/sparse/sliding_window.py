"""Attention sinks plus a sliding window, exact softmax inside: training-free."""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from ..base import AttentionModule
from ..contract import AttentionOptions, Memory
from ..registry import register
from ..sinks import Sinks, filled_sinks, first_tokens, sink_shapes, sink_tokens
from ..tokens import Call, Tokens
from ..weights import Statistic, share_outside
from ..window import LOG2E, softmax_terms, tokens_in_window, window_mask, windowed_softmax


class SlidingWindowOptions(AttentionOptions):
    """Options of `sliding_window`.

    Attributes:
        window: newest tokens attended, itself included; when not causal, as many on either side.
        num_sinks: first tokens of the sequence that stay visible for ever.
    """

    window: int = Field(1024, ge=1)
    num_sinks: int = Field(4, ge=0)


@register(
    name="sliding_window",
    options=SlidingWindowOptions,
    paper="https://arxiv.org/abs/2309.17453",
    summary="the first tokens and a sliding window, exact softmax inside; training-free",
)
class SlidingWindowAttention(AttentionModule):
    """Softmax over the first `num_sinks` real tokens and the last `window` ones; positions stay as the model made them.

    Paper: https://arxiv.org/abs/2309.17453
    """

    rounds_products = True
    options: SlidingWindowOptions

    @property
    def tail_tokens(self) -> int:
        """With the next token these fill the window."""
        return self.options.window - 1

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """The sinks."""
        return sink_shapes(self.geometry, self.options.num_sinks) if self.options.num_sinks else {}

    def absorb(self, tokens: Tokens, memory: Memory) -> Memory:
        """Keep the first real tokens, let the rest go."""
        sinks = self._sinks(tokens, memory)
        return memory if sinks is None else sinks.to_memory()

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        window, kept = self.options.window, self.options.num_sinks
        return tokens_in_window(rank, total, window, kept, causal=self.geometry.causal)

    def statistics(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scaling: float,
        padding_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> Mapping[str, Statistic]:
        """How much of what the heads look at are sinks that the window has left behind."""
        rows = self.weights_by_row(query, key, scaling=scaling, padding_mask=padding_mask)
        outside = share_outside(rows, self.options.window, causal=self.geometry.causal)
        meaning = "share of the attention on first tokens that are out of the window, mean over queries"
        share = Statistic("sink share", meaning, "head", "percent", outside)
        return {share.name: share}

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        tokens, keys, values = call.tokens, call.tokens.keys, call.tokens.values
        causal, groups, device = self.geometry.causal, self.geometry.num_groups, keys.device
        visible = window_mask(call.length, tokens.length, self.options.window, causal=causal, device=device)
        sink_columns = sink_tokens(self.options.num_sinks, memory, tokens)[:, None, :]
        if causal:
            sink_columns = sink_columns & window_mask(
                call.length, tokens.length, tokens.length, causal=True, device=device
            )
        visible = (visible | sink_columns) & tokens.real[:, None, :]
        if memory:
            keys = torch.cat([memory["sink_keys"], keys], 2)
            values = torch.cat([memory["sink_values"], values], 2)
            visible = torch.cat([filled_sinks(memory)[:, None, :].expand(-1, call.length, -1), visible], -1)
        logits = call.query @ keys.repeat_interleave(groups, 1).transpose(-1, -2) * (call.scaling * LOG2E)
        numerator, denominator, _ = softmax_terms(logits, visible[:, None], values.repeat_interleave(groups, 1))
        return numerator / denominator.clamp_min(torch.finfo(numerator.dtype).tiny)

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        """Blocks of the window, with the sinks beside every block."""
        sinks = self._sinks(call.tokens, memory)
        numerator, denominator, _ = windowed_softmax(
            call, window=self.options.window, causal=self.geometry.causal, sinks=sinks
        )
        return numerator / denominator.clamp_min(torch.finfo(numerator.dtype).tiny)

    def _sinks(self, tokens: Tokens, memory: Memory) -> Sinks | None:
        """Those of memory and keys together; None where the method keeps none."""
        sinks = self.options.num_sinks
        return first_tokens(sinks, memory, tokens) if sinks else None
