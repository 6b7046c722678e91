"""The shape of one attention layer, as every method sees it."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """Head counts and sizes of one attention layer.

    Args:
        num_heads: query heads.
        num_kv_heads: key/value heads; divides `num_heads`.
        head_dim: size of a query or key vector.
        value_dim: size of a value vector.
        causal: whether a token sees only itself and what came before.
        hidden_size: size of the layer's input, for methods that route on it; None when unknown.

    Raises:
        ValueError: a count is not positive, or `num_kv_heads` does not divide `num_heads`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool = True
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        for field in ("num_heads", "num_kv_heads", "head_dim", "value_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")

    @property
    def num_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)
