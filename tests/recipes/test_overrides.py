"""`--set path.to.key=value`: what can be reached, how values are read, and what is said when it goes wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnconv.errors import RecipeError
from attnconv.recipes import load_recipe


def changed(*overrides, recipe="lolcats"):
    return load_recipe(recipe, overrides, check_methods=False)


@pytest.mark.parametrize("value", ["2e6", "2_000_000", "2000000", " 2e6 ", "'2e6'"])
def test_numbers(value):
    assert changed(f"stages.0.tokens={value}").stages[0].tokens == 2_000_000


@given(st.integers(1, 10**12))
def test_any_count_can_be_set(tokens):
    assert changed(f"stages.1.tokens={tokens}").stages[1].tokens == tokens


def test_values_are_yaml():
    recipe = changed(
        "attention.0.layers={every: 2, offset: 1}",
        "stages.1.targets=[v_proj]",
        "stages.1.train_cores=true",
        "stages.0.max_grad_norm=null",
        "description=left = right",
        "output={dtype: bfloat16}",
    )
    assert recipe.attention[0].layers == {"every": 2, "offset": 1}
    assert recipe.stages[1].targets == ["v_proj"]
    assert recipe.stages[1].train_cores is True
    assert recipe.stages[0].max_grad_norm is None
    assert recipe.description == "left = right"
    assert (recipe.output.dtype, recipe.output.shard_size) == ("bfloat16", "5GB")


def test_sections_and_options_that_were_not_there():
    recipe = changed("evaluate.path=valid.txt", "evaluate.context=512", "attention.0.options.epsilon=1")
    assert (recipe.evaluate.path, recipe.evaluate.context) == ("valid.txt", 512)
    assert recipe.attention[0].options["epsilon"] == 1


def test_all_items_of_a_list():
    recipe = changed("stages.*.sequence_length=512", "attention.*.options.window=16")
    assert [stage.sequence_length for stage in recipe.stages] == [512, 512]
    assert [rule.options["window"] for rule in recipe.attention] == [16]
    assert changed("attention.*={layers: all, method: softmax}").attention[0].method == "softmax"


def test_later_overrides_win():
    assert changed("stages.*.tokens=7", "stages.1.tokens=9").stages[1].tokens == 9


def test_steps_take_the_place_of_tokens():
    stage = changed("stages.0.steps=120").stages[0]
    assert (stage.steps, stage.tokens) == (120, None)


def test_a_file_takes_the_place_of_the_hub():
    data = changed("data.path=text.jsonl.gz", "data.seed=3").data
    assert (data.path, data.hub, data.name, data.split, data.seed) == ("text.jsonl.gz", None, None, None, 3)
    data = changed("data.hub=some/data", "data.name=small", recipe="quickstart").data
    assert (data.hub, data.name, data.embedded, data.split) == ("some/data", "small", False, None)


def test_two_overrides_that_exclude_each_other_are_refused():
    with pytest.raises(RecipeError, match="exactly one of tokens, steps is wanted, got tokens and steps"):
        changed("stages.0.tokens=5", "stages.0.steps=5")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.tokns=5", r"stages\.0\.tokns: unknown key; did you mean 'tokens'\?"),
        ("stage.0.tokens=5", r"stage: unknown key; did you mean 'stages'\?"),
        ("stages.0.loss.output_mze=5", r"stages\.0\.loss\.output_mze: unknown key; did you mean 'output_mse'\?"),
        ("stages.2.tokens=5", r"stages\.2: no such item in stages; it has items 0 to 1"),
        ("stages.-1.tokens=5", r"stages\.-1: no such item in stages"),
        ("stages.first.tokens=5", r"stages\.first: no such item in stages"),
        ("stages.5=null", r"stages\.5: no such item in stages"),
        ("name.first=x", r"name\.first: name is a value and has no keys"),
        ("name.first.second=x", r"name\.first: name is a value and has no keys"),
        ("stages.0.tokens", "'stages.0.tokens' has not the form path.to.key=value"),
        ("=5", "'=5' has not the form path.to.key=value"),
        ("stages..tokens=5", "'stages..tokens=5' has not the form path.to.key=value"),
        ("stages.0.tokens=[1", r"the value of the override 'stages.0.tokens=\[1' is no valid YAML"),
        ("stages.0.tokens=few", r"stages\.0\.tokens: a whole number is wanted"),
        ("stages.0.tokens=", r"stages\.0: exactly one of tokens, steps is wanted, got none of them"),
    ],
)
def test_what_goes_wrong_is_said(override, message):
    with pytest.raises(RecipeError, match=message) as refusal:
        changed(override)
    assert "lolcats" in str(refusal.value) or "YAML" in str(refusal.value)


def test_an_empty_list_has_no_items():
    with pytest.raises(RecipeError, match=r"stages\.\*: no such item in stages; it is empty"):
        changed("stages.*.tokens=5", recipe="sliding-window")


def test_methods_and_options_are_checked_after_the_overrides():
    with pytest.raises(RecipeError, match=r"options\.windw: unknown key; did you mean 'window'"):
        load_recipe("lolcats", ["attention.0.options.windw=5"])
    with pytest.raises(RecipeError, match="unknown method 'hedgehogs'; did you mean 'hedgehog'"):
        load_recipe("lolcats", ["attention.0.method=hedgehogs"])


def test_all_wrong_overrides_are_reported_at_once():
    with pytest.raises(RecipeError, match="has 3 problems") as refusal:
        changed("nonsense", "stages.9.tokens=1", "outptu.dtype=float32")
    assert "did you mean 'output'" in str(refusal.value)
