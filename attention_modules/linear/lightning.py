"""Lightning attention: linear attention in which each head forgets at a rate of its own."""

from typing import Literal

import torch
from torch import Tensor, nn

from ..contract import Memory
from ..geometry import Geometry
from ..registry import register
from .recurrence import decayed_products
from .recurrent import RecurrentModule, RecurrentOptions, decay_slopes


class LightningOptions(RecurrentOptions):
    """Options of `lightning`.

    Attributes:
        decay: `fixed` slopes as in ALiBi, or `learned` ones that start there.
        activation: what queries and keys go through, `silu` as published or `none`.
    """

    decay: Literal["fixed", "learned"] = "fixed"
    activation: Literal["silu", "none"] = "silu"


@register(
    name="lightning",
    options=LightningOptions,
    paper="https://arxiv.org/abs/2501.08313",
    summary="linear attention that fades at a constant rate per head, with an output norm and gate",
)
class LightningAttention(RecurrentModule):
    """`y_i = gate_i ⊙ norm(Σ_{j ≤ i} λ^{i-j} (s q_i·k_j) v_j)` with one λ per head: `S_t = λ S_{t-1} + k_t v_tᵀ`.

    No normaliser: an RMS norm per head with a learned weight follows, then the gate. The slopes `-log λ` go from almost
    one (the last few tokens) to 1/256 (hundreds of tokens); those of the published models also depend on the layer.
    At the start outputs have a root mean square of `norm_start`, halved behind the gate, whatever the teacher's have:
    weights and gates go the rest of the way in attention transfer, and the nearer the start, the farther they get.

    Paper: https://arxiv.org/abs/2501.08313, after https://arxiv.org/abs/2307.14995 and, for the recurrence with a fixed
    decay, https://arxiv.org/abs/2307.08621.
    """

    options: LightningOptions

    def __init__(self, geometry: Geometry, options: LightningOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        self.slope_log = nn.Parameter(torch.empty(self.key_heads)) if options.decay == "learned" else None
        self._reset_slopes()

    @torch.no_grad()
    def _reset_slopes(self) -> None:
        if self.slope_log is not None:
            self.slope_log.copy_(decay_slopes(self.key_heads).log())

    def reset_parameters(self) -> None:
        """Start slopes, norm and gate again."""
        super().reset_parameters()
        self._reset_slopes()

    def log_decay(self, key: Tensor, hidden_states: Tensor | None) -> Tensor:
        """The same for all tokens."""
        if self.slope_log is None:
            # Made where they are needed: a copy to a GPU with each token is slow, and a CUDA graph cannot record it.
            slopes = decay_slopes(self.key_heads, key.device).to(key.dtype)
        else:
            slopes = self.slope_log.to(key.dtype).exp()
        return -slopes[None, :, None, None].expand(-1, -1, key.shape[2], -1)

    def activate(self, x: Tensor) -> Tensor:
        """SiLU or nothing."""
        return nn.functional.silu(x) if self.options.activation == "silu" else x

    def steps(
        self, queries: Tensor, keys: Tensor, values: Tensor, signals: Memory, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`(Q Kᵀ ⊙ λ^{i-j}) V`, all weights written out."""
        return decayed_products(queries, keys, values, signals["log_decay"], state)
