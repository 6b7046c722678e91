from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from attnconv import convert_model
from attnconv.errors import CheckpointError, DataError
from attnconv.evaluate.engine.bootstrap import make_figures
from attnconv.evaluate.engine.items import Item
from attnconv.evaluate.engine.models import load_evaluated, open_evaluated
from attnconv.evaluate.tasks.base import EvaluatedModel, Scope
from attnconv.evaluate.tasks.generation import (
    GenerationSettings,
    GenerationTask,
    continue_greedily,
    cut_prompts,
    end_tokens,
    matching,
)
from attnconv.packaged.model import embedded_model_path

BASE = str(embedded_model_path())


@pytest.fixture(scope="module")
def shared_evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedModel:
    folder = tmp_path_factory.mktemp("model")
    convert_model(AutoModelForCausalLM.from_pretrained(BASE), "lolcats", window=24).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    evaluated, base = open_evaluated("model", str(folder)), open_evaluated("base", BASE)
    for each in (evaluated, base):
        load_evaluated(each, device="cpu")
    evaluated.base = base
    return evaluated


@pytest.fixture
def evaluated(shared_evaluated: EvaluatedModel) -> Iterator[EvaluatedModel]:
    loaded, base = shared_evaluated.loaded, shared_evaluated.base
    yield shared_evaluated
    shared_evaluated.loaded, shared_evaluated.base = loaded, base


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    names = ["Lily", "Tom", "Mia", "Ben", "Sue", "Max"]
    path.write_text(
        "".join(
            f"Once upon a time, there was a child named {name}. {name} loved to play in the park with the dog. "
            f"One day, {name} saw a big red ball and wanted to take it home.\n"
            for name in names
        )
    )
    return str(path)


def score(evaluated: EvaluatedModel, scope: Scope = Scope(), **settings: object) -> list[Item]:  # noqa: B008
    task = GenerationTask(GenerationSettings(**settings))
    with torch.inference_mode():
        return [item for unit in task.units(evaluated, scope) for item in task.measure(evaluated, unit).items]


@torch.no_grad()
def by_hand(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, ends: list[int]) -> list[int]:
    """The whole text through the model for each token, without a cache."""
    ids = prompt.tolist()
    while len(ids) < len(prompt) + new_tokens and (len(ids) == len(prompt) or ids[-1] not in ends):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_equals_decoding_token_by_token_without_a_cache(evaluated: EvaluatedModel, story: str) -> None:
    settings = {"data": story, "prompts": 4, "prompt_tokens": 40, "new_tokens": 20}
    items = score(evaluated, Scope(None, 3), **settings)
    assert [item.id for item in items] == [f"prompt {index}" for index in range(4)]
    prompts = cut_prompts(evaluated.tokenizer, GenerationSettings(**settings))
    ends = end_tokens(evaluated.base.model, evaluated.base.tokenizer)
    for item, prompt in zip(items, prompts, strict=True):
        expected, answer = [by_hand(each.model, prompt, 20, ends) for each in (evaluated.base, evaluated)]
        equal = [wanted == token for wanted, token in zip(expected, answer, strict=False)]
        same = equal.index(False) if False in equal else len(equal)
        assert item.values == {"matching": same, "new": len(expected), "identical": int(expected == answer)}
        texts = [evaluated.tokenizer.decode(ids, skip_special_tokens=True) for ids in (expected, answer)]
        assert item.note == f"base: {texts[0]}\nmodel: {texts[1]}"
    total = {key: sum(item.values[key] for item in items) for key in ("matching", "new", "identical")}
    assert 0 < total["matching"] < total["new"]
    figures = {figure.metric: figure.model for figure in make_figures(items, None, GenerationTask.metrics, [()])}
    assert figures["matching tokens"] == pytest.approx(total["matching"] / total["new"])
    assert figures["identical answers"] == pytest.approx(total["identical"] / 4)


def test_a_model_continues_like_itself(evaluated: EvaluatedModel, story: str) -> None:
    evaluated.base = evaluated
    for item in score(evaluated, data=story, prompts=2, prompt_tokens=30, new_tokens=10):
        assert item.values["matching"] == item.values["new"]
        assert item.values["identical"] == 1


