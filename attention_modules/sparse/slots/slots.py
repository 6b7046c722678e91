"""The choices that make a sparse method."""

from dataclasses import dataclass, field
from typing import Literal

from .scorers import Scorer
from .selectors import Forced, Selector

By = Literal["token", "first", "previous", "block"]


@dataclass(frozen=True)
class Slots:
    """What a method chooses by.

    Attributes:
        block: tokens of a block of keys, and of a block of queries that share a choice.
        scorer: what says how much a block of keys holds; None for patterns, which look at nothing.
        selector: what chooses by that.
        by: whose queries choose for a block of them. `token`: each for itself; `first`: the block's first; `previous`:
            those of the block before; `block`: all its own, as most papers have it, with which a token's choice hangs
            on tokens after it: chunks of a prompt, and prompts of other lengths, choose otherwise.
        forced: blocks that are attended whatever is chosen.
        dense_blocks: queries in so many first blocks of a row attend to all before them.
        prefill: whether calls of several tokens are sparse, or dense.
        decode: likewise those of one token.
    """

    block: int
    scorer: Scorer | None
    selector: Selector
    by: By = "previous"
    forced: Forced = field(default_factory=Forced)
    dense_blocks: int = 0
    prefill: bool = True
    decode: bool = True

    @property
    def earlier_queries(self) -> int:
        """Newest queries before a call's own that choices look at."""
        return 0 if self.scorer is None else queries_before(self.by, self.block)


def queries_before(by: By, block: int) -> int:
    """Newest queries before a call's own that a choice by these looks at."""
    return {"token": 0, "first": block - 1, "previous": 2 * block - 1, "block": 0}[by]
