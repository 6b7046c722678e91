"""Gated DeltaNet: a state that overwrites what it knew under a key, and fades."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import Memory
from ..geometry import Geometry
from ..kernels.selection import needs_package
from ..registry import register
from .delta import delta_chunks, delta_state, delta_steps
from .output import LowRankLinear
from .recurrence_kernels import delta_kernels
from .recurrent import RecurrentModule, RecurrentOptions, decay_slopes

# Inside the root of a vector's squared length, so that a zero stays a zero.
LENGTH_EPSILON = 1e-6


class GatedDeltaOptions(RecurrentOptions):
    """Options of `gated_delta`.

    Attributes:
        activation: what queries and keys go through before they are brought to length 1.
        output_norm: an RMS norm of each head's output, as published; without it outputs keep the size that the state
            gives them, which is about that of values, and the model's scaling is left out.
    """

    activation: Literal["none", "silu"] = "silu"
    output_norm: bool = True


@register(
    name="gated_delta",
    options=GatedDeltaOptions,
    paper="https://arxiv.org/abs/2412.06464",
    summary="a fading state in which each token overwrites what its key stood for",
)
class GatedDeltaAttention(RecurrentModule):
    """`S_t = α_t S_{t-1} (I - β_t k_t k_tᵀ) + β_t k_t v_tᵀ`, `y_t = s q_t S_t`, with q and k of length 1.

    Per state head and from the layer's input x: `β = sigmoid(x W_β)` and `log α = -e^a softplus(x W_α + b)`. Both
    projections start at zero, so that β is ½ and heads fade at the rates of `lightning`, whatever the token. With
    `output_norm` outputs start with a root mean square of `norm_start`, halved by the output gate; without, they start
    as estimates of values, near the teacher's size. The short convolutions of the published layer come before the
    attention and have no place here.

    Paper: https://arxiv.org/abs/2412.06464
    """

    options: GatedDeltaOptions

    def __init__(self, geometry: Geometry, options: GatedDeltaOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation, normed=options.output_norm)
        # Without it the layer was refused already.
        assert geometry.hidden_size is not None
        self.strength_projection = LowRankLinear(geometry.hidden_size, self.key_heads, 1)
        self.decay_projection = LowRankLinear(geometry.hidden_size, self.key_heads, 1)
        self.decay_bias = nn.Parameter(torch.empty(self.key_heads))
        self.rate_log = nn.Parameter(torch.empty(self.key_heads))
        self._reset_rates()

    @classmethod
    def needs_hidden_size(cls, options: Any) -> bool:
        """Always."""
        return True

    @torch.no_grad()
    def _reset_rates(self) -> None:
        # The inverse of softplus.
        self.decay_bias.copy_(decay_slopes(self.key_heads).expm1().log())
        self.rate_log.zero_()

    def reset_parameters(self) -> None:
        """Start gates and norm again."""
        super().reset_parameters()
        self.strength_projection.reset_parameters()
        self.decay_projection.reset_parameters()
        self._reset_rates()

    def log_decay(self, key: Tensor, hidden_states: Tensor | None) -> Tensor:
        """From the layer's input."""
        bias, rate = (t.to(key.dtype)[:, None, None] for t in (self.decay_bias, self.rate_log))
        return -rate.exp() * F.softplus(self.decay_projection(hidden_states) + bias)

    def signals(self, key: Tensor, hidden_states: Tensor | None) -> Memory:
        """The decay of each token and how much of its key's value it replaces."""
        strength: Tensor = self.strength_projection(hidden_states).sigmoid()
        return {**super().signals(key, hidden_states), "beta": strength}

    def activate(self, x: Tensor) -> Tensor:
        """To length 1."""
        x = F.silu(x) if self.options.activation == "silu" else x
        return x * (x.square().sum(-1, keepdim=True) + LENGTH_EPSILON).rsqrt()

    def state_multiply_adds(self) -> int:
        """Besides what a sum needs, the state is asked what it knew under the key."""
        return super().state_multiply_adds() + self.key_heads * self.geometry.head_dim * self.geometry.value_dim

    def query_scaling(self, scaling: float) -> float:
        """The model's own, which a norm would undo anyway, or none."""
        return scaling if self.options.output_norm else 1.0

    def steps(
        self, queries: Tensor, keys: Tensor, values: Tensor, signals: Memory, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence as it is defined."""
        return delta_steps(queries, keys, values, signals["log_decay"], signals["beta"], state)

    def chunks(
        self, queries: Tensor, keys: Tensor, values: Tensor, signals: Memory, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same in chunks."""
        return delta_chunks(queries, keys, values, signals["log_decay"], signals["beta"], state)

    @needs_package
    def run_kernels(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        signals: Memory,
        start: Tensor | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The same in Triton."""
        return delta_kernels(queries, keys, values, signals["log_decay"], signals["beta"], start, state)

    def update(self, keys: Tensor, values: Tensor, signals: Memory, state: Tensor | None) -> Tensor:
        """The state after some tokens, without their outputs."""
        return delta_state(keys, values, signals["log_decay"], signals["beta"], state)
