import gzip
import json
import logging
import re
import warnings
from pathlib import Path
from random import Random

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer

from attnconv.convert import convert_model
from attnconv.errors import CheckpointError, DataError
from attnconv.evaluate.engine.models import load_evaluated, open_evaluated
from attnconv.evaluate.tasks import retrieval
from attnconv.evaluate.tasks.base import EvaluatedModel, Scope
from attnconv.evaluate.tasks.haystack import CITIES, RIDDLES, Haystack, Riddle, fit, make_prompt, weave
from attnconv.evaluate.tasks.packaged import data_file
from attnconv.evaluate.tasks.retrieval import RetrievalSettings, RetrievalTask, continuations, encode, interleave
from attnconv.evaluate.tasks.textfile import read_documents
from attnconv.packaged.model import embedded_model_path

TASKS = [*RIDDLES, "common_words"]
SENTENCES = " ".join(f"Word{i} stands here, in sentence {i}." for i in range(400))


@pytest.fixture(scope="module")
def book() -> Haystack:
    return Haystack("\n\n".join(read_documents(data_file("book"))))


@pytest.fixture(scope="module")
def evaluated() -> EvaluatedModel:
    found = open_evaluated("model", str(embedded_model_path()))
    load_evaluated(found, device="cpu")
    return found


@pytest.fixture(scope="module")
def closed() -> EvaluatedModel:
    return open_evaluated("model", str(embedded_model_path()))


def questions(evaluated: EvaluatedModel, limit: int | None = None, batch_size: int = 8, **settings: object) -> list:
    task = RetrievalTask(RetrievalSettings(**settings))
    return [question for unit in task.units(evaluated, Scope(limit, batch_size)) for question in unit.content]


LENGTHS = [("passkey", 300), *((task, length) for task in TASKS for length in (600, 2000))]


@pytest.mark.parametrize(("task", "length"), LENGTHS)
def test_prompts_fill_their_length_and_hold_their_answers(task: str, length: int, book: Haystack) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    for seed in range(3):
        prompt = make_prompt(task, book, Random(seed), depth=0.5, distractors=1)
        ids = fit(prompt, lambda text: encode(tokenizer, text), length)
        assert 0.98 * length <= len(ids) <= length
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert all(answer in text for answer in prompt.answers)
        again = make_prompt(task, book, Random(seed), depth=0.5, distractors=1)
        assert again.answers == prompt.answers
        assert again.write(100) == prompt.write(100)
    assert make_prompt(task, book, Random(9), depth=0.5, distractors=1).answers != prompt.answers


def test_a_prompt_too_short_for_its_question_is_refused(book: Haystack) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    prompt = make_prompt("passkey", book, Random(0), depth=0.5, distractors=0)
    with pytest.raises(DataError, match="too short for its question"):
        fit(prompt, lambda text: encode(tokenizer, text), 40)


@pytest.mark.parametrize("task", ["passkey", "multi_key"])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_fact_is_at_its_depth(task: str, depth: float) -> None:
    for seed in range(5):
        prompt = make_prompt(task, Haystack(SENTENCES), Random(seed), depth=depth, distractors=2)
        body = prompt.write(1000).split("\n\n")[1]
        first = body.index(prompt.answers[0])
        assert first / len(body) == pytest.approx(depth, abs=0.05)
        # It stands between sentences, not inside one.
        before = body[: body.rindex("The pass key", 0, first)].rstrip()
        assert not before or before.endswith(".")


def test_needles_keep_their_order_and_no_sentence_comes_twice(book: Haystack) -> None:
    for seed in range(5):
        prompt = make_prompt("variable_tracking", book, Random(seed), depth=0.0, distractors=1)
        text = prompt.write(3000)
        body = text.rsplit("\n\n", 1)[0]
        places = [body.index(f"Let {name} be") for name in prompt.answers]
        assert places == sorted(places)
        assert len(re.findall(r"Let [A-Z]{5} be", body)) == 10
        long = [part for part in re.split(r"(?<=[.!?])\s+", body) if len(part) > 60]
        assert len(long) == len(set(long)) > 50
    hay = Haystack("One two. Three four.")
    assert "".join(hay.cut(2, 6)).split() == ["Three", "four.", "One", "two.", "Three", "four."]


def test_names_and_numbers_are_new_to_the_text(book: Haystack) -> None:
    for task in RIDDLES:
        prompt = make_prompt(task, book, Random(4), depth=0.5, distractors=2)
        assert not any(answer in book.text for answer in prompt.answers)
        assert len(set(prompt.answers)) == len(prompt.answers)
    with pytest.raises(DataError, match="use fewer distractors"):
        make_prompt("multi_key", book, Random(0), depth=0.5, distractors=len(CITIES.split()))
    with_cities = Haystack(f"{SENTENCES} {CITIES}")
    with pytest.raises(DataError, match="0 do not occur in the text"):
        make_prompt("multi_key", with_cities, Random(0), depth=0.5, distractors=0)


