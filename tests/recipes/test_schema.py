"""The sections: defaults, numbers as people write them, alternatives, and settings without effect."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from attnconv.errors import RecipeError
from attnconv.recipes import DataSection, EvaluateSection, OutputSection, Recipe, parse_recipe
from attnconv.recipes.stages.attention_transfer import AttentionTransferStage, TransferLoss
from attnconv.recipes.stages.logits import LogitsStage
from attnconv.recipes.stages.lora import LoraStage

STAGE = {"tokens": 1000, "sequence_length": 10, "learning_rate": 1e-3}
HEAD = "name: mine\nattention: [{layers: all, method: softmax}]\n"


def parse_stages(*stages, head=HEAD + "data: {embedded: true}\n"):
    return parse_recipe(head + "stages:\n" + "".join(f"  - {{{stage}}}\n" for stage in stages)).stages


@pytest.mark.parametrize("text", ["2000000", "2_000_000", "2e6", "2E+6", "2.0e6", "'2e6'", "'2_000_000'", "2000000.0"])
def test_counts_as_people_write_them(text):
    (stage,) = parse_stages(f"kind: lora, tokens: {text}, sequence_length: 16, learning_rate: 1e-4")
    assert stage.tokens == 2_000_000
    assert isinstance(stage.tokens, int)
    assert stage.learning_rate == 1e-4


@pytest.mark.parametrize("value", ["many", "2.5", 2.5, True, float("nan"), "inf", None, [1], -4, 0])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(ValidationError):
        LoraStage(**STAGE, batch_size=value)


@given(st.integers(1, 2**53))
def test_every_count_survives_yaml(tokens):
    stage = LoraStage(**{**STAGE, "tokens": tokens})
    recipe = Recipe(
        name="x", attention=[{"layers": "all", "method": "softmax"}], stages=[stage], data={"embedded": True}
    )
    assert parse_recipe(recipe.to_yaml(), check_methods=False) == recipe


@given(st.floats(1e-12, 1e3))
def test_every_learning_rate_survives_yaml(rate):
    stage = LoraStage(**{**STAGE, "learning_rate": rate}, max_grad_norm=None)
    recipe = Recipe(name="x", attention=[{"layers": 0, "method": "softmax"}], stages=[stage], data={"embedded": True})
    assert parse_recipe(recipe.to_yaml(), check_methods=False) == recipe


def test_stages_come_in_the_order_given_and_may_repeat():
    stages = parse_stages(
        "kind: attention_transfer, steps: 1, sequence_length: 16, learning_rate: 1",
        "kind: lora, steps: 2, sequence_length: 16, learning_rate: 1",
        "kind: attention_transfer, steps: 3, sequence_length: 16, learning_rate: 1",
        "kind: logits, steps: 4, sequence_length: 16, learning_rate: 1",
        "kind: lora, steps: 5, sequence_length: 16, learning_rate: 1",
    )
    assert [stage.kind for stage in stages] == ["attention_transfer", "lora", "attention_transfer", "logits", "lora"]
    assert [stage.steps for stage in stages] == [1, 2, 3, 4, 5]


def test_defaults():
    transfer, lora, logits = (kind(**STAGE) for kind in (AttentionTransferStage, LoraStage, LogitsStage))
    assert transfer.loss == TransferLoss(output_mse=1000, weight_cross_entropy=0, normalize_per_layer=False)
    assert (lora.rank, lora.alpha, lora.train_cores) == (8, 16, False)
    assert (logits.temperature, logits.lora, logits.train_cores) == (1, None, True)
    assert lora.targets is not LoraStage(**STAGE).targets
    recipe = Recipe(name="x", attention=[{"layers": "all", "method": "softmax"}])
    assert recipe.output == OutputSection(dtype=None, shard_size="5GB", merge_lora=True)
    assert (recipe.data, recipe.evaluate, recipe.stages) == (None, None, [])


def test_length_of_a_stage():
    assert LoraStage(**STAGE).num_steps == 100
    assert LoraStage(**STAGE, batch_size=2, gradient_accumulation=3).num_steps == 16
    assert LoraStage(**{**STAGE, "tokens": 5}).num_steps == 1
    assert LoraStage(steps=7, sequence_length=10, learning_rate=1, batch_size=4).num_steps == 7


@pytest.mark.parametrize("given", [{}, {"tokens": 5, "steps": 5}])
def test_a_stage_has_one_length(given):
    with pytest.raises(ValidationError, match="exactly one of tokens, steps"):
        LoraStage(sequence_length=10, learning_rate=1e-3, **given)


@pytest.mark.parametrize("given", [{}, {"path": "a", "hub": "b"}, {"path": "a", "embedded": True}, {"embedded": False}])
def test_data_has_one_source(given):
    with pytest.raises(ValidationError, match="exactly one of path, hub, embedded"):
        DataSection(**given)


def test_data_refuses_what_belongs_to_another_source():
    with pytest.raises(ValidationError, match="name .* needs hub"):
        DataSection(path="a", name="b")
    with pytest.raises(ValidationError, match="a file has no splits"):
        DataSection(path="a", split="train")
    assert DataSection(embedded=True, split="valid").split == "valid"


def test_the_embedded_sample_has_no_images():
    with pytest.raises(ValidationError, match="images come from path or hub"):
        DataSection(embedded=True, image_field="image")


IMAGES = HEAD + "data: {path: pictures, image_field: image}\n"
TRANSFER = "kind: attention_transfer, learning_rate: 1"
UNFIT = {
    f"{TRANSFER}, steps: 1, sequence_length: 16": "stage 0 .* trains on images: give steps, and neither",
    f"{TRANSFER}, tokens: 1": "stage 0 .* trains on images: give steps, and neither",
    "kind: lora, learning_rate: 1, steps: 1": "images do not have: use attention_transfer or features",
    "kind: logits, learning_rate: 1, steps: 1": "next token, which images do not have: use attention_transfer",
}


@pytest.mark.parametrize("stage", UNFIT)
def test_images_are_learned_by_steps_and_from_the_teacher_alone(stage):
    with pytest.raises(RecipeError, match=UNFIT[stage]):
        parse_stages(stage, head=IMAGES)


def test_an_image_is_a_sequence_and_text_needs_a_length():
    (stage,) = parse_stages(f"{TRANSFER}, steps: 3, batch_size: 4, gradient_accumulation: 2", head=IMAGES)
    assert (stage.num_steps, stage.tokens_per_step) == (3, 8)
    with pytest.raises(RecipeError, match="stage 0 .* needs sequence_length"):
        parse_stages(f"{TRANSFER}, steps: 3")


def test_evaluate_has_one_source():
    assert EvaluateSection(embedded=True).tokens == 5120
    for given_sources in ({}, {"path": "a", "embedded": True}):
        with pytest.raises(ValidationError, match="exactly one of path, embedded"):
            EvaluateSection(**given_sources)


def test_stages_need_text():
    stage = "kind: lora, steps: 1, sequence_length: 16, learning_rate: 1"
    with pytest.raises(RecipeError, match="stages 0, 2 would train on nothing"):
        parse_stages(stage, f"{stage}, data: {{embedded: true}}", stage, head=HEAD)
    assert parse_stages(f"{stage}, data: {{path: x.txt}}", head=HEAD)[0].data.path == "x.txt"


@pytest.mark.parametrize(("size", "expected"), [("5GB", 5 * 10**9), ("200 mb", 2 * 10**8), ("1.5KB", 1500)])
def test_shard_sizes(size, expected):
    assert OutputSection(shard_size=size).shard_bytes == expected


@pytest.mark.parametrize("size", ["", "5", "GB", "-1GB", "0GB", "5 bananas", "5GiB"])
def test_what_is_no_shard_size_is_refused(size):
    with pytest.raises(ValidationError):
        OutputSection(shard_size=size)


def test_a_stage_that_trains_nothing_is_refused():
    with pytest.raises(ValidationError, match="nothing to train"):
        LogitsStage(**STAGE, train_cores=False)
    with pytest.raises(ValidationError, match="nothing to learn from"):
        TransferLoss(output_mse=0)


def test_a_setting_without_effect_warns(caplog):
    with caplog.at_level(logging.WARNING, "attnconv"):
        LoraStage(**STAGE, train_cores=True, core_learning_rate=1e-3)
        assert not caplog.records
        LoraStage(**STAGE, core_learning_rate=1e-3)
    assert "core_learning_rate has no effect" in caplog.text


def test_a_recipe_stays_as_it_was_read():
    recipe = Recipe(name="x", attention=[{"layers": "all", "method": "softmax"}])
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "y"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing to do: give attention rules, or a rewrite"),
        ("rewrite: []\nattention: []", "nothing to do"),
        ("rewrite: [{kind: cats, dtype: bfloat16}]", "did you mean 'cast'"),
        ("rewrite: [{kind: cast, dtype: bf16}]", "did you mean 'bfloat16'"),
        ("rewrite: [{kind: cast, dtypes: bfloat16}]", "did you mean 'dtype'"),
        (
            "rewrite: [{kind: cast, dtype: bfloat16}]\noutput: {dtype: float16}",
            "output.dtype is about models",
        ),
        (
            "rewrite: [{kind: cast, dtype: bfloat16}]\nevaluate: {embedded: true}",
            "evaluate is about models",
        ),
    ],
)
def test_a_recipe_says_what_is_wrong_with_its_rewrite(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"name: a\n{text}")
