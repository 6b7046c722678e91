"""Whether a model finds what was hidden in a long prompt, by length and depth."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...errors import CheckpointError, DataError
from ...recipes.fields import Count, CountOrZero
from ..engine.items import Item, Metric
from ..engine.models import positions_of
from .base import EvaluatedModel, Outcome, Scope, Task, TaskSettings, Unit, register_task
from .generation import end_tokens, generating_by
from .haystack import Haystack, fit, make_prompt
from .packaged import data_file
from .rows import read_rows
from .textfile import read_documents

logger = logging.getLogger(__name__)

# Tokens in one forward pass at most, unless one prompt is longer.
TOKENS_AT_ONCE = 8_192
# Tasks that ask for one fact, which can be put at a depth.
AT_DEPTH = ("passkey", "multi_key")
NEW_TOKENS = {"passkey": 10, "multi_key": 10, "file": 10, "common_words": 32}
MANY_NEW_TOKENS = 48
DISTRACTORS = {"multi_key": 3}
# To what the lengths of prompts from a file are rounded.
ROUNDING = 100

Depth = Annotated[float, Field(ge=0, le=1)]


class RetrievalSettings(TaskSettings):
    """Settings of `retrieval`.

    Attributes:
        task: `passkey` (a number), `multi_key` (a number among others of other names), `multi_value` (all numbers of a
            name), `multi_query` (the numbers of several names), `variable_tracking` (all names that stand for a
            number), `common_words` (the words that come most often in a list), or `file` (prompts from `data`).
        lengths: tokens of the prompts, of the model's tokenizer.
        depths: where in the text the fact is, from 0 to 1; for tasks that ask for one fact.
        samples: prompts for each length and depth.
        distractors: facts of the same kind that are not asked for; None means 3 for `multi_key`, else none.
        seed: what all is drawn from.
        data: the text to hide things in, packaged (`book`) or a file; for `file` a file of JSON lines with prompt and
            answer (one text or several), and depth and chars where known.
        new_tokens: tokens generated; None means 10 for one number, more where more is asked.
    """

    kind: Literal["retrieval"] = "retrieval"
    task: Literal["passkey", "multi_key", "multi_value", "multi_query", "variable_tracking", "common_words", "file"] = (
        "passkey"
    )
    lengths: tuple[Count, ...] = Field((512, 1024, 2048), min_length=1)
    depths: tuple[Depth, ...] = Field((0.1, 0.5, 0.9), min_length=1)
    samples: Count = 4
    distractors: CountOrZero | None = None
    seed: int = 0
    data: str = "book"
    new_tokens: Count | None = None

    @model_validator(mode="after")
    def _names_its_file(self) -> "RetrievalSettings":
        if self.task == "file" and "data" not in self.model_fields_set:
            raise ValueError("task: file needs data, a file of JSON lines with prompt and answer")
        return self


@dataclass(frozen=True)
class Question:
    """A prompt as tokens.

    Attributes:
        id: the same for every model.
        ids: the prompt.
        answers: what the continuation must contain.
        group: its task, length and depth.
    """

    id: str
    ids: Sequence[int] = field(repr=False)
    answers: tuple[str, ...]
    group: dict[str, str | int | float]


@register_task(RetrievalSettings)
class RetrievalTask(Task[RetrievalSettings]):
    """The share of hidden facts that a model's greedy continuation contains."""

    headline = 2
    report_words = "retrieval by length and depth"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("recall", "found", better="higher", style="percent", meaning="hidden facts that the model names"),
    )
    slices: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("length",),
        ("length", "depth"),
        ("chars",),
        ("chars", "depth"),
    )

    def __init__(self, settings: RetrievalSettings) -> None:
        super().__init__(settings)
        used = {"task", "kind", "limit", "data", "new_tokens"}
        if settings.task != "file":
            used |= {"lengths", "samples", "seed"}
            used |= {"depths"} if settings.task in AT_DEPTH else set()
            used |= {"distractors"} if settings.task != "common_words" else set()
        for name in sorted(settings.model_fields_set - used):
            logger.warning("%s has no effect on retrieval task %s.", name, settings.task)

    @property
    def new_tokens(self) -> int:
        """Tokens generated behind each prompt."""
        return self.settings.new_tokens or NEW_TOKENS.get(self.settings.task, MANY_NEW_TOKENS)

    def units(self, evaluated: EvaluatedModel, scope: Scope) -> Sequence[Unit]:
        """Batches of prompts of about one length."""
        read = self._from_file if self.settings.task == "file" else self._made_up
        by_length: dict[Any, list[Question]] = {}
        for question in read(evaluated, scope.limit):
            by_length.setdefault(question.group.get("length", question.group.get("chars")), []).append(question)
        units = []
        for questions in by_length.values():
            longest = max(len(question.ids) for question in questions) + self.new_tokens
            size = max(1, min(scope.batch_size, TOKENS_AT_ONCE // longest))
            batches = [questions[start : start + size] for start in range(0, len(questions), size)]
            units += [Unit(sum(len(question.ids) + self.new_tokens for question in batch), batch) for batch in batches]
        return units

    def measure(self, evaluated: EvaluatedModel, unit: Unit) -> Outcome:
        """Let the model continue a batch of prompts."""
        questions: Sequence[Question] = unit.content
        texts = continuations(evaluated.model, evaluated.tokenizer, [q.ids for q in questions], self.new_tokens)
        return Outcome([_item(question, text) for question, text in zip(questions, texts, strict=True)])

    def _made_up(self, evaluated: EvaluatedModel, limit: int | None) -> list[Question]:
        settings = self.settings
        haystack = Haystack("\n\n".join(read_documents(data_file(settings.data))))
        lengths = self._lengths(evaluated)
        depths = list(dict.fromkeys(settings.depths)) if settings.task in AT_DEPTH else [None]
        cells = [(sample, *cell) for sample in range(settings.samples) for cell in interleave(lengths, depths)]
        questions = []
        room = positions_of(evaluated.checkpoint) - self.new_tokens
        distractors = settings.distractors
        if distractors is None:
            distractors = DISTRACTORS.get(settings.task, 0)
        for sample, length, depth in cells[:limit]:
            group: dict[str, str | int | float] = {"task": settings.task, "length": length}
            if depth is not None:
                group["depth"] = depth
            name = "/".join(map(str, [*group.values(), sample]))
            prompt = make_prompt(
                settings.task, haystack, Random(f"{settings.seed}/{name}"), depth=depth or 0.0, distractors=distractors
            )
            ids = fit(prompt, lambda text: encode(evaluated.tokenizer, text), int(min(length, room)))
            questions.append(Question(name, ids, prompt.answers, group))
        return questions

    def _lengths(self, evaluated: EvaluatedModel) -> list[int]:
        """The lengths that the model has positions for."""
        positions = positions_of(evaluated.checkpoint)
        wanted = list(dict.fromkeys(self.settings.lengths))
        lengths = [length for length in wanted if length <= positions]
        _check_dropped(evaluated, wanted, lengths, positions, "lengths")
        return lengths

    def _from_file(self, evaluated: EvaluatedModel, limit: int | None) -> list[Question]:
        path = data_file(self.settings.data)
        positions = positions_of(evaluated.checkpoint)
        found: list[Question] = []
        for number, row in enumerate(read_rows(path)):
            prompt, answers = row.get("prompt"), row.get("answer")
            answers = [answers] if isinstance(answers, str) else answers
            if not isinstance(prompt, str) or not isinstance(answers, list) or not _are_texts(answers):
                raise DataError(f'Row {number + 1} of {path} has no text under "prompt" or none under "answer".')
            ids = encode(evaluated.tokenizer, prompt)
            group: dict[str, str | int | float] = {"task": "file"}
            if isinstance(row.get("chars"), int):
                group["chars"] = row["chars"]
            else:
                group["length"] = max(ROUNDING, ROUNDING * round(len(ids) / ROUNDING))
            if isinstance(row.get("depth"), int | float):
                group["depth"] = row["depth"]
            found.append(Question(f"file/{number}", ids, tuple(answers), group))
        kept = [question for question in found if len(question.ids) + self.new_tokens <= positions]
        _check_dropped(evaluated, [len(q.ids) for q in found], [len(q.ids) for q in kept], positions, "prompts")
        return _evenly(kept)[:limit]


def _are_texts(values: Sequence[object]) -> bool:
    return bool(values) and all(isinstance(value, str) and value for value in values)


def _check_dropped(
    evaluated: EvaluatedModel, wanted: Sequence[int], kept: Sequence[int], positions: float, what: str
) -> None:
    """Say which lengths are left out because the model has no positions for them.

    Raises:
        DataError: all of them are, or there are none.
    """
    if not wanted:
        raise DataError(f"There are no {what} to measure {evaluated.source} on.")
    if not kept:
        raise DataError(
            f"All {what} are too long for the {positions:g} positions of {evaluated.source}: the shortest has "
            f"{min(wanted)} tokens."
        )
    if len(kept) < len(wanted):
        logger.warning(
            "%d of %d %s are left out: %s has %g positions.",
            len(wanted) - len(kept), len(wanted), what, evaluated.source, positions,
        )  # fmt: skip


def interleave(lengths: Sequence[int], depths: Sequence[Any]) -> list[tuple[int, Any]]:
    """All pairs, in an order of which every beginning covers lengths and depths as evenly as can be."""
    return [
        (length, depths[(index + shift) % len(depths)])
        for shift in range(len(depths))
        for index, length in enumerate(lengths)
    ]


def _evenly(questions: Iterable[Question]) -> list[Question]:
    """Questions in an order of which every beginning covers lengths and depths evenly."""
    cells: dict[tuple[Any, Any], list[Question]] = {}
    for question in questions:
        group = question.group
        cells.setdefault((group.get("chars", group.get("length")), group.get("depth")), []).append(question)
    order = interleave(*(list(dict.fromkeys(part)) for part in zip(*cells, strict=True)))
    columns = [cells[cell] for cell in order if cell in cells]
    longest = max(map(len, columns))
    return [column[index] for index in range(longest) for column in columns if index < len(column)]


def _item(question: Question, text: str) -> Item:
    found = sum(answer.lower() in text.lower() for answer in question.answers) / len(question.answers)
    return Item(question.id, {"found": found}, question.group, f"{', '.join(question.answers)} | {text.strip()}")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A prompt's tokens, with what the tokenizer puts before every text."""
    # verbose=False: that a prompt may be too long is dealt with elsewhere.
    return list(tokenizer(text, verbose=False)["input_ids"])


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[str]:
    """What a model adds to prompts, always the most likely token; shorter prompts are padded on the left.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        prompts: tokens of each prompt.
        new_tokens: tokens added to each at most.

    Raises:
        CheckpointError: the model generates no text.
    """
    if not model.can_generate():
        raise CheckpointError(f"{type(model).__name__} generates no text.")
    ends = end_tokens(model, tokenizer)
    pad = ends[0] if ends else 0
    longest = max(map(len, prompts))
    missing = [longest - len(prompt) for prompt in prompts]
    rows = [[pad] * gap + list(prompt) for gap, prompt in zip(missing, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in missing]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends or None, pad_token_id=pad, use_cache=True
    )
    generate: Any = model.generate
    with generating_by(model, config):
        output = generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
        )
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in output[:, longest:].tolist()]
