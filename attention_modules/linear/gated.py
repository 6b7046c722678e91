"""Gated linear attention: what each token leaves of the state depends on the token."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..geometry import Geometry
from ..registry import register
from ..window import divide
from .output import LowRankLinear
from .recurrent import RecurrentModule, RecurrentOptions, decay_slopes

# Keeps products of softmax features above zero, so that some key always has weight.
MIN_FEATURE = 1e-12


class GatedOptions(RecurrentOptions):
    """Options of `gated`.

    Attributes:
        gate: one gate for each head's whole state (`scalar`) or for each channel of its keys (`vector`).
        gate_from: `learned` projects the layer's input to the gates, `keys` takes the keys themselves, which needs no
            new weights.
        gate_rank: dimensions that the learned projection goes through; no effect with `keys`.
        gate_temperature: roots taken of the sigmoid: the higher, the closer gates stay to 1.
        activation: what queries and keys go through.
        normalizer: divide by the sum of the faded weights instead of an RMS norm per head; needs `softmax`, whose
            weights are never negative.
    """

    gate: Literal["scalar", "vector"] = "vector"
    gate_from: Literal["learned", "keys"] = "learned"
    gate_rank: int = Field(16, ge=1)
    gate_temperature: float = Field(16.0, gt=0)
    activation: Literal["none", "silu", "softmax"] = "none"
    normalizer: bool = False


@register(
    name="gated",
    options=GatedOptions,
    paper="https://arxiv.org/abs/2312.06635",
    summary="linear attention with gates from each token, learned or made of its keys",
)
class GatedLinearAttention(RecurrentModule):
    """`S_t = G_t S_{t-1} + k_t v_tᵀ`, `y_t = s q_t S_t`, with `G_t` diagonal and inside (0, 1).

    - `learned`: `G_t = sigmoid(x_t D W + b) ^ (1 / temperature)` with x the layer's input. W starts at zero and b such
      that heads fade at the rates of `lightning`, whatever the token.
    - `keys` (Liger, https://arxiv.org/abs/2503.01496): `G_t = sigmoid(pool(k_t)) ^ (1 / temperature)`, where pool is
      the mean over a head's channels for `scalar` and the key itself for `vector`; temperature 1 is the formula without
      a root. Keys are taken as they come, with the model's norm and rotary embedding.

    With `normalizer` outputs are means of values, as those of softmax are, and start with the teacher's size. Without,
    an RMS norm per head follows: outputs start with a root mean square of `norm_start`, halved by the output gate.

    Paper: https://arxiv.org/abs/2312.06635
    """

    options: GatedOptions

    def __init__(self, geometry: Geometry, options: GatedOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation, normed=not options.normalizer)
        self.gate_projection = None
        if options.gate_from == "learned" and geometry.hidden_size is not None:
            dim = 1 if options.gate == "scalar" else geometry.head_dim
            self.gate_projection = LowRankLinear(geometry.hidden_size, self.key_heads, dim, options.gate_rank)
            self.gate_bias = nn.Parameter(torch.empty(self.key_heads, dim))
            self._reset_bias()

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Besides what no method with a decaying state can serve: a sum of weights of both signs."""
        if options.normalizer and options.activation != "softmax":
            return f"normalizer divides by a sum of weights, which activation {options.activation} makes negative too"
        return super().why_unsupported(geometry, options)

    @classmethod
    def needs_hidden_size(cls, options: Any) -> bool:
        """For learned gates of either kind."""
        return super().needs_hidden_size(options) or options.gate_from == "learned"

    @property
    def is_normalized(self) -> bool:
        """As chosen."""
        return self.options.normalizer

    @torch.no_grad()
    def _reset_bias(self) -> None:
        # The inverse of the formula of the gates for the slopes: -log(exp(x) - 1), where exp(x) may overflow.
        x = self.options.gate_temperature * decay_slopes(self.key_heads)
        start = -(x + (-torch.expm1(-x)).log())
        self.gate_bias.copy_(start[:, None].expand_as(self.gate_bias))

    def reset_parameters(self) -> None:
        """Start gates and norm again."""
        super().reset_parameters()
        if self.gate_projection is not None:
            self.gate_projection.reset_parameters()
            self._reset_bias()

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """The state of one sequence, with a column for the sum of weights."""
        heads, key_dim, value_dim = super().memory_shapes()["state"]
        return {"state": (heads, key_dim, value_dim + self.options.normalizer)}

    def log_decay(self, key: Tensor, hidden_states: Tensor | None) -> Tensor:
        """From the layer's input or from the keys."""
        if self.gate_projection is not None:
            logits = self.gate_projection(hidden_states) + self.gate_bias.to(key.dtype)[:, None]
        else:
            logits = key.mean(-1, keepdim=True) if self.options.gate == "scalar" else key
            logits = logits.repeat_interleave(self.key_heads // self.geometry.num_kv_heads, 1)
        return F.logsigmoid(logits) / self.options.gate_temperature

    def activate(self, x: Tensor) -> Tensor:
        """Softmax over the channels, SiLU or nothing."""
        if self.options.activation == "softmax":
            return x.softmax(-1).clamp_min(MIN_FEATURE)
        return F.silu(x) if self.options.activation == "silu" else x

    def prepare_values(self, values: Tensor) -> Tensor:
        """With a column of ones, whose mixture is the sum of the weights."""
        return F.pad(values, (0, 1), value=1.0) if self.options.normalizer else values

    def combine(self, out: Tensor) -> Tensor:
        """Divide by that sum."""
        return divide(out[..., :-1], out[..., -1:]) if self.options.normalizer else out
