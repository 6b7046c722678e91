"""Mixture of heads: a layer's own heads as experts, some always on and others routed for each token."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..contract import AttentionOptions
from ..geometry import Geometry
from ..registry import register
from .gate import HeadGate, HeadUse, Routing

# Root mean square of the scores that a fitted router gives.
SPREAD = 0.03


class MohOptions(AttentionOptions):
    """Options of `moh`.

    Attributes:
        unit: what is switched on and off: single query heads, or KV heads with all query heads that share them.
        active: how many of the routed units a token uses; null = all.
        num_shared: units that are always on, those that `shared_by` says.
        shared_by: `index` are the first ones, `contribution` those that contribute most in the layer, which the stage
            `calibrate` finds out; until then the first ones too.
        shared: numbers of the units that are always on, instead of `num_shared`.
        shared_groups: numbers of the KV heads that are always on, with all query heads that share them, instead; in a
            recipe `{importance: FILE, top: 1}` too, those that matter most in each layer.
        router: `linear` learns from the layer's input; `query_norm` takes the units whose queries are longest, with
            gates of 1 and no parameters.
        form: `code` gives gates of exactly 1 from routers of zero, as the published code does; `paper` has the formula
            of the paper, with which the gates of all routed units add up to at most 1.
    """

    unit: Literal["head", "group"] = "head"
    active: int | None = Field(None, ge=1)
    num_shared: int = Field(0, ge=0)
    shared_by: Literal["index", "contribution"] = "index"
    shared: list[int] | None = None
    shared_groups: list[int] | dict[str, Any] | None = None
    router: Literal["linear", "query_norm"] = "linear"
    form: Literal["code", "paper"] = "code"


@register(
    name="moh",
    options=MohOptions,
    paper="https://arxiv.org/abs/2410.11842",
    summary="softmax heads as experts: some always on, others chosen for each token by a router",
)
class MohAttention(HeadGate):
    """Two-stage gates: `α = softmax(W_h x)` between shared and routed units, and softmaxes among either.

    `code`: `2 α_1 n_s softmax(W_s x)` for shared units, `2 α_2 k softmax(W_r x)` over the k that are chosen. `paper`:
    `α_1 softmax(W_s x)`, and `α_2 softmax(W_r x)` over all routed units, of which the k largest are kept. Without
    shared units there is no α. With routers at zero, where they start, and all units active, `code` is the softmax
    attention that it was, bit for bit.

    Paper: https://arxiv.org/abs/2410.11842
    """

    options: MohOptions

    def __init__(self, geometry: Geometry, options: MohOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        self.num_units = num_units = _num_units(geometry, options)
        shared = _shared(geometry, options)
        self.num_shared, num_routed = len(shared), num_units - len(shared)
        self.heads_per_unit = geometry.num_heads // num_units
        self.num_active = options.active or num_routed
        # The units, the shared and then the routed ones, and the place of each among them.
        self.together = [*shared, *(unit for unit in range(num_units) if unit not in shared)]
        self.order = [self.together.index(unit) for unit in range(num_units)]
        # What each contributes, where that decides; not trained, a parameter so that it is kept wherever weights are.
        self.contribution: nn.Parameter | None = None
        if options.shared_by == "contribution":
            self.contribution = nn.Parameter(torch.zeros(num_units))
        self.routed_router: nn.Parameter | None = None
        self.shared_router: nn.Parameter | None = None
        self.balance: nn.Parameter | None = None
        if options.router == "linear":
            hidden = int(geometry.hidden_size or 0)
            self.routed_router = nn.Parameter(torch.zeros(num_routed, hidden))
            if self.num_shared > 1:
                self.shared_router = nn.Parameter(torch.zeros(self.num_shared, hidden))
            if self.num_shared:
                self.balance = nn.Parameter(torch.zeros(2, hidden))

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Units must be there, and enough of them."""
        given = [name for name in ("shared", "num_shared", "shared_groups") if getattr(options, name)]
        if len(given) > 1:
            return f"give {given[0]} or {given[1]}, not both"
        if options.shared_by == "contribution" and not options.num_shared:
            return "shared_by: contribution chooses num_shared units: say how many"
        groups = options.shared_groups or []
        if isinstance(groups, dict):
            return "shared_groups by importance is for the rules of a recipe; give numbers of KV heads"
        beyond = [group for group in groups if not 0 <= group < geometry.num_kv_heads]
        if beyond:
            count = geometry.num_kv_heads
            return f"shared_groups names the KV head {beyond[0]}, but the layer has {count}, numbered from 0"
        num_units, shared = _num_units(geometry, options), _shared(geometry, options)
        units = "heads" if options.unit == "head" else "KV heads"
        missing = [unit for unit in shared if not 0 <= unit < num_units]
        routed = num_units - len(shared)
        if missing:
            return f"shared names the unit {missing[0]}, but the layer has {num_units} {units}, numbered from 0"
        if len(set(shared)) < len(shared):
            return f"shared names a unit twice: {shared}"
        if routed < 1:
            return f"all {num_units} {units} are shared, so there is nothing to route"
        if options.active is not None and options.active > routed:
            return f"active={options.active} is more than the {routed} {units} that are routed"
        if options.router == "query_norm" and options.form == "paper":
            return "form: paper is about routers that are learned, and router: query_norm has gates of 1"
        return super().why_unsupported(geometry, options) if options.router == "linear" else None

    @property
    def shared_units(self) -> list[int]:
        """Numbers of the units that are always on."""
        return sorted(self._places()[: self.num_shared])

    @property
    def routed_units(self) -> list[int]:
        """Numbers of those that a router chooses among."""
        return sorted(self._places()[self.num_shared :])

    def _places(self) -> list[int]:
        return self.together if self.contribution is None else self._by_contribution(self.contribution).tolist()

    def _by_contribution(self, contribution: Tensor) -> Tensor:
        """`[units]` int64: the numbers of the units, the shared and then the routed ones, each in their order."""
        index = torch.arange(self.num_units, device=contribution.device)
        rank = contribution.detach().argsort(descending=True, stable=True).argsort()
        return (index + self.num_units * (rank >= self.num_shared)).argsort()

    @property
    def observed_units(self) -> int | None:
        return None if self.routed_router is None and self.contribution is None else self.num_units

    @torch.no_grad()
    def start_from(self, use: HeadUse) -> None:
        """Start the router from what foretells how much each unit contributes.

        Only differences between units count, and their size says by how much gates differ from 1; it is chosen small,
        so that fitted gates choose units and hardly weigh them.
        """
        if self.contribution is not None:
            self.contribution.copy_(use.contribution.to(self.contribution.dtype))
        if self.routed_router is None:
            return
        weights = use.foretold[self.routed_units]
        weights = weights - weights.mean(0)
        squares = ((weights @ use.moments) * weights).sum(-1).mean()
        size = SPREAD / squares.sqrt().clamp_min(torch.finfo(weights.dtype).tiny)
        self.routed_router.copy_((weights * size).to(self.routed_router.dtype))

    @property
    def reads_hidden_states(self) -> bool:
        return self.options.router == "linear"

    def reset_parameters(self) -> None:
        """Routers of zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @property
    def tie(self) -> str | None:
        router = self.routed_router
        if router is None or self.num_active == self.num_units - self.num_shared or bool((router != router[0]).any()):
            return None
        return "the rows of its router are equal, so the same heads would be dropped for every token"

    def routing(self, query: Tensor, hidden_states: Tensor | None) -> Routing:
        if self.routed_router is None:
            lengths = query.norm(dim=-1).unflatten(1, (-1, self.heads_per_unit)).mean(2).transpose(1, 2)
            lengths = self._split(lengths)
            spread = (lengths - lengths.mean(-1, keepdim=True)).detach().square().mean(-1, keepdim=True).sqrt()
            # One unit, or all equally long, have no spread.
            return Routing.of(lengths / spread.clamp_min(1e-6), self.num_active)
        assert hidden_states is not None
        return Routing.of(_linear(hidden_states, self.routed_router), self.num_active)

    def gates(self, query: Tensor, hidden_states: Tensor | None) -> Tensor:
        routing = self.routing(query, hidden_states)
        if self.routed_router is None:
            # Gates of 1, with the gradient of the scores.
            routed = routing.chosen * (1 + (routing.scores - routing.scores.detach()))
            shared = torch.ones_like(routed[..., :1]).expand(-1, -1, self.num_shared)
        else:
            assert hidden_states is not None
            shared, routed = self._learned(routing, hidden_states)
        both = torch.cat([shared, routed], -1) if self.num_shared else routed
        if self.contribution is not None:
            both = both.index_select(-1, self._by_contribution(self.contribution).argsort())
        elif self.order != sorted(self.order):
            both = torch.stack([both[..., place] for place in self.order], -1)
        if self.heads_per_unit > 1:
            both = both.repeat_interleave(self.heads_per_unit, -1)
        return both.transpose(1, 2)

    def _learned(self, routing: Routing, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Gates of the shared units and of the routed ones, `[batch, T, units]`."""
        is_code = self.options.form == "code"
        routed = routing.factors() if is_code else routing.scores.softmax(-1) * routing.chosen
        if self.balance is None:
            return routed[..., :0], routed
        shares = Routing.of(_linear(hidden_states, self.balance), 2)
        parts = shares.factors() if is_code else shares.shares()
        shared = torch.ones_like(parts[..., :1])
        if self.shared_router is not None:
            among = Routing.of(_linear(hidden_states, self.shared_router), self.num_shared)
            shared = among.factors() if is_code else among.shares()
        return parts[..., :1] * shared, parts[..., 1:] * routed

    def _split(self, of_units: Tensor) -> Tensor:
        """The routed ones of `[batch, T, units]`."""
        if not self.num_shared:
            return of_units
        if self.contribution is not None:
            return of_units.index_select(-1, self._by_contribution(self.contribution)[self.num_shared :])
        return torch.stack([of_units[..., unit] for unit in self.together[self.num_shared :]], -1)


def _num_units(geometry: Geometry, options: MohOptions) -> int:
    return geometry.num_heads if options.unit == "head" else geometry.num_kv_heads


def _shared(geometry: Geometry, options: MohOptions) -> list[int]:
    if isinstance(options.shared_groups, list):
        each = geometry.num_groups if options.unit == "head" else 1
        return [group * each + number for group in sorted(options.shared_groups) for number in range(each)]
    return list(range(options.num_shared)) if options.shared is None else sorted(options.shared)


def _linear(hidden_states: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden_states, weight.to(hidden_states.dtype))
