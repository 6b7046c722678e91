"""Models that are none any more: refused, or warned about."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnconv.distill import Silent, measuring
from attnconv.distill.health import is_finite
from attnconv.errors import TrainingError
from attnconv.evaluate.tasks.perplexity import PerplexityResult
from attnconv.recipes import load_recipe
from attnconv.runs import run_conversion

PLAIN = """
name: plain
attention: [{layers: all, method: hedgehog}]
%s
"""


@pytest.fixture
def plain(tmp_path):
    """Loads a recipe without stages."""

    def load(more=""):
        path = tmp_path / "plain.yaml"
        path.write_text(PLAIN % more)
        return load_recipe(str(path))

    return load


def put(base, value):
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name][0, 0] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return name


def test_a_model_without_a_perplexity_is_refused(base, plain, tmp_path):
    put(base, float("nan"))
    with pytest.raises(TrainingError, match="perplexity is nan before anything of it was changed, so it is not saved"):
        run_conversion(
            base, plain("evaluate: {embedded: true, tokens: 64, context: 32}"), tmp_path / "out", device="cpu"
        )
    assert not (tmp_path / "out").exists()


def test_weights_that_overflow_when_saved_are_refused(base, plain, tmp_path):
    name = put(base, 1e30)
    with pytest.raises(TrainingError, match=f"{name} holds values that are not finite in float16"):
        run_conversion(base, plain("output: {dtype: float16}"), tmp_path / "out", device="cpu")


def test_weights_of_a_streamed_base_that_are_not_finite_are_told(base, plain, tmp_path, caplog):
    name = put(base, float("inf"))
    with caplog.at_level(logging.WARNING, "attnconv"):
        run_conversion(base, plain(), tmp_path / "out", device="cpu")
    assert f"not finite in 1 tensors, first {name}" in caplog.text


def test_a_stage_that_made_the_model_worse_is_told_loudly(base, recipe, tmp_path, caplog, monkeypatch):
    values = iter([3.0, 4.0, 240.0])
    monkeypatch.setattr(
        measuring, "perplexity", lambda *args, **options: PerplexityResult(1.0, next(values), None, 10, None)
    )
    chosen = recipe("evaluate={embedded: true, tokens: 64, context: 32}")
    with caplog.at_level(logging.WARNING, "attnconv"):
        run_conversion(base, chosen, tmp_path / "out", device="cpu")
    assert caplog.text.count("MADE THE MODEL WORSE") == 1
    assert "began at a perplexity of 4 and ended at 240, 60.0 x as much" in caplog.text


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (float("nan"), False), (float("-inf"), False)])
def test_one_value_decides(value, finite):
    tensor = torch.ones(1000, dtype=torch.bfloat16)
    tensor[500] = value
    assert is_finite(tensor) is finite


def test_short_windows_are_measured_together(monkeypatch):
    asked = []

    def perplexity(model, tokens, **options):
        asked.append(options["batch_size"])
        return PerplexityResult(1.0, math.e, None, 1, None)

    monkeypatch.setattr(measuring, "perplexity", perplexity)
    for context in (384, 1024, 4096):
        recipe = SimpleNamespace(evaluate=SimpleNamespace(context=context, tokens=None))
        given = {"evaluation_tokens": torch.ones(2), "measured": {}, "tokenizer": None, "record": lambda *_: None}
        measuring.measure(SimpleNamespace(recipe=recipe, progress=Silent(), **given), None, "teacher")
    assert asked == [4, 1, 1]
