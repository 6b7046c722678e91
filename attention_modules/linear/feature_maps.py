"""Feature maps φ: learned per-head projections followed by a positive activation."""

from typing import Literal

import torch
from torch import Tensor, nn

FeatureMapName = Literal["hedgehog", "hedgehog_fla", "t2r", "elu", "exp"]
Initialization = Literal["identity", "kaiming"]

_CLAMP = 1e-12


class FeatureMap(nn.Module):
    """`φ(x) = activation(x W + b)`.

    - `hedgehog` (the form of LoLCATs): W per head, `[softmax(xW), softmax(-xW)]`; sums to 2.
    - `hedgehog_fla` (the form of flash-linear-attention): W and b shared by all heads,
      `softmax([2(xW + b), -2(xW + b)])`; sums to 1. The two are different functions; a checkpoint names its own.
    - `t2r`: W and b per head, `relu(xW + b)` (https://arxiv.org/abs/2103.13076).
    - `elu`: W per head, `1 + elu(xW)` (https://arxiv.org/abs/2006.16236).
    - `exp`: W per head, `exp(xW - max(xW))`.

    Args:
        name: one of the above.
        num_heads: heads of the input.
        head_dim: size of the input.
        feature_dim: columns of W; hedgehog forms give twice as many features.
        initialization: `identity` starts from W = I (rectangular when sizes differ), `kaiming` from the uniform
            distribution of the published code, bound `sqrt(6 / (head_dim * feature_dim))`.
    """

    def __init__(
        self, name: FeatureMapName, num_heads: int, head_dim: int, feature_dim: int, initialization: Initialization
    ) -> None:
        super().__init__()
        self.name = name
        self.initialization = initialization
        self.output_dim = feature_dim * (2 if name.startswith("hedgehog") else 1)
        heads = 1 if name == "hedgehog_fla" else num_heads
        self.weight = nn.Parameter(torch.empty(heads, head_dim, feature_dim))
        has_bias = name in ("hedgehog_fla", "t2r")
        self.bias = nn.Parameter(torch.empty(heads, 1, feature_dim)) if has_bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again from `initialization`."""
        if self.bias is not None:
            self.bias.zero_()
        if self.initialization == "kaiming":
            nn.init.kaiming_uniform_(self.weight)
        else:
            self.weight.copy_(torch.eye(*self.weight.shape[1:]).expand_as(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, num_heads, seq, head_dim]` → `[batch, num_heads, seq, output_dim]`, never negative."""
        y = x @ self.weight.to(x.dtype)
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        if self.name == "hedgehog":
            return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(_CLAMP)
        if self.name == "hedgehog_fla":
            return torch.cat([2 * y, -2 * y], -1).softmax(-1)
        if self.name == "t2r":
            return y.relu()
        if self.name == "elu":
            return 1 + nn.functional.elu(y)
        return (y - y.amax(-1, keepdim=True)).exp()

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        heads, head_dim, feature_dim = self.weight.shape
        return f"{self.name!r}, heads={heads}, head_dim={head_dim}, feature_dim={feature_dim}"
