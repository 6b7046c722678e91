"""How long a model's greedy continuations stay those of its base."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...errors import CheckpointError, DataError
from ...recipes.fields import Count, Text
from ..engine.items import Item, Metric
from ..engine.models import positions_of
from .base import EvaluatedModel, Outcome, Scope, Task, TaskSettings, Unit, register_task
from .packaged import data_file
from .textdata import TwoOrMore, comparable_base
from .textfile import load_tokens

logger = logging.getLogger(__name__)

# Tokens of a text that prompts are taken from; more would only cost time.
TOKENS_READ = 2**17


class PromptSettings(TaskSettings):
    """Settings of tasks that let models go on with pieces of a text.

    Attributes:
        data: name of a packaged text, or path of a `.txt` or `.jsonl` file, or of either with `.gz` behind it.
        field: the key that holds the text in each JSON line.
        prompts: pieces taken from the text, at even distances.
        prompt_tokens: length of each.
        new_tokens: tokens generated after each, unless the model ends its text earlier.
    """

    data: Text = "book"
    field: Text = "text"
    prompts: Count = 8
    prompt_tokens: TwoOrMore = 128
    new_tokens: Count = 32


class GenerationSettings(PromptSettings):
    """Greedy continuations of pieces of a text, compared."""

    kind: Literal["generation"] = "generation"


@dataclass(frozen=True)
class Prompts:
    """Prompts of one batch.

    Attributes:
        first: number of the first one.
        ids: `[batch, prompt_tokens]` int64.
    """

    first: int
    ids: torch.Tensor


@register_task(GenerationSettings)
class GenerationTask(Task[GenerationSettings]):
    """Lets both models continue the same prompts through their caches, always with the most likely token."""

    headline = 6
    needs_base = True
    metrics = (
        Metric(
            "matching tokens",
            "matching",
            "new",
            better="higher",
            style="percent",
            meaning="tokens of the base's continuation that come before the first difference",
        ),
        Metric(
            "identical answers",
            "identical",
            better="higher",
            style="percent",
            meaning="continuations without any difference",
        ),
    )

    def units(self, evaluated: EvaluatedModel, scope: Scope) -> Sequence[Unit]:
        """Batches of prompts."""
        if evaluated.base is not None:
            comparable_base(evaluated, 0)
        return prompt_units(evaluated, scope, self.settings, models=2)

    def measure(self, evaluated: EvaluatedModel, unit: Unit) -> Outcome:
        """Score the continuations of one batch of prompts."""
        prompts: Prompts = unit.content
        count = self.settings.new_tokens
        base = comparable_base(evaluated, prompts.ids.shape[1] + count)
        ends = end_tokens(base.model, base.tokenizer)
        expected = continue_greedily(base.model, prompts.ids, count, ends)
        answers = continue_greedily(evaluated.model, prompts.ids, count, ends)
        items = []
        for index, (wanted, answer) in enumerate(zip(expected, answers, strict=True)):
            values = {"matching": matching(wanted, answer), "new": len(wanted), "identical": int(wanted == answer)}
            texts = [evaluated.tokenizer.decode(ids, skip_special_tokens=True) for ids in (wanted, answer)]
            note = f"base: {texts[0]}\nmodel: {texts[1]}"
            items.append(Item(f"prompt {prompts.first + index}", values, note=note))
        return Outcome(items)


def prompt_units(evaluated: EvaluatedModel, scope: Scope, settings: PromptSettings, *, models: int = 1) -> list[Unit]:
    """Batches of prompts, as `Prompts`, for so many models at a time.

    Raises:
        DataError: the text cannot be read, or the model has too few positions.
    """
    needed, positions = settings.prompt_tokens + settings.new_tokens, positions_of(evaluated.checkpoint)
    if needed > positions:
        raise DataError(
            f"{settings.prompt_tokens} prompt_tokens and {settings.new_tokens} new_tokens are more than the "
            f"{positions} positions of {evaluated.source}."
        )
    prompts = cut_prompts(evaluated.tokenizer, settings)[: scope.limit]
    units = []
    for first in range(0, len(prompts), scope.batch_size):
        batch = prompts[first : first + scope.batch_size]
        units.append(Unit(models * len(batch) * needed, Prompts(first, batch)))
    return units


def cut_prompts(tokenizer: PreTrainedTokenizerBase, settings: PromptSettings) -> torch.Tensor:
    """Pieces of a text at even distances, that do not overlap.

    Returns:
        `[prompts, prompt_tokens]` int64, each beginning with the BOS token if the tokenizer begins texts with one;
        fewer prompts than asked for if the text is too short for more.

    Raises:
        DataError: the text cannot be read, or is too short for one prompt.
    """
    length = settings.prompt_tokens
    path = data_file(settings.data)
    ids = load_tokens(path, tokenizer, context=length, field=settings.field, limit=TOKENS_READ)
    # Each piece of this length begins with BOS where the model wants it, so any of them is a prompt.
    pieces = ids[: ids.numel() // length * length].view(-1, length)
    if not len(pieces):
        raise DataError(f"{path} holds {ids.numel()} tokens, which is less than one prompt of {length} tokens.")
    count = min(settings.prompts, len(pieces))
    if count < settings.prompts:
        logger.warning("%s is long enough for %d prompts of %d tokens, not %d.", path, count, length, settings.prompts)
    return pieces[torch.arange(count) * len(pieces) // count]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens after which a model's text is over."""
    ends: Any = model.generation_config.eos_token_id if model.generation_config else None
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else [int(end) for end in ends]


def continue_greedily(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, ends: Sequence[int]
) -> list[list[int]]:
    """Append the most likely token again and again, through the model's cache.

    Args:
        model: a causal language model in eval mode.
        prompts: `[batch, tokens]`.
        new_tokens: tokens appended to each at most.
        ends: tokens that end a continuation; they belong to it.

    Raises:
        CheckpointError: the model generates no text.
    """
    if not model.can_generate():
        raise CheckpointError(f"{type(model).__name__} generates no text.")
    ids = prompts.to(model.device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
    )
    generate: Any = model.generate
    with generating_by(model, config):
        output = generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return [_until_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]


@contextmanager
def generating_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Within the context the model's own settings (temperatures, penalties, lengths) cannot mix with these."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """A continuation without the padding behind its end."""
    over = [index for index, token in enumerate(ids) if token in ends]
    return ids[: over[0] + 1] if over else ids


def matching(expected: Sequence[int], answer: Sequence[int]) -> int:
    """Tokens that are equal before the first difference."""
    count = 0
    for wanted, token in zip(expected, answer, strict=False):
        if wanted != token:
            break
        count += 1
    return count
