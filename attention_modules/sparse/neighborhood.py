"""Neighborhood attention along a sequence: a sliding window with gaps, exact softmax inside: training-free."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..base import AttentionModule
from ..contract import AttentionOptions, Memory
from ..registry import register
from ..tokens import Call, Tokens
from ..window import LOG2E, softmax_terms, windowed_softmax


class NeighborhoodOptions(AttentionOptions):
    """Options of `neighborhood`.

    Attributes:
        window: neighbours attended, the token itself included; when not causal, as many on either side.
        dilation: tokens from one neighbour to the next; 1 is a window without gaps.
    """

    window: int = Field(256, ge=1)
    dilation: int = Field(4, ge=1)


@register(
    name="neighborhood",
    options=NeighborhoodOptions,
    paper="https://arxiv.org/abs/2209.15001",
    summary="a sliding window that sees every n-th token, exact softmax inside; training-free",
)
class NeighborhoodAttention(AttentionModule):
    """Softmax over the tokens `i - dilation·n`, `0 ≤ n < window`, and those ahead where a layer looks both ways.

    Each of `dilation` interleaved sequences is a sliding window of its own, so time and memory are linear in the
    length. At the ends of a sequence there are fewer neighbours; they are not made up for on the other side.

    Paper: https://arxiv.org/abs/2209.15001
    """

    options: NeighborhoodOptions

    @property
    def tail_tokens(self) -> int:
        """From the farthest neighbour of the next token on."""
        return (self.options.window - 1) * self.options.dilation

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        most, dilation = self.options.window - 1, self.options.dilation
        behind = ((rank - 1) // dilation).clamp_max(most)
        return behind + 1 if self.geometry.causal else behind + 1 + ((total - rank) // dilation).clamp_max(most)

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        tokens, groups, device = call.tokens, self.geometry.num_groups, call.query.device
        keys, values = (t.repeat_interleave(groups, 1) for t in (tokens.keys, tokens.values))
        query = torch.arange(call.past, tokens.length, device=device)
        distance = query[:, None] - torch.arange(tokens.length, device=device)
        near = (distance.abs() < self.options.window * self.options.dilation) & (distance % self.options.dilation == 0)
        near = near & (distance >= 0) if self.geometry.causal else near
        visible = near & tokens.real[:, None, :]
        logits = call.query @ keys.transpose(-1, -2) * (call.scaling * LOG2E)
        numerator, denominator, _ = softmax_terms(logits, visible[:, None], values)
        return numerator / denominator.clamp_min(torch.finfo(numerator.dtype).tiny)

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        """Windows of interleaved sequences, counted from the newest token, which all rows end with."""
        dilation, tokens = self.options.dilation, call.tokens
        valid = None if tokens.valid is None and tokens.length % dilation == 0 else tokens.real
        if valid is not None:
            valid = _interleaved(valid[:, None, :, None], dilation)[:, 0, :, 0]
        apart = Tokens(_interleaved(tokens.keys, dilation), _interleaved(tokens.values, dilation), valid)
        numerator, denominator, _ = windowed_softmax(
            call.over(_interleaved(call.query, dilation), apart),
            window=self.options.window,
            causal=self.geometry.causal,
        )
        out = numerator / denominator.clamp_min(torch.finfo(numerator.dtype).tiny)
        together: Tensor = out.unflatten(0, (dilation, -1)).movedim(0, 3).flatten(2, 3)
        return together[:, :, together.shape[2] - call.length :]


def _interleaved(tensor: Tensor, dilation: int) -> Tensor:
    """`[B, heads, S, D]` → `[dilation * B, heads, S / dilation, D]`, with nothing in front where S is no multiple."""
    length = tensor.shape[2]
    tensor = F.pad(tensor, (0, 0, -length % dilation, 0))
    apart: Tensor = tensor.unflatten(2, (-1, dilation)).movedim(3, 0).flatten(0, 1)
    return apart
