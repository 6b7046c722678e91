import gzip
import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from attnconv.convert import convert_model
from attnconv.errors import DataError
from attnconv.evaluate.engine.items import Item
from attnconv.evaluate.engine.models import load_evaluated, open_evaluated
from attnconv.evaluate.tasks import scoring
from attnconv.evaluate.tasks.base import EvaluatedModel, Scope
from attnconv.evaluate.tasks.multiple_choice import (
    STYLES,
    MultipleChoiceSettings,
    MultipleChoiceTask,
    load_questions,
)
from attnconv.evaluate.tasks.scoring import Continuation, encode_pair, log_likelihoods
from attnconv.packaged.model import embedded_model_path

REQUESTS = [
    Continuation((1, 5, 9, 9), (7,)),
    Continuation((1, 5, 9, 9), (8,)),
    Continuation((1, 5, 9), (9, 7)),
    Continuation((1,), (30, 31, 32, 33, 34)),
    Continuation((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), (12, 13)),
    Continuation((1, 2), (3,)),
]


@pytest.fixture(scope="module")
def evaluated() -> EvaluatedModel:
    found = open_evaluated("model", str(embedded_model_path()))
    load_evaluated(found, device="cpu")
    return found


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def by_hand(model: PreTrainedModel, request: Continuation) -> float:
    log_p = model(torch.tensor([request.context + request.tokens])).logits[0].double().log_softmax(-1)
    start = len(request.context)
    return sum(float(log_p[start + index - 1, token]) for index, token in enumerate(request.tokens))


class WholeLogits(LlamaForCausalLM):
    """A model that always gives the logits of all positions."""

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("at_once", [1, 97 * 12, 2**25])
@pytest.mark.parametrize("kind", ["own", "whole", "converted"])
def test_log_likelihoods_equal_the_definition(kind: str, batch_size: int, at_once: int, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)
    model = tiny()
    if kind == "converted":
        convert_model(model, "lolcats", window=4)
    if kind == "whole":
        whole = WholeLogits(model.config).eval()
        whole.load_state_dict(model.state_dict())
        model = whole
    scores = log_likelihoods(model, REQUESTS, batch_size=batch_size, pad=3)
    assert scores == pytest.approx([by_hand(model, request) for request in REQUESTS], rel=1e-4)


def test_the_model_reads_what_requests_share_once() -> None:
    model, read = tiny(), []
    model.register_forward_pre_hook(lambda *call: read.append(call[2]["input_ids"]), with_kwargs=True)
    log_likelihoods(model, REQUESTS, batch_size=8)
    # The first three read the same tokens, for they differ in the last one alone.
    assert [ids.shape for ids in read] == [(4, 12)]


def test_pairs_are_cut_as_lm_eval_cuts_them() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    lm = HFLM(pretrained=tiny(), tokenizer=AutoTokenizer.from_pretrained(embedded_model_path()), backend="causal")
    for context in ("Once upon a time", "The end.  ", "A\n\n", "<s>Begun already", "naïve…"):
        for continuation in (" there was", "s", " 日本", "\nNext"):
            expected = tuple(map(tuple, lm._encode_pair(context, continuation)))
            got = encode_pair(tokenizer, context, continuation)
            assert (got.context, got.tokens) == expected
    alone = encode_pair(tokenizer, "", "Tom")
    assert alone.context == (tokenizer.bos_token_id,)
    assert tokenizer.decode(alone.tokens) == "Tom"


def test_what_is_too_long_loses_its_beginning() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    whole = encode_pair(tokenizer, "one two three four five", " six")
    cut = encode_pair(tokenizer, "one two three four five", " six", longest=7)
    assert cut.tokens == whole.tokens
    assert len(cut.key) == 7
    assert (whole.context + whole.tokens)[-8:] == cut.context + cut.tokens
    with pytest.raises(DataError, match="2 at most"):
        encode_pair(tokenizer, "one", " two three four five", longest=2)
    with pytest.raises(DataError, match="makes 0 tokens"):
        encode_pair(tokenizer, "one", "")


