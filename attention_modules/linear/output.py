"""What follows the mixing of values where there is no normaliser: a norm per head, and a gate."""

import torch
from torch import Tensor, nn

NORM_EPSILON = 1e-6


class HeadNorm(nn.Module):
    """`weight · out / RMS(out)` for each head.

    Args:
        num_heads: query heads.
        value_dim: size of a head's output.
        start: of all weights, and so of the root mean square of the outputs.
    """

    def __init__(self, num_heads: int, value_dim: int, start: float = 1.0) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(num_heads, value_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again."""
        self.weight.fill_(self.start)

    def forward(self, out: Tensor) -> Tensor:
        """`[batch, num_heads, T, value_dim]` → the same shape."""
        scale = (out.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt()
        return out * scale * self.weight.to(out.dtype)[:, None]


class LowRankLinear(nn.Module):
    """`hidden W`, or `hidden D W` through few dimensions; W starts at zero and D at random, as in LoRA.

    Args:
        hidden_size: size of the input.
        num_heads: heads of the output.
        dim: size of each head's output.
        rank: dimensions in between; None = none.
    """

    down: nn.Parameter

    def __init__(self, hidden_size: int, num_heads: int, dim: int, rank: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rank = rank
        self.register_parameter("down", None if rank is None else nn.Parameter(torch.empty(hidden_size, rank)))
        self.weight = nn.Parameter(torch.empty(rank or hidden_size, num_heads * dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again."""
        self.weight.zero_()
        if self.rank is not None:
            nn.init.normal_(self.down, std=self.down.shape[0] ** -0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, T, hidden]` → `[batch, num_heads, T, dim]`."""
        if self.rank is not None:
            hidden_states = hidden_states @ self.down.to(hidden_states.dtype)
        out: Tensor = hidden_states @ self.weight.to(hidden_states.dtype)
        return out.view(*out.shape[:2], self.num_heads, -1).transpose(1, 2)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"num_heads={self.num_heads}, rank={self.rank}, weight={tuple(self.weight.shape)}"
