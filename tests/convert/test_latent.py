"""Latent attention: the DeepSeek-V3 class computes what the model did, exactly where nothing is left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten import (
    EXACT,
    PROMPTS,
    assert_same,
    assert_saved_alike,
    dense,
    loaded,
    logits,
    logits_of_a_fresh_process,
    rewriting,
    word_tokenizer,
)
from safetensors.torch import load_file
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from attnconv.convert.rewriting.checkpoint import rewrite_checkpoint
from attnconv.convert.rewriting.latent import Latent
from attnconv.convert.rewriting.latent_layer import LatentSizes, latent_layer, rotary_components
from attnconv.convert.rewriting.pooling import PoolHeads
from attnconv.convert.rewriting.selection import PruneHeads
from attnconv.convert.rewriting.steps import Step
from attnconv.errors import PlanError, RecipeError
from attnconv.files.json_files import read_json
from attnconv.recipes import load_recipe, parse_recipe
from attnconv.runs import run_conversion

# So that rounding in one more norm and one more product is not blown up by random layers.
MILD = {"initializer_range": 0.1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def calibrate(text: Path) -> dict[str, Any]:
    return {"path": str(text), "tokens": 600, "sequence_length": 100}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("mistral", {"sliding_window": None, "num_key_value_heads": 6}),
    ],
)
def test_nothing_is_lost_where_nothing_is_left_out(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    base = dense(kind, tmp_path / "base", **MILD, **settings)
    result = run_conversion(base, rewriting({"kind": "latent"}), tmp_path / "out")
    assert result.plan.is_native
    model = loaded(tmp_path / "out")
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    heads = settings.get("num_key_value_heads", 3)
    assert model.config.kv_lora_rank + model.config.qk_rope_head_dim == 2 * heads * 8 + 1
    assert_same(loaded(base), model)
    assert_saved_alike(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e5}, LLAMA3])
def test_where_nothing_is_left_out_weights_and_frequencies_are_the_models_own(
    tmp_path: Path, rope: dict[str, Any]
) -> None:
    """A rotary pair that is off by the last bit of its frequency is off by more with each position."""
    base = dense("llama", tmp_path / "base", rope_parameters=rope, **MILD)
    run_conversion(base, rewriting({"kind": "latent"}), tmp_path / "out")
    old, new = loaded(base).model, loaded(tmp_path / "out").model
    assert torch.equal(new.rotary_emb.inv_freq, old.rotary_emb.inv_freq.repeat_interleave(3))
    for before, after in zip(old.layers, new.layers, strict=True):
        _, values, keys = after.self_attn.kv_a_proj_with_mqa.weight.split([1, 24, 24])
        assert torch.equal(values, before.self_attn.v_proj.weight)
        # Frequency by frequency, real parts first.
        assert torch.equal(keys.view(2, 4, 3, -1).permute(2, 0, 1, 3).flatten(0, 2), before.self_attn.k_proj.weight)
        expansion = after.self_attn.kv_b_proj.weight
        assert set(expansion.unique().tolist()) == {0.0, 1.0}


def test_the_norm_passes_latents_on_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value, output, inputs = (
        torch.randn(*shape, generator=draw) for shape in [(192, 20), (192, 20), (192, 20), (20, 192), (20, 50)]
    )
    sizes = LatentSizes(3, 3, 64, torch.full((32,), 3), 192, True, False)
    made = latent_layer((query, key, value, output), torch.eye(20, dtype=torch.float64), sizes, 3.0)
    down, bias = made["kv_a_proj_with_mqa.weight"].float(), made["kv_a_proj_with_mqa.bias"].float()
    norm = DeepseekV3RMSNorm(193)
    norm.weight.data = made["kv_a_layernorm.weight"].float()
    latents = (down @ inputs).T[:, :193] + bias[:193]
    assert torch.equal(norm(latents)[:, 1:], latents[:, 1:])


def test_a_fresh_process_needs_transformers_alone(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base", **MILD)
    settings = {
        "numbers": "null",
        **{f"calibrate.{key}": value for key, value in calibrate(word_tokenizer(base)).items()},
    }
    recipe = load_recipe("latent", ["stages=[]", *(f"rewrite.0.{key}={value}" for key, value in settings.items())])
    run_conversion(base, recipe, tmp_path / "out")
    assert "neither the bias" in (tmp_path / "out" / "README.md").read_text()
    fresh = logits_of_a_fresh_process(tmp_path / "out", tmp_path / "logits")
    wanted = logits(loaded(base))
    assert (fresh - wanted).abs().max() <= EXACT * wanted.abs().max()


def test_what_repeats_takes_the_numbers_of_one_head(tmp_path: Path) -> None:
    """Three equal heads: 8 numbers of their keys, 8 of their values, and the constant."""
    plain = dense("llama", tmp_path / "plain", num_key_value_heads=1, **MILD)
    text = word_tokenizer(plain)
    run_conversion(plain, rewriting({"kind": "degroup", "kv_heads": 3}), tmp_path / "base")
    step = {"kind": "latent", "numbers": 17, "rotary": 8, "calibrate": calibrate(text)}
    run_conversion(tmp_path / "base", rewriting(step), tmp_path / "out")
    config = loaded(tmp_path / "out").config
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (9, 8)
    assert_same(loaded(plain), loaded(tmp_path / "out"), 1e-5)


def test_the_cache_holds_the_numbers_that_were_asked_for_and_more_of_them_are_nearer(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base", **MILD)
    text = word_tokenizer(base)
    wanted, far = logits(loaded(base)), []
    for numbers in (41, 17):
        step = {"kind": "latent", "numbers": numbers, "calibrate": calibrate(text)}
        run_conversion(base, rewriting(step), tmp_path / str(numbers))
        model = loaded(tmp_path / str(numbers))
        with torch.no_grad():
            layers = model(PROMPTS, use_cache=True).past_key_values.layers
        assert {layer.keys.shape[-1] + layer.values.shape[-1] for layer in layers} == {numbers}
        far.append(float((logits(model) - wanted).square().mean()))
    assert far[0] < far[1]


def test_without_the_constant_engines_read_it_and_the_norm_changes_it(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base", num_key_value_heads=1, **MILD)
    step = {"kind": "latent", "constant": False, "calibrate": calibrate(word_tokenizer(base))}
    run_conversion(base, rewriting(step), tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config["attention_bias"], config["rope_interleave"], config["qk_rope_head_dim"]) == (False, True, 8)
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.endswith("bias")]
    old, new = loaded(base), loaded(tmp_path / "out")
    wanted = logits(old)
    assert (logits(new) - wanted).abs().max() > 1e-3 * wanted.abs().max()
    # With the norm taken away, it is the same model: one key head, rotated as it was.
    for layer in new.model.layers:
        scale = layer.self_attn.kv_a_layernorm.weight.data[0].item()
        layer.self_attn.kv_a_layernorm = torch.nn.Identity()
        assert scale > 0
    assert (logits(new) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_those_keys_stay_rotary_that_would_lose_most_without() -> None:
    frequencies = 1e4 ** -(torch.arange(4, dtype=torch.float64) / 4)
    energies = torch.tensor([[[8.0, 1.0], [4.0, 1.0], [4.0, 0.1], [4.0, 0.1]]], dtype=torch.float64)
    # The slowest of four frequencies turns by a radian in 1,000 positions only.
    assert rotary_components(energies, frequencies, 3).tolist() == [1, 1, 1, 0]
    assert rotary_components(energies, frequencies, 8).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kept", [[1, 1, 0, 0], [2, 1, 0, 3], [3, 3, 3, 3]])
def test_with_all_its_numbers_a_layer_gives_keys_and_values_back(kept: list[int], interleaved: bool) -> None:
    """Where nothing is rotated, whether a component is in the rotary key or in the latent makes no difference."""
    draw = torch.Generator().manual_seed(0)
    query, key, value, output, inputs = (
        torch.randn(*shape, dtype=torch.float64, generator=draw)
        for shape in [(48, 20), (24, 20), (24, 20), (20, 48), (2, 20)]
    )
    rotary = 2 * sum(kept)
    sizes = LatentSizes(6, 3, 8, torch.tensor(kept), 48 - rotary, False, interleaved)
    made = latent_layer((query, key, value, output), torch.eye(20, dtype=torch.float64), sizes, 3.0)
    reading = (made["q_proj.weight"] @ inputs[0]).view(6, -1) * (8 / (8 + rotary)) ** 0.5
    latent, turned = (made["kv_a_proj_with_mqa.weight"] @ inputs[1]).split([48 - rotary, rotary])
    keys, values = (made["kv_b_proj.weight"] @ latent).view(6, 2, 8).unbind(1)
    products = (reading[:, :8] * keys).sum(1) + reading[:, 8:] @ turned
    wanted = ((query @ inputs[0]).view(6, 8) * (key @ inputs[1]).view(3, 8).repeat_interleave(2, 0)).sum(1)
    assert torch.allclose(products, wanted)
    assert torch.allclose(values, (value @ inputs[1]).view(3, 8).repeat_interleave(2, 0))


@pytest.mark.parametrize(
    ("kind", "settings", "step", "said"),
    [
        ("llama", {"attention_bias": True}, {}, r"with biases \(attention_bias\), which DeepSeek-V3 has no place for"),
        ("qwen2", {}, {}, "with biases"),
        ("qwen3", {}, {}, "normalised head by head"),
        ("smollm3", {}, {}, "no rotary embedding"),
        ("mistral", {"sliding_window": 8}, {}, "with a sliding window"),
        ("mixtral", {"num_local_experts": 2}, {}, "of a mixtral model, whose feed-forwards are experts"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            {},
            "the rotary embedding dynamic, whose frequencies depend on the length",
        ),
        ("llama", {"rope_parameters": LLAMA3}, {"constant": False}, "llama3, for which it needs the constant"),
        ("llama", {}, {"numbers": 50}, "is to keep 50 numbers .* 3 key/value heads have 48: give fewer"),
        ("llama", {}, {"numbers": 20, "rotary": 7}, "cannot rotate 7 of 20 numbers: an even number from 2 to 18"),
        ("llama", {}, {"numbers": 20, "rotary": 20}, "cannot rotate 20 of 20"),
        ("llama", {}, {"numbers": 20, "rotary": 4, "constant": False}, "as many numbers as a head has, 8, and not 4"),
    ],
)
def test_what_does_not_fit_the_class_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], step: dict[str, Any], said: str
) -> None:
    base = dense(kind, tmp_path / "base", **settings)
    with pytest.raises(PlanError, match=said):
        run_conversion(
            base, rewriting({"kind": "latent", "calibrate": {"path": "missing.txt"}, **step}), tmp_path / "out"
        )


def test_a_constant_beyond_the_type_is_refused(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base", initializer_range=0.9, dtype="float16")
    loaded(base).half().save_pretrained(base)
    with pytest.raises(PlanError, match="constant is too large for float16: cast the model to bfloat16"):
        run_conversion(base, rewriting({"kind": "latent"}), tmp_path / "out")


@pytest.mark.parametrize(
    "step", [Latent(numbers=20), PoolHeads(kv_heads=1), PoolHeads(kv_heads=1, how="select"), PruneHeads(keep=1)]
)
def test_steps_that_were_not_settled_say_so(tmp_path: Path, step: Step) -> None:
    base = dense("llama", tmp_path / "base")
    with pytest.raises(PlanError, match="calibrate"):
        rewrite_checkpoint(base, [step], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["numbers: 20", "rotary: 4", "constant: false"])
def test_a_recipe_that_leaves_something_out_needs_a_text(text: str) -> None:
    with pytest.raises(RecipeError, match="on a text: give calibrate"):
        parse_recipe(f"name: a\nrewrite: [{{kind: latent, {text}}}]")
