"""How much a model repeats itself, and how soon it ends, where it goes on with a text as it likes."""

from collections.abc import Sequence
from typing import Literal

from ...recipes.fields import Count
from ..engine.items import Item, Metric
from .base import EvaluatedModel, Outcome, Scope, Task, Unit, register_task
from .generation import Prompts, PromptSettings, continue_greedily, end_tokens, prompt_units

# Tokens in a row that count as repeated where they stood before.
GRAM = 4


class ContinuationsSettings(PromptSettings):
    """Greedy continuations of pieces of a text, each model by itself."""

    kind: Literal["continuations"] = "continuations"
    new_tokens: Count = 128


@register_task(ContinuationsSettings)
class ContinuationsTask(Task[ContinuationsSettings]):
    """Repeated tokens and length of what a model writes behind prompts, always with the most likely token."""

    metrics = (
        Metric(
            "repetition",
            "repeated",
            "grams",
            style="percent",
            meaning=f"{GRAM} tokens in a row that stood in the continuation before",
        ),
        Metric("length", "new", meaning="tokens until the model ends its text, or all that it may write"),
    )

    def units(self, evaluated: EvaluatedModel, scope: Scope) -> Sequence[Unit]:
        """Batches of prompts."""
        return prompt_units(evaluated, scope, self.settings)

    def measure(self, evaluated: EvaluatedModel, unit: Unit) -> Outcome:
        """Write and look at one batch."""
        prompts: Prompts = unit.content
        ends = end_tokens(evaluated.model, evaluated.tokenizer)
        written = continue_greedily(evaluated.model, prompts.ids, self.settings.new_tokens, ends)
        items = []
        for index, ids in enumerate(written):
            repeated, grams = repetition(ids)
            values = {"repeated": repeated, "grams": grams, "new": len(ids)}
            note = str(evaluated.tokenizer.decode(ids, skip_special_tokens=True))
            items.append(Item(f"prompt {prompts.first + index}", values, note=note))
        return Outcome(items)


def repetition(ids: Sequence[int]) -> tuple[int, int]:
    """How many runs of `GRAM` tokens stood before, and how many there are."""
    grams = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)