def test_common_words_are_the_most_common(book: Haystack) -> None:
    prompt = make_prompt("common_words", book, Random(0), depth=0.0, distractors=0)
    for count in (0, 50, 3000):
        words = re.findall(r"\d+\. (\w+)", prompt.write(count))
        counts = {word: words.count(word) for word in set(words)}
        rarest = min(counts[word] for word in prompt.answers)
        assert rarest > max(number for word, number in counts.items() if word not in prompt.answers)
    with pytest.raises(DataError, match="different words"):
        make_prompt("common_words", Haystack("Too few words."), Random(0), depth=0.0, distractors=0)


def test_weaving_ends_what_was_cut_off() -> None:
    riddle = Riddle(("NEEDLE.",), (1.0,), "", ())
    assert weave(["One ", "two. ", "Three, "], riddle) == "One two. Three. NEEDLE."
    assert weave(["One ", "two. ", "Three."], Riddle(("NEEDLE.",), (0.7,), "", ())) == "One two. NEEDLE. Three."
    assert weave([], riddle) == "NEEDLE."
    with pytest.raises(DataError, match="empty"):
        Haystack(" \n ")


def test_any_limit_covers_lengths_and_depths_evenly(closed: EvaluatedModel) -> None:
    everything = questions(closed, lengths=(200, 250, 300), depths=(0.1, 0.5, 0.9), samples=2)
    assert len(everything) == len({question.id for question in everything}) == 18
    for limit in (3, 9, 12):
        some = questions(closed, limit, lengths=(200, 250, 300), depths=(0.1, 0.5, 0.9), samples=2)
        assert {question.id for question in some} < {question.id for question in everything}
        for key, values in {"length": (200, 250, 300), "depth": (0.1, 0.5, 0.9)}.items():
            assert {sum(q.group[key] == value for q in some) for value in values} == {limit // 3}
    assert interleave([1, 2], ["a", "b", "c"]) == [(1, "a"), (2, "b"), (1, "b"), (2, "c"), (1, "c"), (2, "a")]


def test_units_hold_one_length_and_not_too_many_tokens(closed: EvaluatedModel, monkeypatch) -> None:
    monkeypatch.setattr(retrieval, "TOKENS_AT_ONCE", 700)
    task = RetrievalTask(RetrievalSettings(lengths=(200, 300), depths=(0.5,), samples=5))
    units = task.units(closed, Scope(batch_size=4))
    assert [len(unit.content) for unit in units] == [3, 2, 2, 2, 1]
    assert all(len({question.group["length"] for question in unit.content}) == 1 for unit in units)
    assert units == task.units(closed, Scope(batch_size=4))
    first = units[0].content[0]
    assert first.id == "passkey/200/0.5/0"
    assert units[0].tokens == sum(len(question.ids) + 10 for question in units[0].content)


def test_prompts_depend_on_the_seed_and_not_on_other_lengths(closed: EvaluatedModel) -> None:
    alone = questions(closed, lengths=(250,), depths=(0.5,), samples=1)
    among = questions(closed, lengths=(200, 250), depths=(0.1, 0.5), samples=2)
    assert alone[0] in among
    assert questions(closed, lengths=(250,), depths=(0.5,), samples=1, seed=1)[0].answers != alone[0].answers


def test_lengths_without_positions(closed: EvaluatedModel, caplog) -> None:
    kept = questions(closed, lengths=(512, 600), depths=(0.5,), samples=1)
    assert "1 of 2 lengths are left out" in caplog.text
    assert "512 positions" in caplog.text
    # What is generated needs positions too.
    assert [len(question.ids) + 10 <= 512 for question in kept] == [True]
    with pytest.raises(DataError, match="512 positions"):
        questions(closed, lengths=(600, 700))


def test_settings_without_effect_are_said(caplog) -> None:
    RetrievalTask(RetrievalSettings(task="passkey", depths=(0.5,), distractors=1, limit=3))
    assert not caplog.text
    RetrievalTask(RetrievalSettings(task="common_words", depths=(0.5,), distractors=1))
    assert "depths has no effect" in caplog.text
    assert "distractors has no effect" in caplog.text
    for wrong in ({"depths": (1.5,)}, {"lengths": ()}, {"task": "file"}, {"task": "else"}, {"samples": 0}):
        with pytest.raises(ValidationError):
            RetrievalSettings(**wrong)


def test_prompts_from_a_file(closed: EvaluatedModel, tmp_path: Path, caplog) -> None:
    rows = [
        {"prompt": "The key is 12. " * size, "answer": "12", "depth": depth, "chars": 100 * size}
        for size in (2, 4)
        for depth in (0.1, 0.9)
        for _ in range(3)
    ]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    found = questions(closed, 4, task="file", data=str(path))
    assert [(q.group["chars"], q.group["depth"]) for q in found] == [(200, 0.1), (200, 0.9), (400, 0.9), (400, 0.1)]
    assert {q.id for q in found} == {"file/0", "file/3", "file/6", "file/9"}
    many = [{"prompt": "again " * count, "answer": ["one", "two"]} for count in (40, 5000)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in many))
    (only,) = questions(closed, task="file", data=str(path))
    assert only.answers == ("one", "two")
    assert only.group == {"task": "file", "length": 100 * round(len(only.ids) / 100)}
    assert "1 of 2 prompts are left out" in caplog.text
    path.write_text(json.dumps({"prompt": "a", "answer": 5}))
    with pytest.raises(DataError, match='Row 1 .* "answer"'):
        questions(closed, task="file", data=str(path))


