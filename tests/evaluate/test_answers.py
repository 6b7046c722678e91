"""Answers that are written, beside answers that are chosen; and what free continuations look like."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from attnconv.errors import DataError
from attnconv.evaluate.engine.items import Item
from attnconv.evaluate.engine.models import load_evaluated, open_evaluated
from attnconv.evaluate.tasks import answers
from attnconv.evaluate.tasks.answers import EXERCISES, AnswersSettings, AnswersTask, make_prompts
from attnconv.evaluate.tasks.base import EvaluatedModel, Scope
from attnconv.evaluate.tasks.continuations import ContinuationsSettings, ContinuationsTask, repetition
from attnconv.packaged.model import embedded_model_path

SMALL: dict[str, Any] = {"samples": 3, "examples": 1, "new_tokens": 4}


@pytest.fixture(scope="module")
def evaluated() -> EvaluatedModel:
    found = open_evaluated("model", str(embedded_model_path()))
    load_evaluated(found, device="cpu")
    return found


def scores(evaluated: EvaluatedModel, task: AnswersTask | ContinuationsTask) -> list[Item]:
    return [item for unit in task.units(evaluated, Scope()) for item in task.measure(evaluated, unit).items]


@pytest.mark.parametrize("task", EXERCISES)
def test_exercises_have_one_right_answer_and_are_drawn_again_alike(task: str) -> None:
    settings = AnswersSettings(task=task, samples=20)
    prompts = make_prompts(settings)
    assert prompts == make_prompts(settings)
    assert prompts != make_prompts(settings.model_copy(update={"seed": 1}))
    assert len({name for name, _, _ in prompts}) == 20
    for _, text, choices in prompts:
        assert len(set(choices)) == len(choices) >= 4
        assert text.count("Answer:") == settings.examples + 1
        assert text.endswith("Answer:")
    assert not prompts[0][1].split("\n\n")[0].endswith("Answer:")


RIGHT: dict[str, Callable[[str], str]] = {
    "copy": lambda asked: asked.split(": ")[1],
    "list_recall": lambda asked: asked.split(f"{asked[-2]}. ")[1].split(",")[0].split("\n")[0],
    "arithmetic": lambda asked: str(sum(int(number) for number in asked.split(": ")[1].split(" + "))),
    "format": lambda asked: f"[[{asked.split(': ')[1].upper()}]]",
}


@pytest.mark.parametrize("task", EXERCISES)
def test_the_first_choice_is_the_right_one(task: str) -> None:
    for _, text, choices in make_prompts(AnswersSettings(task=task)):
        asked = text.split("\n\n")[-1].removesuffix("\nAnswer:")
        assert RIGHT[task](asked) == choices[0]


def written(
    evaluated: EvaluatedModel, texts: Sequence[str], monkeypatch: pytest.MonkeyPatch, **more: Any
) -> list[Item]:
    """The scores of a model that would write this."""
    monkeypatch.setattr(answers, "continuations", lambda *given: list(texts))
    return scores(evaluated, AnswersTask(AnswersSettings(**{**SMALL, "samples": len(texts), **more})))


def test_the_first_line_is_the_answer(evaluated: EvaluatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = AnswersSettings(task="arithmetic", examples=1, samples=5)
    right = {name: choices[0] for name, _, choices in make_prompts(settings)}
    task = AnswersTask(settings)
    # In the order in which they are asked: the longest first.
    asked = [right[prompt.id] for unit in task.units(evaluated, Scope()) for prompt in unit.content]
    texts = [f" {asked[0]}\nand more", f"{asked[1]}.", f"It is {asked[2]}", "", f"{asked[4]}0"]
    items = written(evaluated, texts, monkeypatch, task="arithmetic")
    assert [item.values["written"] for item in items] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert all(item.values["gap"] == item.values["chosen"] - item.values["written"] for item in items)


def test_the_likeliest_answer_is_chosen(evaluated: EvaluatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "continuations", lambda model, tokenizer, prompts, count: [""] * len(prompts))
    task = AnswersTask(AnswersSettings(task="list_recall", **SMALL))
    for best, chosen in ((0, 1.0), (1, 0.0)):
        monkeypatch.setattr(
            answers,
            "log_likelihoods",
            lambda model, flat, best=best, **_: [-float(i % 5 != best) for i in range(len(flat))],
        )
        assert [item.values["chosen"] for item in scores(evaluated, task)] == [chosen] * 3
    monkeypatch.setattr(answers, "log_likelihoods", lambda model, flat, **_: [float("nan")] * len(flat))
    assert [item.values["chosen"] for item in scores(evaluated, task)] == [0.0] * 3


def test_questions_of_a_file_with_examples_before_them(evaluated: EvaluatedModel) -> None:
    items = scores(evaluated, AnswersTask(AnswersSettings(task="questions", **SMALL)))
    assert {item.id for item in items} == {"questions/0", "questions/1", "questions/2"}
    assert all(set(item.values) == {"written", "chosen", "gap"} for item in items)


def test_what_does_not_fit_is_said(evaluated: EvaluatedModel) -> None:
    with pytest.raises(DataError, match="give fewer examples"):
        AnswersTask(AnswersSettings(task="list_recall", examples=32)).units(evaluated, Scope())


def test_continuations_are_looked_at_for_what_comes_again(evaluated: EvaluatedModel) -> None:
    assert repetition([1, 2, 3, 4, 5]) == (0, 2)
    assert repetition([7] * 8) == (4, 5)
    assert repetition([1, 2]) == (0, 0)
    settings = ContinuationsSettings(prompts=2, prompt_tokens=32, new_tokens=40)
    items = scores(evaluated, ContinuationsTask(settings))
    assert [item.id for item in items] == ["prompt 0", "prompt 1"]
    for item in items:
        assert 0 < item.values["new"] <= 40
        assert item.values["grams"] == max(item.values["new"] - 3, 0)
        assert 0 <= item.values["repeated"] <= item.values["grams"]
