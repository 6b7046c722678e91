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
        head: Its number.
        role: What it is for, see `roles`.
        mean_distance: How far away it looks on average.
        distance_90: Distance within which 90 % of its mass lies.
        window_90: Newest tokens that hold 90 % of its mass together with the first four.
        entropy: Of its weights, in nats.
        relative_entropy: The same over its largest possible value.
        sink_mass: Mass on the first four tokens.
        local_mass: Mass on the newest tokens, as many as the diagnosis's `window`.
        streaming_mass: Mass on both.
        monotonicity: Share of the steps at which its centre does not move back.
        induction: Mass on what followed the same token earlier; None for a head that sees both ways.
        behind: Mean distance of what it sees before the query.
        ahead: Mean distance of what it sees after the query; 0 for causal heads.
        mass_ahead: Mass on what is after the query; 0 for causal heads.
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
        index: Its number, as recipes count layers.
        name: Its name in the model.
        heads: Its heads.
        causal: Whether a token sees only itself and what came before.
        native_window: Newest tokens that it sees by itself; None if there is no such limit.
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
        index: Its number, as recipes count layers.
        name: Its name in the model.
        reason: Why not.
    """

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """The answer of `diagnose_model`.

    Attributes:
        source: The model as it was named.
        model_type: Its type in transformers.
        text: The text as it was named.
        tokens: Tokens of the text that were used.
        context: Tokens in a window of it.
        window: Newest tokens that count as near.
        layers: The layers in order.
        skipped: Those that could not be diagnosed.
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
