"""Perplexity on a text, block after block, so that it can be told by position in the context and with intervals."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ...recipes.fields import Count, rising
from ..engine.items import Item, Metric
from .base import EvaluatedModel, Outcome, Scope, Task, Unit, register_task
from .perplexity import characters_before, token_losses
from .textdata import TextSettings, Windows, cut_blocks, window_units


class PerplexitySettings(TextSettings):
    """Perplexity on a text.

    Attributes:
        buckets: positions in the context at which buckets end, in rising order: `[512, 2048]` with a context of 8,192
            tells the positions 0-512, 512-2048 and 2048-8192 apart; empty tells none apart.
    """

    kind: Literal["perplexity"] = "perplexity"
    buckets: Annotated[list[Count], AfterValidator(rising)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _buckets_have_an_effect(self) -> "PerplexitySettings":
        if self.buckets and self.buckets[-1] >= self.context:
            raise ValueError(f"a bucket ends at {self.buckets[-1]}, not before the context of {self.context} does")
        return self


@register_task(PerplexitySettings)
class PerplexityTask(Task[PerplexitySettings]):
    """How well a model predicts a text; the sum over all items is what `perplexity` finds for the same tokens."""

    headline = 1
    report_words = "perplexity, by position"
    counts_tokens = True
    metrics = (
        Metric(
            "perplexity",
            "nll",
            "tokens",
            scale="exp",
            compare="ratio",
            meaning="how many tokens the model hesitates between, on average",
        ),
        Metric("bits/char", "bits", "characters", meaning="bits to store a character, whatever the tokens are"),
    )
    slices = (("position",),)

    def units(self, evaluated: EvaluatedModel, scope: Scope) -> Sequence[Unit]:
        """Batches of windows."""
        return window_units(evaluated, scope, self.settings)

    def measure(self, evaluated: EvaluatedModel, unit: Unit) -> Outcome:
        """Score the blocks of one batch of windows."""
        windows: Windows = unit.content
        losses = token_losses(evaluated.model, windows.ids.to(evaluated.device))
        items, buckets, read = [], self.settings.buckets, 0
        for block in cut_blocks(windows, start=1, buckets=buckets):
            # The token at position t is the prediction number t - 1.
            nll = float(losses[block.row, block.start - 1 : block.stop - 1].sum())
            row = windows.ids[block.row]
            before = characters_before(evaluated.tokenizer, row, 1) if block.start == 1 else read
            read = characters_before(evaluated.tokenizer, row, block.stop)
            values = {"nll": nll, "bits": nll / math.log(2)}
            values |= {"tokens": block.stop - block.start, "characters": read - before}
            items.append(Item(block.id, values, {"position": block.bucket} if buckets else {}))
        return Outcome(items)
