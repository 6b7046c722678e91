"""One row of the invariant matrix."""

from dataclasses import dataclass, field
from typing import Any

WIDE = {"window": 4096}
PURE = "a linear method has no setting in which it is softmax"


@dataclass(frozen=True)
class Row:
    """One method with one set of options.

    `degenerate` holds the options under which the method is softmax attention (None: there are none, with the reason).
    The oracle of one that `walks` goes from token to token, so it is not drawn long.
    A row that is not `bidirectional` is refused for layers that look both ways, one that is not `causal` for others.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    degenerate: dict[str, Any] | None = None
    no_degenerate_because: str = ""
    bidirectional: bool = True
    causal: bool = True
    walks: bool = False

    @property
    def directions(self) -> list[bool]:
        """Whether a layer is causal, as far as the method can serve it."""
        return [causal for causal in (True, False) if (self.causal if causal else self.bidirectional)]

    @property
    def id(self) -> str:
        return "-".join([self.method, *(f"{k}={v}" for k, v in self.options.items())])
