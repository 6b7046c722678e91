"""Operators on the attention of single heads: less for the sinks, more or less of it all, more of the token itself."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..contract import AttentionOptions, Memory
from ..geometry import Geometry
from ..query_blocks import grouped_logits, grouped_values, in_query_blocks, visible_keys
from ..registry import register
from ..softmax import SoftmaxAttention, decode_dense
from ..state import AttentionState
from ..tokens import Call
from ..window import LOG2E, MASKED

OPERATORS_OFF = {"cap": 1.0, "scale": 1.0, "identity": 0.0}


class CalibrateHeadsOptions(AttentionOptions):
    """Options of `calibrate_heads`; with those that are given by default nothing is changed.

    Attributes:
        heads: numbers of the query heads that are operated on; null = all.
        cap: largest share of a token's attention that the first tokens of the text may have together, in (0, 1]; what
            is above it goes to the others by their own shares. 1 = off.
        num_sinks: how many first tokens these are.
        scale: factor on what a head gives; 1 = off.
        identity: share of a head's attention that goes to the token itself instead, in [0, 1); 0 = off.
    """

    heads: list[int] | None = None
    cap: float = Field(OPERATORS_OFF["cap"], gt=0.0, le=1.0)
    num_sinks: int = Field(1, ge=1, le=1024)
    scale: float = Field(OPERATORS_OFF["scale"], ge=0.0, le=100.0)
    identity: float = Field(OPERATORS_OFF["identity"], ge=0.0, lt=1.0)


@register(
    name="calibrate_heads",
    options=CalibrateHeadsOptions,
    paper="https://arxiv.org/abs/2406.15765",
    summary="softmax attention with operators on single heads: sinks capped, outputs scaled, the token itself mixed in",
)
class CalibratedHeads(SoftmaxAttention):
    """`c ((1 - m) A' + m I) v` of each head: A' is its attention with at most `cap` of it on the first tokens.

    Where the sinks have the share σ > cap they keep cap, each by its own part of σ, and the tokens behind them get what
    they had times `(1 - cap) / (1 - σ)`; a token that sees nothing but sinks is left as it is. The numbers c, m and cap
    of each head are parameters, so they can be trained as well as given. A head whose operators are all off is computed
    as if there were none, bit for bit.

    Paper: https://arxiv.org/abs/2406.15765
    """

    options: CalibrateHeadsOptions

    def __init__(self, geometry: Geometry, options: CalibrateHeadsOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        self.cap = nn.Parameter(torch.empty(geometry.num_heads))
        self.scale = nn.Parameter(torch.empty(geometry.num_heads))
        self.identity = nn.Parameter(torch.empty(geometry.num_heads))
        self.reset_parameters()

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        missing = [head for head in options.heads or () if not 0 <= head < geometry.num_heads]
        if missing:
            return f"heads names the query head {missing[0]}, but the layer has {geometry.num_heads}, numbered from 0"
        return None

    @property
    def is_normalized(self) -> bool:
        return bool((self.scale == 1).all())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Off, but for the heads that the options name."""
        heads = range(self.geometry.num_heads) if self.options.heads is None else self.options.heads
        for name, off in OPERATORS_OFF.items():
            parameter = self.get_parameter(name)
            parameter.fill_(off)
            parameter[list(heads)] = getattr(self.options, name)

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        return self._calibrated(call, super().attend_naive(call, {}), self._capped)

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        return self._calibrated(call, super().attend_torch(call, {}), self._capped_in_blocks)

    def decode_torch(self, call: Call, state: AttentionState) -> Tensor:
        held = call.over(call.query, state.append(call.tokens))
        return self._calibrated(held.to(call.query.dtype), decode_dense(held), self._capped)

    def _calibrated(self, call: Call, plain: Tensor, capped: Callable[[Call], Tensor]) -> Tensor:
        """What heads give with their operators; `plain` is what they give without."""
        values = {name: self.get_parameter(name) for name in OPERATORS_OFF}
        is_on = torch.stack([values[name] != off for name, off in OPERATORS_OFF.items()]).any(0)
        scale, identity = (values[name].to(call.query.dtype)[:, None, None] for name in ("scale", "identity"))
        own = grouped_values(call)[:, :, call.past :]
        mixed = capped(call)
        out = scale * (mixed + identity * (own - mixed))
        # An operator that is off could not learn to be on if it were left out.
        trains = torch.is_grad_enabled() and any(value.requires_grad for value in values.values())
        return out if trains else torch.where(is_on[:, None, None], out, plain.to(out.dtype))

    def _capped_in_blocks(self, call: Call) -> Tensor:
        return in_query_blocks(call, self._capped, causal=self.geometry.causal)

    def _capped(self, call: Call) -> Tensor:
        """`[batch, num_heads, T, value_dim]` of values mixed with no more than the cap on the sinks."""
        visible = visible_keys(call, causal=self.geometry.causal)
        logits = (grouped_logits(call) * LOG2E).masked_fill(~visible, MASKED)
        weights = (logits - logits.amax(-1, keepdim=True)).exp2() * visible
        least = torch.finfo(weights.dtype).tiny
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(least)
        real = call.tokens.real
        is_sink = (real & (real.cumsum(-1) <= self.options.num_sinks))[:, None, None]
        share = (weights * is_sink).sum(-1, keepdim=True)
        rest = (weights * ~is_sink).sum(-1, keepdim=True)
        cap = self.cap.to(weights.dtype)[:, None, None].clamp(0, 1)
        factor = torch.where(is_sink, cap / share.clamp_min(least), (1 - cap) / rest.clamp_min(least))
        # Where there is nothing but sinks, nobody can take what they lose.
        weights = torch.where((share > cap) & (rest > 0), weights * factor, weights)
        return weights @ grouped_values(call)