def test_batches_and_limits(evaluated: EvaluatedModel, story: str) -> None:
    settings = {"data": story, "prompts": 5, "prompt_tokens": 30, "new_tokens": 6}
    units = GenerationTask(GenerationSettings(**settings)).units(evaluated, Scope(None, 2))
    assert [len(unit.content.ids) for unit in units] == [2, 2, 1]
    assert [unit.tokens for unit in units] == [144, 144, 72]
    one = score(evaluated, Scope(None, 1), **settings)
    assert score(evaluated, Scope(None, 5), **settings) == one
    assert score(evaluated, Scope(3, 2), **settings) == one[:3]


def test_prompts_lie_at_even_distances_and_begin_as_the_model_wants_it(
    evaluated: EvaluatedModel, tmp_path: Path
) -> None:
    tokenizer = evaluated.tokenizer
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(str(number) for number in range(200)))
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    prompts = cut_prompts(tokenizer, GenerationSettings(data=str(path), prompts=3, prompt_tokens=21))
    assert prompts[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    pieces = [ids[start : start + 20] for start in range(0, len(ids) - 19, 20)]
    assert len(pieces) > 20
    places = [pieces.index(row[1:].tolist()) for row in prompts]
    assert places == [0, len(pieces) // 3, 2 * len(pieces) // 3]


def test_a_short_text_gives_fewer_prompts(evaluated: EvaluatedModel, tmp_path: Path, caplog) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Once upon a time there was a dog. It was a big dog. It ran and ran and ran.")
    prompts = cut_prompts(evaluated.tokenizer, GenerationSettings(data=str(path), prompts=50, prompt_tokens=8))
    assert 1 < len(prompts) < 50
    assert len({tuple(row.tolist()) for row in prompts}) == len(prompts)
    assert f"long enough for {len(prompts)} prompts" in caplog.text
    with pytest.raises(DataError, match="less than one prompt of 300 tokens"):
        cut_prompts(evaluated.tokenizer, GenerationSettings(data=str(path), prompt_tokens=300))


def test_continuations_stop_where_the_text_ends(evaluated: EvaluatedModel, story: str) -> None:
    prompts = cut_prompts(evaluated.tokenizer, GenerationSettings(data=story, prompts=3, prompt_tokens=30))
    model = evaluated.base.model
    free = [by_hand(model, prompt, 12, []) for prompt in prompts]
    end = free[0][4]
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    assert continue_greedily(model, prompts, 12, [end]) == expected
    assert continue_greedily(model, prompts, 12, []) == free
    assert len(expected[0]) <= 5


def test_the_models_own_generation_settings_do_not_matter(
    evaluated: EvaluatedModel, story: str, caplog, recwarn
) -> None:
    prompts = cut_prompts(evaluated.tokenizer, GenerationSettings(data=story, prompts=2, prompt_tokens=30))
    model = evaluated.base.model
    expected = [by_hand(model, prompt, 12, []) for prompt in prompts]
    own = model.generation_config
    odd = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0, "max_length": 20}
    before = {key: getattr(own, key) for key in odd}
    own.update(**odd)
    try:
        assert continue_greedily(model, prompts, 12, []) == expected
        assert model.generation_config is own
    finally:
        own.update(**before)
    assert not caplog.records
    assert not recwarn.list


def test_tokens_that_end_a_text(evaluated: EvaluatedModel) -> None:
    model, tokenizer = evaluated.base.model, evaluated.base.tokenizer
    own = model.generation_config.eos_token_id
    try:
        for given, ends in [(7, [7]), ([3, 4], [3, 4]), (None, [tokenizer.eos_token_id])]:
            model.generation_config.eos_token_id = given
            assert end_tokens(model, tokenizer) == ends
    finally:
        model.generation_config.eos_token_id = own


@pytest.mark.parametrize(
    ("expected", "answer", "count"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1], 1), ([5], [6], 0)],
)
def test_matching(expected: list[int], answer: list[int], count: int) -> None:
    assert matching(expected, answer) == count


def test_what_cannot_be_done(evaluated: EvaluatedModel, story: str) -> None:
    with pytest.raises(DataError, match="more than the 512 positions"):
        score(evaluated, data=story, prompt_tokens=500, new_tokens=13)
    encoder = torch.nn.Module()
    encoder.can_generate = lambda: False
    with pytest.raises(CheckpointError, match="generates no text"):
        continue_greedily(encoder, torch.zeros(1, 2, dtype=torch.long), 3, [])
    evaluated.base = None
    task = GenerationTask(GenerationSettings(data=story, prompts=1, prompt_tokens=10))
    (unit,) = task.units(evaluated, Scope())
    with pytest.raises(CheckpointError, match="no base was named"):
        task.measure(evaluated, unit)
