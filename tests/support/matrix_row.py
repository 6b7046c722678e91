"""One row of the invariant matrix."""

from dataclasses import dataclass, field, replace
from typing import Any

from attnconv.attention_modules import Geometry

WIDE = {"window": 4096}
PURE = "a linear method has no setting in which it is softmax"


@dataclass(frozen=True)
class Row:
    """One method with one set of options.

    `degenerate` holds the options under which the method is softmax attention (None: there are none, with the reason).
    The oracle of one that `walks` goes from token to token, so it is not drawn long.
    One that is `for_long_tests` is not drawn elsewhere: what sets it apart is seen by itself in tests of its own.
    Where head counts must have a factor, geometries are `widened` by it: query heads, KV heads.
    A row that is not `bidirectional` is refused for layers that look both ways, one that is not `causal` for others.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    degenerate: dict[str, Any] | None = None
    no_degenerate_because: str = ""
    bidirectional: bool = True
    causal: bool = True
    walks: bool = False
    for_long_tests: bool = False
    widened: tuple[int, int] = (1, 1)

    @property
    def directions(self) -> list[bool]:
        """Whether a layer is causal, as far as the method can serve it."""
        return [causal for causal in (True, False) if (self.causal if causal else self.bidirectional)]

    def widen(self, geometry: Geometry) -> Geometry:
        """A geometry that the method can serve with these options."""
        heads, kv_heads = geometry.num_heads * self.widened[0], geometry.num_kv_heads * self.widened[1]
        return replace(geometry, num_heads=heads, num_kv_heads=kv_heads)

    @property
    def id(self) -> str:
        return "-".join([self.method, *(f"{k}={v}" for k, v in self.options.items())])
