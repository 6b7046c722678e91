"""The answer of a diagnosis: every head of every layer, in numbers."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any

from .roles import ROLES, Role


@dataclass(frozen=True)
class HeadProfile:
    """One head; masses and shares are in [0, 1], distances in tokens.

    Attributes:
        head: its number.
        role: what it is for, see `roles`.
        mean_distance: how far away it looks on average.
        distance_90: distance within which 90 % of its mass lies.
        window_90: newest tokens that hold 90 % of its mass together with the first four.
        entropy: of its weights, in nats.
        relative_entropy: the same over its largest possible value.
        sink_mass: mass on the first four tokens.
        local_mass: mass on the newest tokens, as many as the diagnosis's `window`.
        streaming_mass: mass on both.
        monotonicity: share of the steps at which its centre does not move back.
        induction: mass on what followed the same token earlier; None for a head that sees both ways.
        behind: mean distance of what it sees before the query.
        ahead: mean distance of what it sees after the query; 0 for causal heads.
        mass_ahead: mass on what is after the query; 0 for causal heads.
    """

    head: int
    role: Role
    mean_distance: float
    distance_90: float
    window_90: float
    entropy: float
    relative_entropy: float
    sink_mass: float
    local_mass: float
    streaming_mass: float
    monotonicity: float
    induction: float | None
    behind: float
    ahead: float
    mass_ahead: float


MEASURES = tuple(field.name for field in fields(HeadProfile) if field.name not in ("head", "role", "induction"))
"""What is measured on text; `induction` is measured on random tokens."""


@dataclass(frozen=True)
class LayerProfile:
    """One self-attention layer.

    Attributes:
        index: its number, as recipes count layers.
        name: its name in the model.
        heads: its heads.
        causal: whether a token sees only itself and what came before.
        native_window: newest tokens that it sees by itself; None if there is no such limit.
    """

    index: int
    name: str
    heads: tuple[HeadProfile, ...]
    causal: bool = True
    native_window: int | None = None

    @property
    def role_counts(self) -> dict[Role, int]:
        """How many heads there are of each role."""
        counts = Counter(head.role for head in self.heads)
        return {role: counts[role] for role in ROLES}

    def mean(self, measure: str) -> float | None:
        """A measure's mean over the heads; None if it was not measured."""
        values = [getattr(head, measure) for head in self.heads]
        return None if None in values else fmean(values)


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that was not diagnosed.

    Attributes:
        index: its number, as recipes count layers.
        name: its name in the model.
        reason: why not.
    """

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """The answer of `diagnose_model`.

    Attributes:
        source: the model as it was named.
        model_type: its type in transformers.
        text: the text as it was named.
        tokens: tokens of the text that were used.
        context: tokens in a window of it.
        window: newest tokens that count as near.
        layers: the layers in order.
        skipped: those that could not be diagnosed.
    """

    source: str
    model_type: str
    text: str
    tokens: int
    context: int
    window: int
    layers: tuple[LayerProfile, ...]
    skipped: tuple[SkippedLayer, ...] = ()

    @property
    def role_counts(self) -> dict[Role, int]:
        """How many heads there are of each role in all layers."""
        return {role: sum(layer.role_counts[role] for layer in self.layers) for role in ROLES}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        layers: list[Mapping[str, Any]] = [{**asdict(layer), "role_counts": layer.role_counts} for layer in self.layers]
        return {**asdict(self), "layers": layers, "role_counts": self.role_counts}
