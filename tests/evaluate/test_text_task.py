import gzip
import hashlib
import math
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from attnconv.errors import DataError
from attnconv.evaluate import load_tokens, perplexity
from attnconv.evaluate.engine.bootstrap import make_figures
from attnconv.evaluate.engine.items import Item
from attnconv.evaluate.engine.models import load_evaluated, open_evaluated
from attnconv.evaluate.tasks.base import EvaluatedModel, Scope
from attnconv.evaluate.tasks.packaged import data_file, packaged_file, packaged_names
from attnconv.evaluate.tasks.text import PerplexitySettings, PerplexityTask
from attnconv.packaged.model import embedded_model_path

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park — every day.\n"


@pytest.fixture(scope="module")
def evaluated() -> EvaluatedModel:
    found = open_evaluated("model", str(embedded_model_path()))
    load_evaluated(found, device="cpu")
    return found


def score(evaluated: EvaluatedModel, scope: Scope = Scope(), **settings: object) -> list[Item]:  # noqa: B008
    task = PerplexityTask(PerplexitySettings(**settings))
    with torch.inference_mode():
        return [item for unit in task.units(evaluated, scope) for item in task.measure(evaluated, unit).items]


def total(items: list[Item], key: str) -> float:
    return math.fsum(item.values[key] for item in items)


@pytest.mark.parametrize(
    ("tokens", "context", "buckets"), [(700, 300, []), (1024, 512, [100, 128, 300]), (130, 64, [1])]
)
def test_the_blocks_add_up_to_the_perplexity(
    evaluated: EvaluatedModel, tokens: int, context: int, buckets: list[int]
) -> None:
    items = score(evaluated, tokens=tokens, context=context, buckets=buckets)
    stream = load_tokens(packaged_file("book"), evaluated.tokenizer, context=context, limit=tokens)
    whole = perplexity(evaluated.model, stream, context=context, tokenizer=evaluated.tokenizer)
    assert total(items, "tokens") == whole.tokens
    assert total(items, "characters") == whole.characters
    assert total(items, "nll") == pytest.approx(whole.nll * whole.tokens, rel=1e-6)
    figures = {figure.metric: figure.model for figure in make_figures(items, None, PerplexityTask.metrics, [()])}
    assert figures["perplexity"] == pytest.approx(whole.perplexity, rel=1e-6)
    assert figures["bits/char"] == pytest.approx(whole.bits_per_character, rel=1e-6)


@torch.inference_mode()
def test_each_block_equals_the_definition(evaluated: EvaluatedModel) -> None:
    items = score(evaluated, tokens=450, context=300, buckets=[50, 200])
    stream = load_tokens(packaged_file("book"), evaluated.tokenizer, context=300, limit=450)
    assert stream[0] == stream[300] == evaluated.tokenizer.bos_token_id
    seen = []
    for item in items:
        window, start, last = map(int, re.fullmatch(r"window (\d+), (\d+)-(\d+)", item.id).groups())
        ids = stream[window * 300 : (window + 1) * 300]
        log_p = evaluated.model(ids[None]).logits[0].double().log_softmax(-1)
        expected = -sum(float(log_p[t - 1, ids[t]]) for t in range(start, last + 1))
        assert item.values["nll"] == pytest.approx(expected, rel=1e-5)
        assert item.values["bits"] == pytest.approx(expected / math.log(2), rel=1e-5)
        seen.append((window, start, last, item.group["position"]))
    assert seen == [
        (0, 1, 49, "0-50"),
        (0, 50, 177, "50-200"),
        (0, 178, 199, "50-200"),
        (0, 200, 299, "200-300"),
        (1, 1, 49, "0-50"),
        (1, 50, 149, "50-200"),
    ]


def test_a_slice_of_figures_for_each_bucket(evaluated: EvaluatedModel) -> None:
    items = score(evaluated, tokens=256, context=128, buckets=[64])
    figures = make_figures(items, None, PerplexityTask.metrics, [(), *PerplexityTask.slices])
    assert [figure.group for figure in figures[::2]] == [{}, {"position": "0-64"}, {"position": "64-128"}]
    plain = make_figures(score(evaluated, tokens=256, context=128), None, PerplexityTask.metrics, PerplexityTask.slices)
    assert not plain