def write_rows(path: Path, rows: list[object]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


CHOICES = {"question": " Why? ", "choices": ["one", "two", "six"], "label": 2}
PASSAGE = {"question": "is it so", "passage": "It is.", "label": True}
REVIEW = {"text": "a delight ", "label": 1}


@pytest.mark.parametrize(
    ("style", "row", "context", "choices", "label"),
    [
        ("piqa", CHOICES, "Question:  Why? \nAnswer:", ("one", "two", "six"), 2),
        ("plain", CHOICES, " Why? ", ("one", "two", "six"), 2),
        ("letters", CHOICES, "Question: Why?\nA. one\nB. two\nC. six\nAnswer:", ("A", "B", "C"), 2),
        ("boolq", PASSAGE, "It is.\nQuestion: is it so?\nAnswer:", ("no", "yes"), 1),
        ("sentiment", REVIEW, "Review: a delight\nSentiment:", ("negative", "positive"), 1),
    ],
)
def test_the_words_of_each_style(style, row, context, choices, label, tmp_path: Path) -> None:
    (question,) = load_questions(write_rows(tmp_path / "own.jsonl", [row]), style)
    assert (question.context, question.choices, question.label) == (context, choices, label)


def test_the_style_follows_the_data(tmp_path: Path) -> None:
    packaged = {"piqa": (1500, "Question: "), "openbookqa": (500, "A person"), "commonsenseqa": (1218, "Question: ")}
    for name, (count, start) in packaged.items():
        questions = load_questions(name)
        assert len(questions) == count
        assert questions[0].context.startswith(start)
        assert {len(question.choices) for question in questions} == {{"piqa": 2, "openbookqa": 4}.get(name, 5)}
        assert len({question.label for question in questions}) > 1
    assert load_questions("commonsenseqa", limit=1)[0].choices == ("A", "B", "C", "D", "E")
    assert load_questions(write_rows(tmp_path / "own.jsonl.gz", [PASSAGE]))[0].choices == ("no", "yes")
    assert load_questions(write_rows(tmp_path / "own.jsonl", [CHOICES]))[0].context.startswith("Question: ")
    assert load_questions(write_rows(tmp_path / "own.jsonl", [REVIEW]))[0].choices == ("negative", "positive")
    assert STYLES["openbookqa"] == "plain"
    assert load_questions(write_rows(tmp_path / "openbookqa_x.jsonl", [CHOICES]))[0].context == " Why? "


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Why?", "choices": ["one"], "label": 0},
        {"question": "Why?", "choices": ["one", ""], "label": 0},
        {"question": "Why?", "choices": ["one", "two"], "label": 2},
        {"question": "Why?", "choices": ["one", "two"]},
        {"question": 5, "choices": ["one", "two"], "label": 0},
        {"text": "a delight", "label": 2},
        ["a", "list"],
    ],
)
def test_a_row_that_is_no_question_is_said(row: object, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "own.jsonl", [CHOICES, row])
    with pytest.raises(DataError, match="Row 2|Line 2"):
        load_questions(path)
    assert len(load_questions(path, limit=1)) == 1


