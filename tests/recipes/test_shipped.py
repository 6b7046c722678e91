"""Every recipe that ships loads, explains each of its keys, and survives being written and read again."""

import re
import subprocess
import sys

import pytest
import yaml
from pydantic import BaseModel

from attnconv.attention_modules import get_method
from attnconv.attention_modules.heads.gate import HeadGate
from attnconv.errors import RecipeError
from attnconv.recipes import Recipe, list_recipes, load_recipe, parse_recipe, recipe_text

SHIPPED = [
    "agent",
    "bam",
    "bigbird",
    "btx",
    "calibrate-heads",
    "cast-bf16",
    "cca",
    "delta",
    "drop-upcycle",
    "dsa",
    "duo",
    "flexprefill",
    "gated",
    "gated-delta",
    "head-roles",
    "hedgehog",
    "hedgehog-encoder",
    "hedgehog-vision",
    "hip",
    "hybrid",
    "infllm2",
    "latent",
    "liger",
    "lightning",
    "linear",
    "linear-and-sparse",
    "lola",
    "lolcats",
    "lolcats-plus",
    "lolcats-vision",
    "longheads",
    "lserve",
    "moa",
    "moba",
    "moh",
    "moh-groups",
    "native",
    "neighborhood",
    "neighborhood-vision",
    "ntk-prefix",
    "pool-heads",
    "power",
    "quest",
    "quickstart",
    "rcmha",
    "recycled",
    "retrieval-heads",
    "sale",
    "seer",
    "shrp",
    "sliding-window",
    "snap",
    "spans",
    "sparse",
    "sparse-linear",
    "strided",
    "token-select",
    "upcycle-granular",
    "upcycle-mixtral",
    "upcycle-qwen3",
    "vertical-slash",
    "window-native",
    "xattention",
]


def test_the_list_of_shipped_recipes():
    assert list_recipes() == SHIPPED


def test_agent_says_how_it_takes_text():
    overrides = re.findall(r"^#.*?$", recipe_text("agent"), flags=re.MULTILINE)
    overrides = re.findall(r"--set (\S+)", " ".join(overrides[:6]))
    assert len(overrides) == 4
    recipe = load_recipe("agent", overrides)
    assert (recipe.data.path, recipe.data.image_field, recipe.data.hub) == ("FILE", None, None)
    assert recipe.stages[0].why_unsupported(recipe.data) is None
    assert recipe.attention[0].options["layout"] == "sequence"


@pytest.mark.parametrize("name", SHIPPED)
def test_it_loads_under_its_own_name_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description.endswith(".")
    assert recipe.paper is not None


@pytest.mark.parametrize("name", SHIPPED)
def test_it_round_trips(name):
    recipe = load_recipe(name)
    assert parse_recipe(recipe.to_yaml()) == recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_it_writes_out_every_option_of_its_methods(name):
    for rule in load_recipe(name).attention:
        assert set(rule.options) == set(get_method(rule.method).options_class.model_fields)


@pytest.mark.parametrize("name", SHIPPED)
def test_its_comments_come_before_each_key_or_group_of_keys(name):
    lines = [line.strip() for line in recipe_text(name).splitlines()]
    assert lines[0].startswith("#")
    comments = sum(line.startswith("#") for line in lines)
    keys = sum(bool(line) and not line.startswith("#") for line in lines)
    assert comments >= keys / 4, f"{comments} lines of comments for {keys} keys"


NOT_OF_IMAGES = ("tokens", "sequence_length", "data")


def written_keys(section, data, path=""):
    """Keys of the schema that a recipe's YAML leaves to their defaults."""
    for name, value in section:
        if name not in data:
            yield f"{path}{name}"
        elif isinstance(value, BaseModel) and data[name] is not None:
            yield from written_keys(value, data[name], f"{path}{name}.")


@pytest.mark.parametrize("name", SHIPPED)
def test_what_it_leaves_out_is_only_what_does_not_concern_it(name):
    left_out = set()
    data = yaml.safe_load(recipe_text(name))
    recipe = load_recipe(name)
    left_out.update(written_keys(recipe, data))
    for stage, written in zip(recipe.stages, data["stages"], strict=True):
        left_out.update(written_keys(stage, written, f"stages.{stage.kind}."))
    alternatives = {"data", "data.path", "data.hub", "data.embedded", "data.name", "data.revision", "data.field"}
    alternatives |= {"data.image_field", "evaluate.path", "evaluate.field", "rewrite"}
    alternatives |= {
        f"stages.{kind}.{key}"
        for kind in ("attention_transfer", "balance", "calibrate", "features", "gate", "lora", "logits", "roles")
        for key in ("steps", "data")
    }
    if not any(issubclass(get_method(rule.method).module_class, HeadGate) for rule in recipe.attention):
        alternatives |= {f"stages.{kind}.balance" for kind in ("lora", "logits", "features")}
    if not any(rewrite.kind == "experts" for rewrite in recipe.rewrite):
        alternatives |= {f"stages.{kind}.{key}" for kind in ("lora", "logits") for key in ("train_routers", "z")}
    if recipe.data is not None and recipe.data.image_field is not None:
        alternatives |= {f"stages.{stage.kind}.{key}" for stage in recipe.stages for key in NOT_OF_IMAGES}
        alternatives.add("data.boundaries")
    assert left_out <= alternatives | {"stages.lora.core_learning_rate", "stages.logits.core_learning_rate"}


def test_published_lolcats():
    recipe = load_recipe("lolcats")
    (rule,) = recipe.attention
    transfer, lora = recipe.stages
    assert (rule.layers, rule.method) == ("all", "lolcats")
    assert rule.options["window"] == 64
    assert rule.options["mixing"] == 0.1
    assert transfer.loss.output_mse == 1000
    assert (transfer.learning_rate, lora.learning_rate) == (1e-2, 1e-4)
    assert (lora.rank, lora.alpha, lora.targets) == (8, 16, ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert {stage.sequence_length for stage in recipe.stages} == {1024}
    assert {stage.tokens for stage in recipe.stages} == {20_000_000}


def test_hybrid_keeps_every_fourth_layer():
    keep, convert = load_recipe("hybrid").attention
    assert keep.method == "softmax"
    assert [index for index in range(12) if keep.matches(index, 12, "")] == [3, 7, 11]
    assert convert.layers == "all"


def test_sliding_window_trains_nothing():
    recipe = load_recipe("sliding-window")
    assert recipe.stages == []
    assert recipe.data is None


def test_quickstart_needs_nothing_from_outside():
    recipe = load_recipe("quickstart")
    assert recipe.data.embedded
    assert recipe.evaluate.embedded
    assert all(rule.options["window"] <= 32 for rule in recipe.attention)


def test_encoders_and_vision_models_learn_from_the_teacher_alone():
    text = load_recipe("hedgehog-encoder")
    assert [stage.kind for stage in text.stages] == ["attention_transfer"]
    assert text.data.image_field is None
    for images in map(load_recipe, ("hedgehog-vision", "lolcats-vision")):
        assert [stage.kind for stage in images.stages] == ["attention_transfer", "features"]
        assert images.data.image_field == "image"


def test_an_unknown_name_is_answered_with_the_nearest():
    for ask in (load_recipe, recipe_text):
        with pytest.raises(RecipeError, match="'lolcat'.*did you mean 'lolcats'"):
            ask("lolcat")


def test_importing_and_reading_recipes_leaves_torch_alone():
    code = """
import sys
from attnconv.recipes import list_recipes, load_recipe
assert [load_recipe(name, check_methods=False).description for name in list_recipes()]
assert not {"torch", "transformers", "datasets"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
