"""What a conversion says of itself when it is done."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..convert.planning.plan import Plan
from ..convert.rewriting.exactness import Exactness


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did.

    Attributes:
        output: the folder written.
        plan: what was converted how.
        metrics: one row per moment, in order, each with its `"stage"`: `"teacher"`, `"rewrite"` where a rewrite
            changed what the model computes, `"swap"` where attention was converted, then the stages; with
            `"perplexity"` and `"bits_per_character"` if the recipe asks for them, and, for stages, `"loss"`,
            `"tokens"` and `"tokens_per_second"`, or `"images"` and `"images_per_second"`.
        start_distance: how far the layers' outputs were from softmax attention's right after the swap; empty if no
            stage has text to measure it on.
        seconds: wall time.
        exactness: how far the rewritten model was from its source; None without a rewrite.
        self_contained: whether the output brings all its code along.
        linked: whether weight files of the output are hard links to the base's: who overwrites those changes both.
    """

    output: Path
    plan: Plan = field(repr=False)
    metrics: tuple[Mapping[str, Any], ...] = field(repr=False)
    start_distance: Mapping[str, float]
    seconds: float
    exactness: Exactness | None = field(default=None, repr=False)
    self_contained: bool = field(default=False, repr=False)
    linked: bool = field(default=False, repr=False)
