"""What the stages of a recipe will read, from the recipe alone."""

from dataclasses import dataclass

from ...recipes import Recipe, StageBase


@dataclass(frozen=True)
class StageOutlook:
    """What a stage reads on one device.

    Attributes:
        kind: what the stage is.
        steps: its steps.
        tokens: its tokens, in whole steps; its images where it reads those.
        tokens_per_step: tokens or images of a step.
        lengths: tokens of its sequences, in the order of the schedule; empty for images.
    """

    kind: str
    steps: int
    tokens: int
    tokens_per_step: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, stage: StageBase) -> "StageOutlook":
        """What a stage of a recipe reads."""
        steps = stage.num_steps
        return cls(stage.kind, steps, steps * stage.tokens_per_step, stage.tokens_per_step, stage.lengths)


def outlook_of(recipe: Recipe | None) -> tuple[StageOutlook, ...]:
    """What the stages of a recipe read, in order; nothing without a recipe."""
    return () if recipe is None else tuple(StageOutlook.of(stage) for stage in recipe.stages)
