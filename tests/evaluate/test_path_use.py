import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnconv import convert_model, load_recipe
from attnconv.attention_modules.paths import leaving_out
from attnconv.evaluate import load_tokens, perplexity
from attnconv.evaluate.engine.bootstrap import make_figures
from attnconv.evaluate.engine.items import Item
from attnconv.evaluate.engine.models import load_evaluated, open_evaluated
from attnconv.evaluate.tasks.base import EvaluatedModel, Scope
from attnconv.evaluate.tasks.packaged import packaged_file
from attnconv.evaluate.tasks.path_use import PathUseSettings, PathUseTask, planned_paths
from attnconv.packaged.model import embedded_model_path

BASE = str(embedded_model_path())


def converted(folder: Path, method: str, **options: object) -> EvaluatedModel:
    convert_model(AutoModelForCausalLM.from_pretrained(BASE), method, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    evaluated = open_evaluated("model", str(folder))
    load_evaluated(evaluated, device="cpu")
    return evaluated


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedModel:
    return converted(tmp_path_factory.mktemp("lolcats"), "lolcats", window=32)


def score(evaluated: EvaluatedModel, scope: Scope = Scope(), **settings: object) -> list[Item]:  # noqa: B008
    task = PathUseTask(PathUseSettings(**settings))
    with torch.inference_mode():
        return [item for unit in task.units(evaluated, scope) for item in task.measure(evaluated, unit).items]


def test_equals_perplexity_with_and_without_each_path(evaluated: EvaluatedModel) -> None:
    items = score(evaluated, tokens=500, context=200)
    stream = load_tokens(packaged_file("book"), evaluated.tokenizer, context=200, limit=500)
    figures = make_figures(items, None, PathUseTask.metrics, PathUseTask.slices)
    assert [figure.group for figure in figures] == [{"left out": "window"}, {"left out": "linear"}]
    intact = perplexity(evaluated.model, stream, context=200)
    for figure in figures:
        with leaving_out(evaluated.model, figure.group["left out"]):
            without = perplexity(evaluated.model, stream, context=200)
        assert figure.model == pytest.approx(without.perplexity / intact.perplexity, rel=1e-5)
        assert abs(figure.model - 1) > 0.01
        own = [item for item in items if item.group == figure.group]
        assert sum(item.values["tokens"] for item in own) == intact.tokens
        for key, expected in [("nll", without), ("nll_intact", intact)]:
            total = math.fsum(item.values[key] for item in own)
            assert total == pytest.approx(expected.nll * expected.tokens, rel=1e-6)
    assert items[0].id == "window 0, 1-127, without window"
    assert len({item.id for item in items}) == len(items) == 10


def test_the_model_is_whole_again(evaluated: EvaluatedModel) -> None:
    first = score(evaluated, tokens=128, context=64)
    assert score(evaluated, tokens=128, context=64) == first
    assert all(not core.left_out for core in evaluated.model.modules() if hasattr(core, "left_out"))


def test_a_path_that_nothing_goes_through_has_no_use(evaluated: EvaluatedModel) -> None:
    # The window sees as far back as these texts go.
    items = score(evaluated, tokens=64, context=32)
    linear = [item.values["excess"] for item in items if item.group == {"left out": "linear"}]
    assert linear == pytest.approx([0.0, 0.0], abs=1e-3)


def test_batches_limits_and_work(evaluated: EvaluatedModel) -> None:
    one, many = (score(evaluated, Scope(None, size), tokens=300, context=64) for size in (1, 4))
    assert sorted(item.id for item in one) == sorted(item.id for item in many)
    assert {item.id for item in score(evaluated, Scope(2, 1), tokens=300, context=64)} == {
        item.id for item in one if item.id.startswith(("window 0", "window 1"))
    }
    units = PathUseTask(PathUseSettings(tokens=300, context=64)).units(evaluated, Scope(None, 4))
    assert [unit.tokens for unit in units] == [3 * 256, 3 * 44]


def test_a_model_without_paths_has_nothing_to_leave_out(tmp_path: Path) -> None:
    base = open_evaluated("base", BASE)
    assert planned_paths(base.checkpoint.config) == ()
    single = converted(tmp_path, "sliding_window", window=16)
    for evaluated in (base, single):
        assert PathUseTask(PathUseSettings()).units(evaluated, Scope()) == []


def test_layers_with_other_methods_stay_as_they_are(tmp_path: Path) -> None:
    recipe = load_recipe("lolcats")
    rules = [rule.model_copy(update={"layers": "1,3", "options": {"window": 16}}) for rule in recipe.attention]
    model = AutoModelForCausalLM.from_pretrained(BASE)
    convert_model(model, recipe.model_copy(update={"attention": rules})).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    evaluated = open_evaluated("model", str(tmp_path))
    load_evaluated(evaluated, device="cpu")
    assert planned_paths(evaluated.checkpoint.config) == ("window", "linear")
    assert {item.group["left out"] for item in score(evaluated, tokens=128, context=64)} == {"window", "linear"}
