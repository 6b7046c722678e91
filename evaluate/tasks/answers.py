"""Short answers that a model really writes, checked, beside which of some answers it finds likeliest.

Choosing among given answers flatters a converted model: one may choose as its base does and still not be able to write
the answer down. Both are measured on the same questions here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal

from pydantic import Field

from ...errors import DataError
from ...recipes.fields import Count, CountOrZero
from ..engine.items import Item, Metric
from ..engine.models import positions_of
from .base import EvaluatedModel, Outcome, Scope, Task, TaskSettings, Unit, register_task
from .haystack import CITIES
from .multiple_choice import load_questions
from .retrieval import continuations, encode
from .scoring import Continuation, encode_pair, log_likelihoods

WORDS = tuple(CITIES.split())


class AnswersSettings(TaskSettings):
    """Settings of `answers`.

    Attributes:
        task: `copy` (words said again), `list_recall` (the word with a number), `arithmetic` (a sum of two numbers),
            `format` (a word in the brackets that examples show), or `questions` (those of `data`).
        data: for `questions`: as for `multiple_choice`.
        samples: how many questions; of `data` as many as it has at most.
        examples: solved ones before each question.
        new_tokens: tokens generated at most; what stands in their first line is the answer.
        seed: what all is drawn from.
    """

    kind: Literal["answers"] = "answers"
    task: Literal["copy", "list_recall", "arithmetic", "format", "questions"] = "copy"
    data: str = "commonsenseqa"
    samples: Count = 48
    examples: CountOrZero = Field(3, le=32)
    new_tokens: Count = 24
    seed: int = 0


@dataclass(frozen=True)
class Exercise:
    """Something to answer.

    Attributes:
        question: how it is put, up to where the answer begins.
        choices: answers, without the space before them; the first is the right one.
    """

    question: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """An exercise behind solved ones.

    Attributes:
        id: the same for every model.
        text: up to where the answer begins.
        choices: as in `Exercise`.
        ids: the text's tokens.
        scored: the choices behind it, as tokens.
    """

    id: str
    text: str
    choices: tuple[str, ...]
    ids: Sequence[int]
    scored: tuple[Continuation, ...]


@register_task(AnswersSettings)
class AnswersTask(Task[AnswersSettings]):
    """Answers written token by token, and chosen by their likelihood, on the same questions."""

    headline = 4
    report_words = "short answers that are really written"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("written answers", "written", better="higher", style="percent", meaning="the right answer is written"),
        Metric(
            "chosen answers",
            "chosen",
            better="higher",
            style="percent",
            meaning="the right answer is the likeliest of those given",
        ),
        Metric(
            "chosen but not written",
            "gap",
            style="percent",
            meaning="chosen answers less written ones, on the same questions",
        ),
    )

    def units(self, evaluated: EvaluatedModel, scope: Scope) -> Sequence[Unit]:
        """Batches of prompts, the longest first."""
        settings, positions = self.settings, positions_of(evaluated.checkpoint)
        prompts = [self._encoded(evaluated, positions, *given) for given in make_prompts(settings)[: scope.limit]]
        prompts.sort(key=lambda prompt: -len(prompt.ids))
        units = []
        for start in range(0, len(prompts), scope.batch_size):
            batch = prompts[start : start + scope.batch_size]
            read = sum(len(p.ids) + settings.new_tokens + sum(len(c.key) for c in p.scored) for p in batch)
            units.append(Unit(read, batch))
        return units

    def _encoded(
        self, evaluated: EvaluatedModel, positions: float, name: str, text: str, choices: tuple[str, ...]
    ) -> Prompt:
        ids = encode(evaluated.tokenizer, text)
        if len(ids) + self.settings.new_tokens > positions:
            raise DataError(
                f"A question with {self.settings.examples} examples takes {len(ids)} tokens, and with "
                f"{self.settings.new_tokens} new_tokens that is more than the {positions:g} positions of "
                f"{evaluated.source}: give fewer examples."
            )
        scored = (encode_pair(evaluated.tokenizer, text, f" {choice}", longest=positions) for choice in choices)
        return Prompt(name, text, choices, ids, tuple(scored))

    def measure(self, evaluated: EvaluatedModel, unit: Unit) -> Outcome:
        """Write the answers to a batch of prompts, and score those that are given."""
        batch: Sequence[Prompt] = unit.content
        model, tokenizer = evaluated.model, evaluated.tokenizer
        texts = continuations(model, tokenizer, [prompt.ids for prompt in batch], self.settings.new_tokens)
        flat = [choice for prompt in batch for choice in prompt.scored]
        scores = iter(log_likelihoods(model, flat, batch_size=len(batch), pad=tokenizer.pad_token_id or 0))
        items = []
        for prompt, text in zip(batch, texts, strict=True):
            items.append(_item(prompt, text, [next(scores) for _ in prompt.scored]))
        return Outcome(items)


def _item(prompt: Prompt, text: str, scores: Sequence[float]) -> Item:
    answer = text.strip().splitlines()[0].strip() if text.strip() else ""
    written = float(answer.rstrip(".").casefold() == prompt.choices[0].rstrip(".").casefold())
    # A broken model, which scores nothing, chooses nothing.
    chosen = float(not math.isnan(scores[0]) and all(scores[0] > other for other in scores[1:]))
    values = {"written": written, "chosen": chosen, "gap": chosen - written}
    return Item(prompt.id, values, note=f"{prompt.choices[0]} | {answer}")


def make_prompts(settings: AnswersSettings) -> list[tuple[str, str, tuple[str, ...]]]:
    """Id, text and choices of each prompt; the same for the same settings.

    Raises:
        DataError: the questions cannot be read, or are too few for examples and a question.
    """
    rng = Random(f"{settings.seed}/{settings.task}")
    if settings.task == "questions":
        exercises = _questions(settings)
    else:
        count = settings.examples + settings.samples
        exercises = [EXERCISES[settings.task](rng) for _ in range(count)]
    solved, asked = exercises[: settings.examples], exercises[settings.examples :]
    head = "".join(f"{one.question} {one.choices[0]}\n\n" for one in solved)
    return [(f"{settings.task}/{i}", head + one.question, one.choices) for i, one in enumerate(asked)]


def _questions(settings: AnswersSettings) -> list[Exercise]:
    questions = load_questions(settings.data, limit=settings.examples + settings.samples)
    if len(questions) <= settings.examples:
        raise DataError(
            f"{settings.data} has {len(questions)} questions, which are not enough for {settings.examples} examples "
            "and one more."
        )
    found = []
    for question in questions:
        right = question.choices[question.label]
        others = tuple(choice for choice in question.choices if choice != right)
        found.append(Exercise(question.context, (right, *others)))
    return found


def _copy(rng: Random) -> Exercise:
    words = rng.sample(WORDS, 5)
    others = {" ".join(rng.sample(words, 5)) for _ in range(6)} - {" ".join(words)}
    return Exercise(f"Say again: {' '.join(words)}\nAnswer:", (" ".join(words), *sorted(others)[:3]))


def _list_recall(rng: Random) -> Exercise:
    words, wanted = rng.sample(WORDS, 5), rng.randrange(5)
    listed = ", ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    others = tuple(word for word in words if word != words[wanted])
    return Exercise(f"List: {listed}\nQuestion: What is number {wanted + 1}?\nAnswer:", (words[wanted], *others))


def _arithmetic(rng: Random) -> Exercise:
    one, two = rng.randint(2, 49), rng.randint(2, 49)
    others = dict.fromkeys(abs(one + two + step) for step in (-10, -2, -1, 1, 2, 10))
    return Exercise(f"Question: {one} + {two}\nAnswer:", (str(one + two), *map(str, others)))


def _format(rng: Random) -> Exercise:
    word = rng.choice(WORDS)
    forms = f"[[{word.upper()}]]", f"[{word.upper()}]", f"[[{word}]]", word
    return Exercise(f"Word: {word}\nAnswer:", forms)


EXERCISES: dict[str, Callable[[Random], Exercise]] = {
    "copy": _copy,
    "list_recall": _list_recall,
    "arithmetic": _arithmetic,
    "format": _format,
}