def test_batches_and_limits(evaluated: EvaluatedModel) -> None:
    items = score(evaluated, Scope(None, 1), tokens=300, context=64)
    together = score(evaluated, Scope(None, 3), tokens=300, context=64)
    assert [item.id for item in items] == [item.id for item in together]
    assert [i.values["nll"] for i in items] == pytest.approx([i.values["nll"] for i in together], rel=1e-5)
    assert score(evaluated, Scope(2, 1), tokens=300, context=64) == items[:2]
    assert score(evaluated, Scope(100, 1), tokens=300, context=64) == items
    units = PerplexityTask(PerplexitySettings(tokens=300, context=64)).units(evaluated, Scope(None, 3))
    assert [tuple(unit.content.ids.shape) for unit in units] == [(3, 64), (1, 64), (1, 44)]
    assert [unit.tokens for unit in units] == [192, 64, 44]


def test_few_long_windows_share_a_pass(evaluated: EvaluatedModel) -> None:
    units = PerplexityTask(PerplexitySettings(tokens=512 * 20, context=512)).units(evaluated, Scope(None, 64))
    assert [len(unit.content.ids) for unit in units] == [8, 8, 4]


def test_windows_have_no_more_positions_than_the_model(evaluated: EvaluatedModel, caplog) -> None:
    units = PerplexityTask(PerplexitySettings(tokens=1024, context=800, buckets=[700])).units(evaluated, Scope(None, 1))
    assert [unit.content.ids.shape[1] for unit in units] == [512, 512]
    assert "has 512 positions" in caplog.text
    items = score(evaluated, tokens=512, context=800, buckets=[256, 700])
    assert {item.group["position"] for item in items} == {"0-256", "256-512"}


def test_own_text(evaluated: EvaluatedModel, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(STORY)
    items = score(evaluated, data=str(path), tokens=10_000, context=256)
    assert len(items) == 1
    assert items[0].values["characters"] == len(STORY.rstrip("\n")) + 1
    lines = tmp_path / "own.jsonl"
    lines.write_text('{"body": "Once upon a time"}\n')
    assert len(score(evaluated, data=str(lines), field="body")) == 1
    for text, settings in [("", {}), ('{"body": "x"}', {"field": "text"})]:
        lines.write_text(text)
        with pytest.raises(DataError, match="tokens; perplexity needs|no text under"):
            score(evaluated, data=str(lines), **settings)


def test_reduced_precision(evaluated: EvaluatedModel) -> None:
    exact = score(evaluated, tokens=256, context=128)
    evaluated.model.to(torch.bfloat16)
    try:
        rough = score(evaluated, tokens=256, context=128)
    finally:
        load_evaluated(evaluated, device="cpu")
    assert total(rough, "nll") == pytest.approx(total(exact, "nll"), rel=0.02)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"buckets": [300, 200]}, "must rise"),
        ({"buckets": [200, 200]}, "must rise"),
        ({"buckets": [0]}, "greater than or equal to 1"),
        ({"buckets": [512], "context": 512}, "not before the context"),
        ({"context": 1}, "greater than or equal to 2"),
        ({"tokens": 1}, "greater than or equal to 2"),
        ({"contexts": 3}, "Extra inputs"),
    ],
)
def test_wrong_settings(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PerplexitySettings(**settings)


def test_packaged_data(repository: Path, tmp_path: Path) -> None:
    assert "book" in packaged_names()
    assert data_file("book") == packaged_file("book")
    assert data_file("book").samefile(repository / "evaluate" / "tasks" / "assets" / "book.txt.gz")
    assert packaged_file("none") is None
    own = tmp_path / "book.txt"
    own.write_text(STORY)
    assert data_file(str(own)) == own
    with pytest.raises(DataError, match="no packaged data of that name; did you mean 'book'"):
        data_file("boook")
    with pytest.raises(DataError, match="use one of: .*book"):
        data_file("/x/y.txt")


def test_the_book_is_the_one_that_is_described(repository: Path) -> None:
    folder = repository / "evaluate" / "tasks" / "assets"
    packed = (folder / "book.txt.gz").read_bytes()
    assert hashlib.sha256(packed).hexdigest() in (folder / "README.md").read_text()
    text = gzip.decompress(packed).decode()
    assert text.startswith("CHAPTER 2. I OBSERVE\n\n")
    assert 390_000 < len(text) < 420_000
