"""Heads repeated or left out: the model computes what it did, or what it does where those heads are silent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten import (
    EXACT,
    assert_same,
    assert_saved_alike,
    dense,
    loaded,
    logits,
    logits_of_a_fresh_process,
    rewriting,
    word_tokenizer,
)
from safetensors.torch import load_file, save_file
from tiny_models import edit_config
from transformers import PreTrainedModel

from attnconv.errors import PlanError, RecipeError
from attnconv.files.json_files import read_json
from attnconv.recipes import parse_recipe
from attnconv.runs import run_conversion

MODELS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3_moe", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}),
    ("smollm3", {"no_rope_layer_interval": 2}),
]


def silenced(folder: Path, heads: list[list[int]]) -> PreTrainedModel:
    """The model with the output of each layer's given query heads left out."""
    model = loaded(folder)
    for layer, silent in zip(model.model.layers, heads, strict=True):
        weight = layer.self_attn.o_proj.weight.data.view(model.config.hidden_size, -1, 8)
        weight[:, silent] = 0
    return model


@pytest.mark.parametrize(("kind", "settings"), MODELS[1::2])
def test_degrouped_models_compute_the_same(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    base = dense(kind, tmp_path / "base", **settings)
    result = run_conversion(base, rewriting({"kind": "degroup"}), tmp_path / "out")
    assert result.plan.is_native
    model = loaded(tmp_path / "out")
    assert model.config.num_key_value_heads == 6
    assert type(model) is type(loaded(base))
    assert_same(loaded(base), model)
    assert_saved_alike(tmp_path / "out", tmp_path / "again")


def test_heads_can_be_degrouped_in_part(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base", num_key_value_heads=1, initializer_range=0.15)
    run_conversion(base, rewriting({"kind": "degroup", "kv_heads": 3}), tmp_path / "out")
    assert loaded(tmp_path / "out").config.num_key_value_heads == 3
    # One shared head is computed by another kernel, whose rounding in float32 would hide an error.
    assert_same(loaded(base).double(), loaded(tmp_path / "out").double(), 1e-12)


@pytest.mark.parametrize(("number", "unit"), [(i, ("kv", "query")[i % 2]) for i in range(len(MODELS))])
def test_pruned_models_are_those_with_the_heads_silenced(tmp_path: Path, number: int, unit: str) -> None:
    kind, settings = MODELS[number]
    base = dense(kind, tmp_path / "base", **settings)
    remove, silent, left = ([1], [2, 3], (4, 2)) if unit == "kv" else ([0, 3, 5], [0, 3, 5], (3, 3))
    run_conversion(base, rewriting({"kind": "prune_heads", "unit": unit, "remove": remove}), tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == left
    assert_same(silenced(base, [silent] * 3), model)
    assert_saved_alike(tmp_path / "out", tmp_path / "again")


def test_each_layer_can_lose_other_heads(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base")
    run_conversion(base, rewriting({"kind": "prune_heads", "remove": [[0], [2], [1]]}), tmp_path / "out")
    assert_same(silenced(base, [[0, 1], [4, 5], [2, 3]]), loaded(tmp_path / "out"))


def test_a_llama_whose_heads_do_not_divide_its_hidden_size_is_written_as_a_mistral(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    base = dense("llama", tmp_path / "base", num_attention_heads=6, num_key_value_heads=6, rope_parameters=rope)
    edit_config(base, sliding_window=4, rms_norm_eps=None)
    run_conversion(base, rewriting({"kind": "prune_heads", "remove": [2]}), tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] is None
    # Llama's class ignores the stray window, but the cache that it generates with does not.
    edit_config(base, sliding_window=None)
    wanted = silenced(base, [[2]] * 3)
    assert_same(wanted, loaded(tmp_path / "out"))
    assert_saved_alike(tmp_path / "out", tmp_path / "again")
    fresh = logits_of_a_fresh_process(tmp_path / "out", tmp_path / "logits")
    assert (fresh - logits(wanted)).abs().max() <= EXACT * fresh.abs().max()


def test_importance_keeps_the_heads_that_add_most(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base")
    text = word_tokenizer(base)
    weights = load_file(base / "model.safetensors")
    for layer, quiet in enumerate([0, 2, 1]):
        weight = weights[f"model.layers.{layer}.self_attn.o_proj.weight"].view(48, 3, 16)
        weight[:, quiet] *= 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    calibrate = {"path": str(text), "tokens": 300, "sequence_length": 64}
    step = {"kind": "prune_heads", "keep": 2, "calibrate": calibrate}
    run_conversion(base, rewriting(step), tmp_path / "out")
    run_conversion(base, rewriting({"kind": "prune_heads", "remove": [[0], [2], [1]]}), tmp_path / "wanted")
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(loaded(tmp_path / "wanted")))
    run_conversion(base, rewriting({**step, "unit": "query", "keep": 3}), tmp_path / "halved")
    assert loaded(tmp_path / "halved").config.num_attention_heads == 3
    # Behind another rewrite it is that one's result that is measured, and the scratch folder is gone afterwards.
    run_conversion(base, rewriting({"kind": "degroup"}, {**step, "keep": 4}), tmp_path / "both")
    assert loaded(tmp_path / "both").config.num_key_value_heads == 4
    assert_same(loaded(tmp_path / "out"), loaded(tmp_path / "both"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "text.jsonl", "out", "wanted", "halved", "both"}


def test_usage_keeps_the_heads_that_are_most_often_first() -> None:
    from attnconv.convert.rewriting.attention_classes import Heads
    from attnconv.convert.rewriting.moments import LayerMoments, MomentSums
    from attnconv.convert.rewriting.selection import PruneHeads

    sums = MomentSums(torch.eye(6), 3)
    # Heads of two numbers each: the first is far the longest once, the second most often.
    sums.add_inputs(torch.zeros(4, 6))
    sums.add_outputs(torch.tensor([[9.0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0.5]]))
    found = sums.means()
    assert found.first.tolist() == [0.25, 0.75, 0]
    for by, kept in (("contribution", [0]), ("usage", [1])):
        step = PruneHeads(keep=1, by=by)
        step._heads = Heads(layers=1, query=3, kv=3, dim=2, hidden=6)
        step.settle({0: LayerMoments(found.second, found.mean, found.contributions, found.first)})
        assert step.chosen(0)[1] == kept


def test_what_is_measured_is_what_each_head_adds(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from attnconv.distill.calibration import measure_moments
    from attnconv.recipes import CalibrateSection

    base = dense("llama", tmp_path / "base", attn_implementation="eager")
    text = word_tokenizer(base)
    model, tokenizer = loaded(base), AutoTokenizer.from_pretrained(base)
    section = CalibrateSection(path=str(text), tokens=100, sequence_length=64)
    moments = measure_moments(model, tokenizer, section)
    seen: list[torch.Tensor] = []
    attention = model.model.layers[1].self_attn
    taps = [
        attention.q_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0])),
        attention.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0])),
    ]
    measure_moments(model, tokenizer, section)
    for tap in taps:
        tap.remove()
    inputs, outputs = torch.cat(seen[::2]).double(), torch.cat(seen[1::2]).double()
    assert len(inputs) == 100
    assert torch.allclose(moments[1].second, inputs.T @ inputs / 100)
    assert torch.allclose(moments[1].mean, inputs.mean(0))
    weight = attention.o_proj.weight.double().view(48, 6, 8)
    added = torch.einsum("dhn,thn->thd", weight, outputs.view(100, 6, 8)).norm(dim=-1).mean(0)
    assert torch.allclose(moments[1].contributions, added)
    assert moments[1].with_one.shape == (49, 49)
    assert moments[1].with_one[-1, -1] == 1


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"kind": "degroup", "kv_heads": 4}, "cannot make 4 key/value heads of 3 that serve 6 .* kv_heads can be 6$"),
        ({"kind": "degroup", "kv_heads": 3}, "cannot make 3 key/value heads of 3"),
        ({"kind": "prune_heads", "remove": [3]}, "remove number 3 of the key/value heads, which are 0 to 2"),
        ({"kind": "prune_heads", "remove": [0, 1, 2]}, "is to remove 3 of 3 key/value heads"),
        ({"kind": "prune_heads", "remove": [[0], [1]]}, "2 lists of heads to remove, and the model has 3 layers"),
        ({"kind": "prune_heads", "remove": [[0], [1], [0, 1]]}, "1 key/value heads in one layer and 2 in another"),
        ({"kind": "prune_heads", "unit": "query", "remove": [0]}, r"would leave 1, 2, 2 query heads .* \(unit: kv\)"),
        ({"kind": "prune_heads", "keep": 3}, "keep 3 of 3 key/value heads: keep can be 1 to 2"),
        ({"kind": "prune_heads", "keep": 4, "unit": "query"}, "cannot keep 4 query heads, .* keep a multiple of 3"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, step: dict[str, Any], said: str) -> None:
    base = dense("llama", tmp_path / "base")
    if "keep" in step:
        step = {**step, "calibrate": {"path": "missing.txt"}}
    with pytest.raises(PlanError, match=said):
        run_conversion(base, rewriting(step), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    step = rewriting({"kind": "prune_heads", "remove": [0]})
    for kind, settings, said in [
        ("gemma2", {}, "prune_heads does not know the attention of gemma2 models: it takes llama, mistral"),
        ("olmo2", {}, "does not know the attention of olmo2"),
        ("llama", {"attention_bias": True, "num_key_value_heads": 6}, r"5 query heads.* no biases \(attention_bias\)"),
    ]:
        base = dense(kind, tmp_path / f"{kind}-{len(settings)}", **settings)
        with pytest.raises(PlanError, match=said):
            run_conversion(base, step, tmp_path / "out")
    base = dense("llama", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    key = "model.layers.1.self_attn.k_proj.weight"
    for tensors, said in [
        ({name: tensor for name, tensor in weights.items() if name != key}, "all projections in 2 of 3 layers"),
        ({**weights, key: weights[key][:8].clone()}, r"to have the shape \(24, 48\), as config.json has it"),
        ({**weights, key: weights[key].to(torch.float8_e4m3fn)}, "which has the type F8_E4M3"),
        ({**weights, "model.layers.1.self_attn.odd": torch.ones(2)}, "cannot take the tensor .*odd' over"),
    ]:
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(PlanError, match=said):
            run_conversion(base, step, tmp_path / "out")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for changes, said in [
        ({"architectures": ["LlamaForSequenceClassification"]}, "a LlamaForSequenceClassification, only a LlamaFor"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
    ]:
        edit_config(base, **changes)
        with pytest.raises(PlanError, match=said):
            run_conversion(base, step, tmp_path / "out")
        edit_config(base, architectures=["LlamaForCausalLM"], quantization_config=None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: prune_heads", "exactly one of keep, remove is wanted, got none"),
        ("kind: prune_heads, keep: 1", "give calibrate, or say which to remove"),
        ("kind: prune_heads, remove: [0], calibrate: {embedded: true}", "calibrate has no effect beside remove"),
        ("kind: prune_heads, keep: 1, calibrate: {path: a, image_field: b}", "leave image_field out"),
        ("kind: prune_heads, remove: [-1]", "greater than or equal to 0"),
        ("kind: degroup, kv_heads: 0", "greater than or equal to 1"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_its_heads(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"name: a\nrewrite: [{{{text}}}]")
