"""Compressed convolutional attention: queries and keys convolved over the newest tokens before they are rotated.

Letters in shapes: `H` query heads, `K` key/value heads, `d` head_dim, `C = (H + K) d` channels, `P` earlier tokens, `T`
new ones.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..contract import AttentionOptions
from ..geometry import Geometry
from ..projecting import why_no_convolution
from ..registry import register
from ..softmax import SoftmaxAttention


class CcaOptions(AttentionOptions):
    """Options of `cca`.

    Attributes:
        depthwise_kernel: tokens that the first convolution reaches over, each channel by itself; 2 as published.
        grouped_kernel: tokens that the second one reaches over, each head by itself; 2 as published.
        mixing: start of the share by which queries and keys are moved towards their mean; 1 as published, 0 = exact.
        value_shift: start of the share that the previous token has in the second half of the values' channels; 1 as
            published, 0 = exact.
        norm: bring queries and keys to length sqrt(head_dim), with a learned factor on the keys of each head, as
            published; without, the start is exact.
    """

    depthwise_kernel: int = Field(2, ge=1, le=64)
    grouped_kernel: int = Field(2, ge=1, le=64)
    mixing: float = Field(0.0, ge=0.0, le=1.0)
    value_shift: float = Field(0.0, ge=0.0, le=1.0)
    norm: bool = False


@register(
    name="cca",
    options=CcaOptions,
    paper="https://arxiv.org/abs/2510.04476",
    summary="softmax attention over queries and keys that are convolved before their rotary embedding",
)
class ConvolutionalAttention(SoftmaxAttention):
    """`q' = q + conv(q, k) + m (q̄ - q)`, `k'` likewise, `v' = v + b (v_before - v)`, then softmax attention.

    Two causal convolutions run over the projected queries and keys, the first for each channel, the second within each
    head; `q̄` is the mean of a query and the key of its group, `k̄` the mean of the group's `q̄`. The first convolution
    starts as the identity and the second at zero, so with the default options the start is the model's own attention.
    The published layer is the setting m = 1, b = 1 for the second half of the channels, with norm. Its compression, by
    fewer heads, is a rewrite of the weights that may come before.

    Paper: https://arxiv.org/abs/2510.04476
    """

    reprojects = True

    options: CcaOptions

    def __init__(self, geometry: Geometry, options: CcaOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        heads, dim = geometry.num_heads + geometry.num_kv_heads, geometry.head_dim
        self.depthwise = nn.Parameter(torch.empty(heads * dim, 1, options.depthwise_kernel))
        self.depthwise_bias = nn.Parameter(torch.empty(heads * dim))
        self.grouped = nn.Parameter(torch.empty(heads * dim, dim, options.grouped_kernel))
        self.grouped_bias = nn.Parameter(torch.empty(heads * dim))
        self.mixing = nn.Parameter(torch.empty(geometry.num_kv_heads))
        self.shift = nn.Parameter(torch.empty(geometry.num_kv_heads, geometry.value_dim))
        if options.norm:
            self.temperature = nn.Parameter(torch.empty(geometry.num_kv_heads))
        self.reset_parameters()

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        return why_no_convolution(geometry)

    @property
    def projected_tokens(self) -> int:
        # The values reach one token back whatever the kernels do.
        return max(self._reach, 1)

    @property
    def _reach(self) -> int:
        return self.options.depthwise_kernel + self.options.grouped_kernel - 2

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        self.depthwise[:, :, -1] = 1.0
        self.mixing.fill_(self.options.mixing)
        self.shift.flatten()[self.shift.numel() // 2 :] = self.options.value_shift
        if self.options.norm:
            self.temperature.fill_(1.0)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups, start = self.geometry.num_groups, self.projected_tokens
        convolved = self._convolve(torch.cat([query, key], 1)[:, :, start - self._reach :])
        own_query, own_key = query[:, :, start:], key[:, :, start:]
        # [batch, K, group, T, d]
        grouped = own_query.unflatten(1, (-1, groups))
        mean = (grouped + own_key[:, :, None]) / 2
        mixing = self.mixing.to(query.dtype)[:, None, None]
        mixed_query = own_query + convolved[:, : query.shape[1]]
        mixed_query = mixed_query + (mixing[:, None] * (mean - grouped)).flatten(1, 2)
        mixed_key = own_key + convolved[:, query.shape[1] :] + mixing * (mean.mean(2) - own_key)
        if self.options.norm:
            mixed_query, mixed_key = (self._normalized(t) for t in (mixed_query, mixed_key))
            mixed_key = mixed_key * self.temperature.to(key.dtype)[:, None, None]
        own_value, before = value[:, :, start:], value[:, :, start - 1 : -1]
        return mixed_query, mixed_key, own_value + self.shift.to(value.dtype)[:, None] * (before - own_value)

    def _convolve(self, heads: Tensor) -> Tensor:
        """`[batch, H + K, reach + T, d]` → `[batch, H + K, T, d]`."""
        count, dtype = heads.shape[1], heads.dtype
        channels = heads.transpose(2, 3).flatten(1, 2)
        weights = (self.depthwise, self.depthwise_bias, self.grouped, self.grouped_bias)
        depthwise, depthwise_bias, grouped, grouped_bias = (weight.to(dtype) for weight in weights)
        channels = F.conv1d(channels, depthwise, depthwise_bias, groups=channels.shape[1])
        channels = F.conv1d(channels, grouped, grouped_bias, groups=count)
        convolved: Tensor = channels.unflatten(1, (count, -1))
        return convolved.transpose(2, 3)

    def _normalized(self, heads: Tensor) -> Tensor:
        """Each head's vector brought to length sqrt(d)."""
        unit: Tensor = F.normalize(heads, dim=-1, eps=torch.finfo(torch.float32).eps)
        return unit * math.sqrt(self.geometry.head_dim)