def test_files_that_hold_no_questions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no questions"):
        load_questions(write_rows(tmp_path / "empty.jsonl", []))
    (tmp_path / "bad.jsonl").write_text("{]\n", encoding="utf-8")
    with pytest.raises(DataError, match="Line 1 of .* is not JSON"):
        load_questions(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        load_questions(str(tmp_path / "bad.jsonl.gz"))


def run(evaluated: EvaluatedModel, data: str, **scope: int) -> list[Item]:
    task = MultipleChoiceTask(MultipleChoiceSettings(data=data))
    items = [item for unit in task.units(evaluated, Scope(**scope)) for item in task.measure(evaluated, unit).items]
    return sorted(items, key=lambda item: int(item.id))


def test_a_trained_model_prefers_what_it_has_learned(evaluated: EvaluatedModel, tmp_path: Path) -> None:
    pairs = [
        ("Once upon a time, there was a little", "girl", "zebra crossing"),
        ("Lily and her mom went to the", "park", "of of"),
        ("The cat was very", "happy", "Tuesday"),
        ('Tim said, "Thank you,', 'Mom!"', "under"),
    ]
    rows = [
        {"question": text, "choices": [good, bad] if index % 2 else [bad, good], "label": 1 - index % 2}
        for index, (text, good, bad) in enumerate(pairs)
    ]
    items = run(evaluated, write_rows(tmp_path / "openbookqa.jsonl", rows), batch_size=3)
    assert [item.id for item in items] == ["0", "1", "2", "3"]
    assert sum(item.values["correct"] for item in items) == 4
    assert all(item.values["margin"] > 0 for item in items)
    assert [item.note.split(",")[0] for item in items] == ["B", "A", "B", "A"]
    swapped = [{**row, "label": 1 - row["label"]} for row in rows]
    wrong = run(evaluated, write_rows(tmp_path / "openbookqa_swapped.jsonl", swapped), batch_size=8)
    assert sum(item.values["correct"] for item in wrong) == 0
    assert [item.values["margin"] for item in wrong] == pytest.approx([-item.values["margin"] for item in items])


def test_units_are_cut_without_the_model_and_respect_the_limit() -> None:
    closed = open_evaluated("model", str(embedded_model_path()))
    task = MultipleChoiceTask(MultipleChoiceSettings(data="piqa"))
    units = task.units(closed, Scope(limit=7, batch_size=3))
    assert [len(unit.content.questions) for unit in units] == [3, 3, 1]
    assert {question.question.id for unit in units for question in unit.content.questions} == set("0123456")
    assert units == task.units(closed, Scope(limit=7, batch_size=3))
    assert all(len(choice.key) <= 512 for unit in units for q in unit.content.questions for choice in q.choices)


@pytest.fixture(scope="module")
def check(repository: Path) -> ModuleType:
    """The benchmark that compares with lm-eval."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "benchmarks")
        return importlib.import_module("multiple_choice_check")


@pytest.mark.parametrize(
    ("name", "converted"),
    [
        ("piqa", False),
        ("boolq", True),
        pytest.param("openbookqa", True, marks=pytest.mark.slow),
        pytest.param("commonsenseqa", False, marks=pytest.mark.slow),
    ],
)
def test_scores_are_those_of_lm_eval(name: str, converted: bool, check: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    evaluated = open_evaluated("model", str(embedded_model_path()))
    load_evaluated(evaluated, device="cpu")
    if converted:
        convert_model(evaluated.model, "lolcats", window=16)
    path = name
    if name == "boolq":
        rows = [
            {"question": f"is {n} even", "passage": f"{n} is a number. " * n, "label": n % 2 == 0} for n in range(1, 7)
        ]
        path = write_rows(tmp_path / "boolq.jsonl", rows)
    result = check.compare(evaluated, name, path, 12, 5)
    assert result["questions"] == (6 if name == "boolq" else 12)
    assert result["differing"] == {"acc": 0, "acc_norm": 0, "chosen": 0}
    for counts in result["correct"].values():
        assert counts["attnconv"] == counts["lm_eval"]


def test_scores_are_finite_in_half_precision() -> None:
    evaluated = open_evaluated("model", str(embedded_model_path()))
    load_evaluated(evaluated, dtype="bfloat16", device="cpu")
    items = run(evaluated, "piqa", limit=4, batch_size=4)
    assert all(math.isfinite(item.values["margin"]) for item in items)


def test_a_broken_model_is_right_about_nothing() -> None:
    evaluated = open_evaluated("model", str(embedded_model_path()))
    load_evaluated(evaluated, device="cpu")
    with torch.no_grad():
        evaluated.model.lm_head.weight.fill_(torch.nan)
    items = run(evaluated, "piqa", limit=6, batch_size=4)
    assert len(items) == 6
    assert [value for item in items for name, value in item.values.items() if name != "margin"] == [0.0] * 12
