"""What a diagnosis advises for each layer, and the recipe that says so."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from attnconv import make_plan, probe
from attnconv.evaluate.diagnose import (
    Diagnosis,
    HeadProfile,
    LayerProfile,
    SkippedLayer,
    advice_yaml,
    recommend,
)
from attnconv.packaged.model import embedded_model_path
from attnconv.recipes import load_recipe, parse_recipe

BASE = str(embedded_model_path())


def head(number: int, role: str = "global", window_90: float = 300.0, induction: float = 0.0) -> HeadProfile:
    return HeadProfile(number, role, 50, 60, window_90, 2, 0.5, 0.1, 0.5, 0.6, 0.7, induction, 50, 0, 0)  # type: ignore[arg-type]


def layer(index: int, *heads: HeadProfile, **more: Any) -> LayerProfile:
    return LayerProfile(index, f"model.layers.{index}.self_attn", heads, **more)


def advised(*layers: LayerProfile, skipped: tuple[SkippedLayer, ...] = ()) -> Diagnosis:
    return Diagnosis("some/model", "llama", "book", 1024, 512, 64, layers, skipped)


def test_advice() -> None:
    narrow = [head(number, "streaming", window) for number, window in enumerate((10, 60, 100.5, 5, 7))]
    wide = [head(number) for number in range(5)]
    copying = [head(0, "retrieval", induction=0.8), *(head(number) for number in range(1, 5))]
    one_of_many = [head(0, "retrieval", 20, induction=0.3), *(head(number, "local", 20) for number in range(1, 6))]
    found = recommend(
        advised(
            layer(0, *wide),
            layer(1, *narrow),
            layer(2, *copying),
            layer(3, *one_of_many),
            layer(5, *wide, native_window=32),
            skipped=(SkippedLayer(4, "model.layers.4.self_attn", "it runs 2 times"),),
        )
    )
    assert [(one.layer, one.method) for one in found] == [
        (0, "lolcats"),
        (1, "sliding_window"),
        (2, "softmax"),
        (3, "lolcats"),
        (4, "softmax"),
        (5, "softmax"),
    ]
    assert found[0].options == load_recipe("hybrid").attention[-1].options
    assert "5 of 5 heads need more than 128 tokens" in found[0].reason
    assert found[1].options == {"window": 128, "num_sinks": 4}
    assert "101 newest" in found[1].reason
    assert found[2].reason.startswith("1 of 5 heads retrieve, the best with 80%")
    assert found[3].reason == "1 of 6 heads retrieve, which a window would end"
    assert found[4].reason == "it runs 2 times"


def test_the_quarter_that_retrieves_best_keeps_softmax() -> None:
    inductions = {1: 0.3, 4: 0.9, 6: 0.5}
    layers = (
        layer(n, head(0, "retrieval" if n in inductions else "global", induction=inductions.get(n, 0.05)))
        for n in range(8)
    )
    found = recommend(advised(*layers))
    assert [one.layer for one in found if one.method == "softmax"] == [4, 6]


@pytest.mark.parametrize(("needed", "window"), [(1, 16), (16, 16), (16.2, 32), (64, 64), (128, 128)])
def test_windows_are_powers_of_two(needed: float, window: int) -> None:
    (advice,) = recommend(advised(layer(0, head(0, "local", needed))))
    assert (advice.method, advice.options["window"]) == ("sliding_window", window)


def test_the_recipe_of_an_advice(tmp_path: Path, diagnosis: Diagnosis) -> None:
    narrow, wide = head(0, "local", 20), head(0)
    found = recommend(advised(*(layer(n, wide if n in (2, 3, 6) else narrow) for n in range(7))))
    text = advice_yaml(found, source="some/model: a test")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    assert [(str(rule.layers), rule.method) for rule in recipe.attention] == [
        ("0-1", "sliding_window"),
        ("2-3", "lolcats"),
        ("4-5", "sliding_window"),
        ("6", "lolcats"),
    ]
    shipped = load_recipe("lolcats-plus")
    assert (recipe.stages, recipe.data) == (shipped.stages, shipped.data)
    assert "some/model: a test" in recipe.description
    for one in found:
        assert f"# {one.layer}: {one.reason}." in text
    model = AutoModelForCausalLM.from_pretrained(BASE)
    own = parse_recipe(advice_yaml(recommend(diagnosis)))
    plan = make_plan(own.attention, probe(model.config, type(model)))
    assert [entry.method for entry in plan.entries] == [one.method for one in recommend(diagnosis)]


def test_softmax_layers_are_healed_around_as_in_a_hybrid() -> None:
    copying = layer(0, head(0, "retrieval", induction=0.9))
    mixed = parse_recipe(advice_yaml(recommend(advised(copying, *(layer(n, head(0)) for n in range(1, 4))))))
    assert [rule.method for rule in mixed.attention] == ["softmax", "lolcats"]
    assert mixed.attention[1].options == load_recipe("hybrid").attention[-1].options
    assert mixed.stages == load_recipe("hybrid").stages
    assert [stage.kind for stage in mixed.stages] == ["attention_transfer"]


def test_recipes_that_train_nothing() -> None:
    narrow = recommend(advised(layer(0, head(0, "local", 20))))
    assert parse_recipe(advice_yaml(narrow, name="narrow")).stages == []
    kept = advice_yaml(recommend(advised(layer(0, head(0, "retrieval", induction=0.9)))))
    recipe = parse_recipe(kept)
    assert [rule.method for rule in recipe.attention] == ["softmax"]
    assert "softmax kept" in recipe.description
