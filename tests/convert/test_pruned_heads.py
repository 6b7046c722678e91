"""Heads that `shrp` leaves out: the saved model has narrower projections, and computes what masked heads do."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    ViTConfig,
)

from attnconv.convert import convert_model, converted_modules
from attnconv.convert.planning.plan import Plan
from attnconv.convert.surgery.pruned_heads import prune_plan, take_heads_out
from attnconv.errors import PlanError
from attnconv.packaged.model import embedded_model_path
from attnconv.recipes import parse_recipe
from attnconv.runs import run_conversion

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "bert": BertConfig(vocab_size=64, **SIZES),
    "distilbert": DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    "llama": LlamaConfig(vocab_size=64, num_key_value_heads=2, **SIZES),
    "vit": ViTConfig(image_size=16, patch_size=4, **SIZES),
}
RECIPE = """
name: a
attention: [{layers: all, method: shrp, options: {keep: 2, expander: 8}}]
data: {embedded: true}
stages:
  - {kind: calibrate, tokens: 128, sequence_length: 32, batch_size: 2}
  - {kind: features, steps: 1, sequence_length: 32, learning_rate: 1.0e-3}
"""


def gated(config: Any, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = convert_model(AutoModel.from_config(copy.deepcopy(config)).eval(), "shrp", **options)
    for module in converted_modules(model).values():
        for parameter in module.attnconv.parameters():
            torch.nn.init.normal_(parameter)
    return model


def answers(model: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:] = 0
    tokens = {"input_ids": torch.arange(20).view(2, 10), "attention_mask": mask}
    images = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    with torch.no_grad():
        found: torch.Tensor = model(**(images if model.main_input_name == "pixel_values" else tokens)).last_hidden_state
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_the_heads_it_is_the_model_with_them_shut_and_reloads(kind: str, tmp_path: Path) -> None:
    model = gated(CONFIGS[kind], keep=1 if kind == "llama" else 3, expander=5)
    wide = answers(model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    take_heads_out(model, prune_plan(Plan.from_config(model.config.attnconv)))
    assert sum(parameter.numel() for parameter in model.parameters()) < whole
    torch.testing.assert_close(answers(model), wide)
    model.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(answers(reloaded), answers(model))
    # Once more, now that it is narrow from the start.
    reloaded.save_pretrained(tmp_path / "again")
    assert torch.equal(answers(AutoModel.from_pretrained(tmp_path / "again").eval()), answers(model))


def test_a_model_that_is_not_pruned_yet_reloads_as_it_is(tmp_path: Path) -> None:
    model = gated(CONFIGS["bert"], keep=2)
    model.save_pretrained(tmp_path)
    assert torch.equal(answers(AutoModel.from_pretrained(tmp_path).eval()), answers(model))


def test_projections_that_are_one_are_refused_by_name() -> None:
    model = gated(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64), keep=2)
    with pytest.raises(PlanError, match="cannot be left with 2 of 4 KV heads: its c_attn.weight is of all heads"):
        take_heads_out(model, prune_plan(Plan.from_config(model.config.attnconv)))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    config = copy.deepcopy(CONFIGS["bert"])
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_observes_heals_and_leaves_the_heads_out(encoder: Path, tmp_path: Path) -> None:
    run_conversion(encoder, parse_recipe(RECIPE), tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    for module in converted_modules(model).values():
        assert module.query.weight.shape == (16, 32)
        # The shares of heads that stayed, which are those of the two most used.
        assert float(module.attnconv.usage.detach().sum()) > 0.5
        assert module.attnconv.up.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("stages.0", None), "no stage observes which are used: begin the stages with"),
        (("output.merge_lora", False), "set output.merge_lora to true"),
    ],
)
def test_what_leaving_heads_out_needs_is_asked_for_at_once(
    encoder: Path, tmp_path: Path, change: tuple[str, Any], message: str
) -> None:
    recipe = parse_recipe(RECIPE)
    if change[0] == "stages.0":
        recipe = recipe.model_copy(update={"stages": recipe.stages[1:]})
    else:
        recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"merge_lora": False})})
    with pytest.raises(PlanError, match=message):
        run_conversion(encoder, recipe, tmp_path / "out")
