"""Questions with given answers: the model's choice is the answer that it finds likeliest.

The prompts, the way they are cut into tokens and the scores are those of lm-eval's tasks of the same names,
https://github.com/EleutherAI/lm-evaluation-harness.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ...errors import DataError
from ..engine.items import Item, Metric
from ..engine.models import positions_of
from .base import EvaluatedModel, Outcome, Scope, Task, TaskSettings, Unit, register_task
from .packaged import data_file
from .rows import read_rows
from .scoring import Continuation, encode_pair, log_likelihoods

Style = Literal["piqa", "plain", "letters", "boolq", "sentiment"]
# By how the data's name begins.
STYLES: Mapping[str, Style] = {
    "piqa": "piqa",
    "openbookqa": "plain",
    "commonsenseqa": "letters",
    "commonsense_qa": "letters",
    "boolq": "boolq",
    "sst2": "sentiment",
}
YES_NO = ("no", "yes")
# One word each, as an answer that is written has to be.
SENTIMENTS = ("negative", "positive")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class MultipleChoiceSettings(TaskSettings):
    """Settings of `multiple_choice`.

    Attributes:
        data: packaged questions (`piqa`, `openbookqa`, `commonsenseqa`) or a file of JSON lines with question, choices
            and label (the right choice's index), with question, passage and label (true or false), or with text and
            label (0 = negative, 1 = positive).
        style: how a question is put: `piqa` (Question, Answer), `plain` (the answer continues the question), `letters`
            (lettered answers, of which the letter is scored), `boolq` (passage and question, answered yes or no),
            `sentiment` (a text, which is negative or positive); None means as the data's name says, else `boolq` for
            questions with a passage, `sentiment` for texts with a label and `piqa` for others.
    """

    kind: Literal["multiple_choice"] = "multiple_choice"
    data: str = "piqa"
    style: Style | None = None


@dataclass(frozen=True)
class Question:
    """A question as it is put to a model.

    Attributes:
        id: number of its row, from 0.
        context: the text that the answers continue.
        choices: the answers, without the space before them.
        label: index of the right one.
    """

    id: str
    context: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class _Encoded:
    question: Question
    choices: tuple[Continuation, ...]

    @property
    def longest(self) -> int:
        return max(len(choice.key) for choice in self.choices)


@dataclass(frozen=True)
class _Batch:
    questions: Sequence[_Encoded]
    batch_size: int


@register_task(MultipleChoiceSettings)
class MultipleChoiceTask(Task[MultipleChoiceSettings]):
    """The share of questions whose right answer gets the highest log-likelihood of all."""

    headline = 3
    report_words = "accuracy on multiple-choice questions"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", "correct", better="higher", style="percent", meaning="the right answer is the likeliest"),
        Metric(
            "normalised accuracy",
            "correct_normalised",
            better="higher",
            style="percent",
            meaning="the right answer is the likeliest per character",
        ),
    )

    def units(self, evaluated: EvaluatedModel, scope: Scope) -> Sequence[Unit]:
        """Batches of questions, the longest first."""
        longest = positions_of(evaluated.checkpoint)
        encoded = [
            _Encoded(
                question,
                tuple(
                    encode_pair(evaluated.tokenizer, question.context, f" {choice}", longest=longest)
                    for choice in question.choices
                ),
            )
            for question in load_questions(self.settings.data, self.settings.style, limit=scope.limit)
        ]
        encoded.sort(key=lambda question: -question.longest)
        units = []
        for start in range(0, len(encoded), scope.batch_size):
            batch = encoded[start : start + scope.batch_size]
            tokens = sum(len(key) for question in batch for key in {choice.key for choice in question.choices})
            units.append(Unit(tokens, _Batch(batch, scope.batch_size)))
        return units

    def measure(self, evaluated: EvaluatedModel, unit: Unit) -> Outcome:
        """Score the answers of a batch of questions."""
        batch: _Batch = unit.content
        flat = [choice for question in batch.questions for choice in question.choices]
        pad = evaluated.tokenizer.pad_token_id or 0
        scores = iter(log_likelihoods(evaluated.model, flat, batch_size=batch.batch_size, pad=pad))
        return Outcome(
            [_item(encoded.question, [next(scores) for _ in encoded.choices]) for encoded in batch.questions]
        )


def _item(question: Question, scores: Sequence[float]) -> Item:
    normalised = [score / len(choice) for score, choice in zip(scores, question.choices, strict=True)]
    chosen = _best(scores)
    # A broken model, which scores nothing, is right about nothing.
    known = not math.isnan(scores[question.label])
    others = [score for index, score in enumerate(scores) if index != question.label]
    values = {
        "correct": float(chosen == question.label and known),
        "correct_normalised": float(_best(normalised) == question.label and known),
        "margin": scores[question.label] - max(others),
    }
    names = question.choices if question.choices in (YES_NO, SENTIMENTS) else LETTERS
    return Item(question.id, values, note=f"{names[chosen]}, {names[_best(normalised)]} per character")


def _best(scores: Sequence[float]) -> int:
    """The first of the highest; what is no number is never the best unless all are none."""
    return max(range(len(scores)), key=lambda index: (not math.isnan(scores[index]), scores[index]))


def load_questions(data: str, style: Style | None = None, *, limit: int | None = None) -> list[Question]:
    """Read questions and put them into words.

    Args:
        data: see `MultipleChoiceSettings`.
        style: the same.
        limit: questions at most, evenly spread over the file.

    Raises:
        DataError: the file cannot be read, or a row is no question.
    """
    questions = []
    name = Path(data).name.lower()
    style = style or next((own for start, own in STYLES.items() if name.startswith(start)), None)
    for number, row in enumerate(read_rows(data_file(data), limit=limit)):
        try:
            questions.append(_question(str(number), row, style or _style_of(row)))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f'Row {number + 1} of {data} is no question: wanted are "question", "choices" (two texts or more) and '
                f'"label" (index of the right one), "question", "passage" and "label" (true or false), or "text" and '
                f'"label" (0 or 1); '
                f"the trouble is {error}."
            ) from error
    if not questions:
        raise DataError(f"There are no questions in {data}.")
    return questions


def _style_of(row: Mapping[str, Any]) -> Style:
    if "passage" in row:
        return "boolq"
    return "sentiment" if "text" in row and "question" not in row else "piqa"


def _question(name: str, row: Mapping[str, Any], style: Style) -> Question:
    if style == "sentiment":
        context = f"Review: {_text(row['text']).strip()}\nSentiment:"
        return Question(name, context, SENTIMENTS, _label(row["label"], 2))
    text = _text(row["question"])
    if style == "boolq":
        context = f"{_text(row['passage'])}\nQuestion: {text}?\nAnswer:"
        return Question(name, context, YES_NO, _label(row["label"], 2))
    choices = tuple(_text(choice) for choice in row["choices"])
    label = _label(row["label"], len(choices))
    if not 2 <= len(choices) <= len(LETTERS) or not all(choices):
        raise ValueError(f"{len(choices)} choices, where 2 to {len(LETTERS)} that are not empty are wanted")
    if style == "plain":
        return Question(name, text, choices, label)
    if style == "piqa":
        return Question(name, f"Question: {text}\nAnswer:", choices, label)
    lettered = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False))
    return Question(name, f"Question: {text.strip()}\n{lettered}Answer:", tuple(LETTERS[: len(choices)]), label)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r}, which is no text")
    return value


def _label(value: object, count: int) -> int:
    if not isinstance(value, int) or not 0 <= value < count:
        raise ValueError(f"the label {value!r}, which is no index below {count}")
    return int(value)
