"""Relative convolutional attention: projections convolved over the newest tokens, and scores that know distances."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..contract import AttentionOptions, Memory
from ..geometry import Geometry
from ..projecting import why_no_convolution
from ..query_blocks import grouped_logits, grouped_values, in_query_blocks, visible_keys
from ..registry import register
from ..softmax import SoftmaxAttention
from ..state import AttentionState
from ..tokens import Call
from ..window import LOG2E, divide, softmax_terms


class RcmhaOptions(AttentionOptions):
    """Options of `rcmha`.

    Attributes:
        kernel: tokens that the convolution of each channel of queries, keys and values reaches over; 3 as published.
        distances: tokens back up to which each distance has an embedding of its own; all beyond share the last one.
    """

    kernel: int = Field(3, ge=1, le=64)
    distances: int = Field(64, ge=1, le=65536)


@register(
    name="rcmha",
    options=RcmhaOptions,
    paper="https://arxiv.org/abs/2308.03429",
    summary="softmax attention over convolved queries, keys and values, with learned embeddings of distances",
)
class RelativeConvolutionalAttention(SoftmaxAttention):
    """`softmax_j(s (q_i·k_j + u·k_j + (q_i + w)·r_{i-j})) v_j` of `q`, `k`, `v` after depthwise causal convolutions.

    The convolutions run over the projections of each channel, before the model's rotary embedding, and start as the
    identity. `r` `[num_heads, distances, head_dim]` embeds how far back a key is; it starts at zero like the biases `u`
    and `w` of each head, so that the start is the model's own attention, whose own account of positions stays.

    Paper: https://arxiv.org/abs/2308.03429
    """

    reprojects = True

    options: RcmhaOptions

    def __init__(self, geometry: Geometry, options: RcmhaOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        heads, kv_heads, dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        self.query_kernel = nn.Parameter(torch.empty(heads * dim, 1, options.kernel))
        self.key_kernel = nn.Parameter(torch.empty(kv_heads * dim, 1, options.kernel))
        self.value_kernel = nn.Parameter(torch.empty(kv_heads * geometry.value_dim, 1, options.kernel))
        self.content_bias = nn.Parameter(torch.empty(heads, dim))
        self.distance_bias = nn.Parameter(torch.empty(heads, dim))
        self.distance = nn.Parameter(torch.empty(heads, options.distances, dim))
        self.reset_parameters()

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        return why_no_convolution(geometry)

    @property
    def projected_tokens(self) -> int:
        return self.options.kernel - 1

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        for kernel in (self.query_kernel, self.key_kernel, self.value_kernel):
            kernel[:, :, -1] = 1.0

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kernels = self.query_kernel, self.key_kernel, self.value_kernel
        made = (_convolved(heads, kernel) for heads, kernel in zip((query, key, value), kernels, strict=True))
        return next(made), next(made), next(made)

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        query = call.query
        content, place, embedded = (
            weight.to(query.dtype) for weight in (self.content_bias, self.distance_bias, self.distance)
        )
        logits = grouped_logits(call.over(query + content[:, None], call.tokens))
        # `[batch, heads, T, distances]`, then the one that each key is at.
        of_distance = (query + place[:, None]) @ embedded.transpose(-1, -2) * call.scaling
        index = torch.arange(call.tokens.length, device=query.device)
        far = (index[call.past :, None] - index).clamp(0, self.options.distances - 1)
        logits = logits + of_distance.gather(-1, far.expand(*of_distance.shape[:2], -1, -1))
        visible = visible_keys(call, causal=True)
        numerator, denominator, _ = softmax_terms(logits * LOG2E, visible, grouped_values(call))
        return divide(numerator, denominator)

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        return in_query_blocks(call, lambda part: self.attend_naive(part, {}), causal=True)

    def decode_torch(self, call: Call, state: AttentionState) -> Tensor:
        return self.attend_naive(call.over(call.query, state.append(call.tokens).to(call.query.dtype)), {})


def _convolved(heads: Tensor, kernel: Tensor) -> Tensor:
    """`[batch, heads, reach + T, d]` → `[batch, heads, T, d]`, each channel by itself."""
    channels = heads.transpose(2, 3).flatten(1, 2)
    channels = F.conv1d(channels, kernel.to(heads.dtype), groups=channels.shape[1])
    convolved: Tensor = channels.unflatten(1, (heads.shape[1], -1))
    return convolved.transpose(2, 3)