@pytest.mark.parametrize("converted", [False, True])
def test_padding_changes_no_continuation(converted: bool, caplog) -> None:
    evaluated = open_evaluated("model", str(embedded_model_path()))
    load_evaluated(evaluated, device="cpu")
    if converted:
        convert_model(evaluated.model, "lolcats", window=16)
    prompts = [
        encode(evaluated.tokenizer, text) for text in ("Once upon a time", "Lily had a red", "The big dog ran to the")
    ]
    # Settings of the model's own that greedy search would warn about, or obey.
    evaluated.model.generation_config.update(temperature=0.5, do_sample=True, repetition_penalty=3.0)
    own = evaluated.model.generation_config
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING), torch.inference_mode():
        warnings.simplefilter("error")
        together = continuations(evaluated.model, evaluated.tokenizer, prompts, 12)
        alone = [continuations(evaluated.model, evaluated.tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert together == alone
    assert len(set(alone)) == 3
    assert not caplog.records
    assert evaluated.model.generation_config is own


def test_items_say_what_was_found(evaluated: EvaluatedModel, monkeypatch) -> None:
    task = RetrievalTask(RetrievalSettings(task="multi_value", lengths=(400,), samples=2))
    (unit,) = task.units(evaluated, Scope())
    first, second = unit.content
    answers = [f"{first.answers[0]} and {first.answers[2]}", " ".join(second.answers)]
    monkeypatch.setattr(retrieval, "continuations", lambda *_: answers)
    items = task.measure(evaluated, unit).items
    assert [item.values["found"] for item in items] == [0.5, 1.0]
    assert [item.id for item in items] == ["multi_value/400/0", "multi_value/400/1"]
    assert items[0].group == {"task": "multi_value", "length": 400}
    assert items[0].note == f"{', '.join(first.answers)} | {answers[0]}"


@torch.no_grad()
def greedy_words(evaluated: EvaluatedModel, prompt: str, count: int) -> str:
    ids = encode(evaluated.tokenizer, prompt)
    start = len(ids)
    for _ in range(count):
        ids.append(int(evaluated.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return evaluated.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_what_the_model_says_is_found(evaluated: EvaluatedModel, tmp_path: Path) -> None:
    prompts = ["Once upon a time, there was a little girl. She", "The dog ran", "Tim and Sue went to the big"]
    said = [greedy_words(evaluated, prompt, 10) for prompt in prompts]
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": prompt, "answer": [text.strip().upper(), "xylophone"]}
        for prompt, text in zip(prompts, said, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = RetrievalTask(RetrievalSettings(task="file", data=str(path)))
    with torch.inference_mode():
        items = [item for unit in task.units(evaluated, Scope()) for item in task.measure(evaluated, unit).items]
    assert [item.values["found"] for item in items] == [0.5, 0.5, 0.5]
    assert all(text.strip() in item.note for text, item in zip(said, items, strict=True))


def test_a_model_that_cannot_generate_is_refused(evaluated: EvaluatedModel) -> None:
    with pytest.raises(CheckpointError, match="generates no text"):
        continuations(evaluated.model.model, evaluated.tokenizer, [[1, 2]], 3)


def test_prompts_of_the_shared_folder(shared: Path, closed: EvaluatedModel) -> None:
    path = shared / "data" / "longdoc" / "passkey.jsonl.gz"
    with pytest.raises(DataError, match="512 positions"):
        questions(closed, task="file", data=str(path))
