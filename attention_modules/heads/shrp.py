"""Head experts by their usage: those that matter most for the most tokens stay, the others leave the model."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..contract import AttentionOptions
from ..geometry import Geometry
from ..registry import register
from .gate import HeadGate, HeadUse, Routing


class ShrpOptions(AttentionOptions):
    """Options of `shrp`.

    Attributes:
        keep: KV heads that stay in each layer, with the query heads that share them; null = all. In an encoder each
            query head has a KV head of its own.
        expander: width of the network that refines what each head gives, one for all heads of a layer; 0 = none.
    """

    keep: int | None = Field(None, ge=1)
    expander: int = Field(0, ge=0, le=65536)


@register(
    name="shrp",
    options=ShrpOptions,
    paper="https://arxiv.org/abs/2512.20635",
    summary="softmax heads as experts, of which the most used stay, with a small network that all of them share",
)
class ShrpAttention(HeadGate):
    """`g_h (o_h + U gelu(D o_h + b))` of what each head gives, with g_h 1 for the heads that stay and 0 for others.

    How much a head is used is the share of the tokens for which it is the first choice, that of the largest
    contribution to the layer's output; the stage `calibrate` observes it. Whatever heals then works with the heads that
    stay, and the weights of the others are left out of the projections when the model is saved. U starts at zero, so
    with all heads the start is the model's own attention, bit for bit.

    Paper: https://arxiv.org/abs/2512.20635
    """

    prunes_heads = True

    options: ShrpOptions

    def __init__(self, geometry: Geometry, options: ShrpOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        # Not trained: a parameter, so that it is kept wherever weights are.
        self.usage = nn.Parameter(torch.zeros(geometry.num_kv_heads))
        self.down: nn.Parameter | None = None
        if options.expander:
            self.down = nn.Parameter(torch.empty(options.expander, geometry.value_dim))
            self.down_bias = nn.Parameter(torch.empty(options.expander))
            self.up = nn.Parameter(torch.empty(geometry.value_dim, options.expander))
        self.reset_parameters()

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        if options.keep is not None and options.keep > geometry.num_kv_heads:
            return f"keep={options.keep} is more than the {geometry.num_kv_heads} KV heads that the layer has"
        return None

    @property
    def reads_hidden_states(self) -> bool:
        return False

    @classmethod
    def num_kept(cls, geometry: Geometry, options: Any) -> int:
        return int(options.keep or geometry.num_kv_heads)

    @property
    def kept_heads(self) -> list[int]:
        order = self.usage.detach().argsort(descending=True, stable=True)
        return sorted(order[: self._num_kept].tolist())

    @property
    def _num_kept(self) -> int:
        return self.num_kept(self.geometry, self.options)

    @property
    def observed_units(self) -> int | None:
        return self.geometry.num_kv_heads

    @torch.no_grad()
    def start_from(self, use: HeadUse) -> None:
        """Take the usage over; heads that are never the first choice go by what they contribute."""
        # Shares of all contributions, so small that they decide only between equals.
        little = 1e-6 * use.contribution / use.contribution.sum().clamp_min(torch.finfo(use.contribution.dtype).tiny)
        self.usage.copy_((use.first + little).to(self.usage.dtype))

    def reset_parameters(self) -> None:
        """No usage known, and an expander that adds nothing."""
        nn.init.zeros_(self.usage)
        if self.down is not None:
            nn.init.kaiming_uniform_(self.down, a=5**0.5)
            nn.init.zeros_(self.down_bias)
            nn.init.zeros_(self.up)

    @property
    def tie(self) -> str | None:
        if self._num_kept == len(self.usage) or bool((self.usage != self.usage[0]).any()):
            return None
        return "how much its heads are used is not known, so there is no telling which of them stay"

    def refine(self, heads: Tensor) -> Tensor:
        if self.down is None:
            return heads
        down, bias, up = (weight.to(heads.dtype) for weight in (self.down, self.down_bias, self.up))
        return heads + F.linear(F.gelu(F.linear(heads, down, bias)), up)

    def gates(self, query: Tensor, hidden_states: Tensor | None) -> Tensor:
        stays = self._stays(query).repeat_interleave(self.geometry.num_groups)
        return stays[None, :, None].expand(query.shape[:3])

    def routing(self, query: Tensor, hidden_states: Tensor | None) -> Routing:
        """The same choice for every token."""
        shape = query.shape[0], query.shape[2], len(self.usage)
        scores = self.usage.detach().to(query.dtype).expand(shape)
        return Routing(scores, self._stays(query).topk(self._num_kept).indices.expand(*shape[:2], -1))

    def _stays(self, query: Tensor) -> Tensor:
        """`[num_kv_heads]`, 1 for those that stay."""
        stays = torch.zeros(len(self.usage), dtype=query.dtype, device=query.device)
        # No order that would wait for the device, nor one of equals that depends on it.
        rank = (self.usage[:, None] < self.usage).sum(1) + (self.usage[:, None] == self.usage).tril(-1).sum(1)
        return stays.masked_fill(rank < self._num_kept, 1.0)
