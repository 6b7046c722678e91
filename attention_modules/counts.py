"""Numbers of what attention modules did, as they are counted, kept in files and told."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..formats import counted, number, percent, ratio, size


@dataclass
class Counts:
    """Sums over the calls of one attention module, or of several.

    Pairs are those of a real query and a real token, counted once for all heads.

    Attributes:
        calls: times that a module ran.
        queries: real tokens that attended.
        exact_pairs: pairs with a weight of the token's own.
        summarized_pairs: pairs in which the token is seen through a state or other summary.
        dense_pairs: pairs that softmax attention would have had.
        head_queries: queries times the heads that served them.
        head_slots: queries times the heads that there are.
        state_bytes: bytes of the largest state after a call, room for more tokens included.
        multiply_adds: products of attention by its definition, token by token, without projections and feature maps;
            forms in chunks or blocks do more.
        dense_multiply_adds: those that softmax attention would have had.
    """

    calls: int = 0
    queries: int = 0
    exact_pairs: int = 0
    summarized_pairs: int = 0
    dense_pairs: int = 0
    head_queries: int = 0
    head_slots: int = 0
    state_bytes: int = 0
    multiply_adds: int = 0
    dense_multiply_adds: int = 0

    @property
    def density(self) -> float:
        """Pairs attended exactly over those of softmax attention; 0 where there are none."""
        return self.exact_pairs / self.dense_pairs if self.dense_pairs else 0.0

    @property
    def tokens_per_query(self) -> float:
        """Tokens that a query attends exactly, on average."""
        return self.exact_pairs / self.queries if self.queries else 0.0

    @property
    def heads(self) -> float:
        """Heads that serve a query, on average."""
        return self.head_queries / self.queries if self.queries else 0.0

    @property
    def summarized(self) -> float:
        """Pairs seen through a state over those of softmax attention; 0 where there are none."""
        return self.summarized_pairs / self.dense_pairs if self.dense_pairs else 0.0

    @property
    def work(self) -> float:
        """Multiply-adds over those of softmax attention; 0 where there are none."""
        return self.multiply_adds / self.dense_multiply_adds if self.dense_multiply_adds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the sums, and what is made of them."""
        names = ("density", "summarized", "tokens_per_query", "heads", "work")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Counts":
        """What `to_dict` gave; sums that it lacks are zero."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def summed(counts: Iterable[Counts]) -> Counts:
    """Those of several modules together; their states add up, for they are there at the same time."""
    found = list(counts)
    return Counts(**{f.name: sum(getattr(one, f.name) for one in found) for f in fields(Counts)})


@dataclass(frozen=True)
class AttentionCounts:
    """What the converted layers of a model did in one forward pass.

    Attributes:
        tokens: tokens of each sequence, those before the pass included.
        layers: of each converted layer, by the module's name.
    """

    tokens: int
    layers: Mapping[str, Counts]

    @property
    def total(self) -> Counts:
        """All layers together."""
        return summed(self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        layers = {name: counts.to_dict() for name, counts in self.layers.items()}
        return {"tokens": self.tokens, "total": self.total.to_dict(), "layers": layers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AttentionCounts":
        """What `to_dict` gave."""
        return cls(values["tokens"], {name: Counts.from_dict(one) for name, one in values["layers"].items()})

    @property
    def sentence(self) -> str:
        """The figures of all layers in a few words, without a full stop."""
        total = self.total
        words = [f"{percent(total.density)} of each query's tokens one by one ({number(total.tokens_per_query)})"]
        if total.summarized_pairs:
            words.append(f"{percent(total.summarized)} through a state")
        if total.head_queries != total.head_slots:
            words.append(f"{percent(total.head_queries / total.head_slots)} of the heads")
        words.append(f"{ratio(total.work, 3)} the multiply-adds of dense attention")
        if total.state_bytes:
            words.append(f"a state of {size(total.state_bytes)}")
        return f"at {counted(self.tokens, 'token')} {', '.join(words)}"
