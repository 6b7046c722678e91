"""Options that sparse methods share."""

from typing import Literal

from pydantic import Field, model_validator

from ..contract import AttentionOptions
from .slots.scorers import Scorer
from .slots.selectors import Forced, Selector, TopBlocks, TopMass
from .slots.slots import By, Slots

Part = Literal["sparse", "dense"]


class BlockOptions(AttentionOptions):
    """Options of methods that attend to blocks.

    Attributes:
        block: tokens of a block.
        sink_blocks: first blocks of the sequence that are always attended.
        local_blocks: blocks before a token's own one that are always attended; the own one always is.
        dense_len: tokens that a sequence begins with which attend to all before them.
        prefill: whether calls of several tokens choose, or attend to all.
        decode: likewise calls of one token.
    """

    block: int = Field(64, ge=1)
    sink_blocks: int = Field(1, ge=0)
    local_blocks: int = Field(0, ge=0)
    dense_len: int = Field(0, ge=0)
    prefill: Part = "sparse"
    decode: Part = "sparse"

    def slots(self, *, selector: Selector, scorer: Scorer | None = None, by: By = "previous") -> Slots:
        """The slots of a method with these options."""
        return Slots(
            block=self.block,
            scorer=scorer,
            selector=selector,
            by=by,
            forced=Forced(self.sink_blocks, self.local_blocks),
            dense_blocks=self.dense_len // self.block,
            prefill=self.prefill == "sparse",
            decode=self.decode == "sparse",
        )


class BudgetOptions(BlockOptions):
    """Options of methods whose tokens attend so many others each.

    Attributes:
        budget: tokens that each token attends, in whole blocks; null where `density` or `mass` says it.
        density: share of the tokens before it that each token attends, instead of `budget`.
        mass: share of the attention that the chosen blocks are thought to hold, instead of `budget`.
    """

    budget: int | None = Field(1024, ge=1)
    density: float | None = Field(None, gt=0, le=1)
    mass: float | None = Field(None, gt=0, le=1)

    @property
    def selector(self) -> Selector:
        """What chooses."""
        if self.mass is not None:
            return TopMass(self.mass)
        if self.density is not None:
            return TopBlocks(density=self.density)
        return TopBlocks(blocks=max(1, (self.budget or 1) // self.block))


class ChoosingOptions(BlockOptions):
    """Options of methods that choose blocks by what they are thought to hold.

    Attributes:
        mass: share of the attention that the chosen blocks are thought to hold, so that heads whose attention is spread
            out get more of them; 0.9 unless `density` is given.
        density: share of all query-key pairs that are attended, the same for every head; instead of `mass`.
    """

    mass: float | None = Field(None, gt=0, le=1)
    density: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _one_of_both(self) -> "ChoosingOptions":
        if self.mass is not None and self.density is not None:
            raise ValueError("give mass or density, not both")
        return self

    @property
    def selector(self) -> Selector:
        """What chooses."""
        if self.density is not None:
            return TopBlocks(density=self.density)
        return TopMass(0.9 if self.mass is None else self.mass)
