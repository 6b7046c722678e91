"""Feature maps φ by name: a projection of each head's input, then an activation from the table below."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

FeatureMapName = Literal["hedgehog", "hedgehog_fla", "t2r", "relu", "elu", "exp", "dpfp", "taylor"]
Initialization = Literal["identity", "kaiming"]

_CLAMP = 1e-12


def both_softmaxes(y: Tensor) -> Tensor:
    """`[softmax(y), softmax(-y)]`, which sums to 2."""
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(_CLAMP)


def softmax_of_both(y: Tensor) -> Tensor:
    """`softmax([2y, -2y])`, which sums to 1."""
    return torch.cat([2 * y, -2 * y], -1).softmax(-1)


def one_plus_elu(y: Tensor) -> Tensor:
    """`1 + elu(y)`."""
    return 1 + nn.functional.elu(y)


def shifted_exp(y: Tensor) -> Tensor:
    """`exp(y - max(y))`."""
    return (y - y.amax(-1, keepdim=True)).exp()


def neighbour_products(y: Tensor) -> Tensor:
    """Each entry of `r = relu([y, -y])` times the one after it."""
    r = torch.cat([y, -y], -1).relu()
    return r * r.roll(1, -1)


def taylor_terms(y: Tensor) -> Tensor:
    """Features whose products are `1 + s + s²/2`, with `s = y·y' / sqrt(dim)`: never below one half."""
    dim = y.shape[-1]
    y = y * dim**-0.25
    row, column = torch.triu_indices(dim, dim, device=y.device)
    # Off the diagonal every product stands for two.
    weight = y.new_ones(row.shape).masked_fill(row == column, 0.5**0.5)
    return torch.cat([torch.ones_like(y[..., :1]), y, y[..., row] * y[..., column] * weight], -1)


def _as_wide(dim: int) -> int:
    return dim


def _twice_as_wide(dim: int) -> int:
    return 2 * dim


def _taylor_width(dim: int) -> int:
    return 1 + dim + dim * (dim + 1) // 2


@dataclass(frozen=True)
class FeatureMapInfo:
    """One kind of feature map.

    Attributes:
        activation: from the projected input `[..., dim]` to the features `[..., output_dim(dim)]`.
        output_dim: features by columns of the projection.
        paper: URL.
        has_bias: whether the projection has one.
        is_shared: whether all heads share one projection.
        default_dim: columns of the projection unless told; None = head_dim.
    """

    activation: Callable[[Tensor], Tensor]
    output_dim: Callable[[int], int]
    paper: str
    has_bias: bool = False
    is_shared: bool = False
    default_dim: int | None = None


# A new map is one entry here and one name in `FeatureMapName`.
FEATURE_MAPS: dict[str, FeatureMapInfo] = {
    "hedgehog": FeatureMapInfo(both_softmaxes, _twice_as_wide, "https://arxiv.org/abs/2402.04347"),
    "hedgehog_fla": FeatureMapInfo(
        softmax_of_both, _twice_as_wide, "https://arxiv.org/abs/2402.04347", has_bias=True, is_shared=True
    ),
    "t2r": FeatureMapInfo(torch.relu, _as_wide, "https://arxiv.org/abs/2103.13076", has_bias=True),
    "relu": FeatureMapInfo(torch.relu, _as_wide, "https://arxiv.org/abs/2202.08791"),
    "elu": FeatureMapInfo(one_plus_elu, _as_wide, "https://arxiv.org/abs/2006.16236"),
    "exp": FeatureMapInfo(shifted_exp, _as_wide, "https://arxiv.org/abs/2402.04347"),
    "dpfp": FeatureMapInfo(neighbour_products, _twice_as_wide, "https://arxiv.org/abs/2102.11174"),
    "taylor": FeatureMapInfo(taylor_terms, _taylor_width, "https://arxiv.org/abs/2402.18668", default_dim=16),
}


class FeatureMap(nn.Module):
    """`φ(x) = activation(x W + b)`.

    - `hedgehog` (the form of LoLCATs): W per head, `[softmax(xW), softmax(-xW)]`; sums to 2.
    - `hedgehog_fla` (the form of flash-linear-attention): W and b shared by all heads,
      `softmax([2(xW + b), -2(xW + b)])`; sums to 1. The two are different functions; a checkpoint names its own.
    - `t2r`: W and b per head, `relu(xW + b)` (https://arxiv.org/abs/2103.13076).
    - `relu`: W per head, `relu(xW)` (https://arxiv.org/abs/2202.08791, without its reweighting by position).
    - `elu`: W per head, `1 + elu(xW)` (https://arxiv.org/abs/2006.16236).
    - `exp`: W per head, `exp(xW - max(xW))`.
    - `dpfp`: W per head, products of neighbours in `relu([xW, -xW])` (https://arxiv.org/abs/2102.11174, ν = 1).
    - `taylor`: W per head to few columns, all terms of `1 + s + s²/2` (https://arxiv.org/abs/2402.18668).

    Features of `t2r`, `relu` and `dpfp` may be zero, and a query that meets no key in any feature gets no output.
    Without the projection a map has nothing to learn, and W is the identity.

    Args:
        name: one of the above.
        num_heads: heads of the input.
        head_dim: size of the input.
        feature_dim: columns of W; hedgehog forms and `dpfp` give twice as many features, `taylor`
            `1 + feature_dim + feature_dim (feature_dim + 1) / 2`.
        initialization: `identity` starts from W = I (rectangular when sizes differ), `kaiming` from the uniform
            distribution of the published code, bound `sqrt(6 / (head_dim * feature_dim))`.
        projected: whether there are W and b; without them `feature_dim` is `head_dim`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        name: FeatureMapName,
        num_heads: int,
        head_dim: int,
        feature_dim: int,
        initialization: Initialization,
        *,
        projected: bool = True,
    ) -> None:
        super().__init__()
        info = FEATURE_MAPS[name]
        self.name = name
        self.initialization = initialization
        self.projected = projected
        self.output_dim = info.output_dim(feature_dim)
        self.sizes = (1 if info.is_shared else num_heads, head_dim, feature_dim)
        weight, bias = torch.empty(self.sizes), torch.empty(self.sizes[0], 1, feature_dim)
        self.register_parameter("weight", nn.Parameter(weight) if projected else None)
        self.register_parameter("bias", nn.Parameter(bias) if projected and info.has_bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again from `initialization`."""
        if self.bias is not None:
            self.bias.zero_()
        if not self.projected:
            return
        if self.initialization == "kaiming":
            nn.init.kaiming_uniform_(self.weight)
        else:
            self.weight.copy_(torch.eye(*self.weight.shape[1:]).expand_as(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, num_heads, seq, head_dim]` → `[batch, num_heads, seq, output_dim]`; products are never negative."""
        if self.projected:
            x = x @ self.weight.to(x.dtype)
        if self.bias is not None:
            x = x + self.bias.to(x.dtype)
        return FEATURE_MAPS[self.name].activation(x)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        heads, head_dim, feature_dim = self.sizes
        return f"{self.name!r}, heads={heads}, head_dim={head_dim}, feature_dim={feature_dim}"
