"""Attentions side by side in one layer, and the router that mixes them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import rewritten
import torch
from rewritten import EXACT, PROMPTS, loaded, logits
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import JetMoeConfig, PreTrainedModel
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention
from wide_models import LAYERS, SIZES, attend, widened

from attnconv.attention_modules.heads.moa import MoaAttention
from attnconv.convert import converted_modules
from attnconv.errors import PlanError, RecipeError
from attnconv.recipes import Recipe, parse_recipe
from attnconv.runs import run_conversion


def dense(kind: str, folder: Path, **settings: Any) -> Path:
    return rewritten.dense(kind, folder, sizes=SIZES, **settings)


def with_random_routers(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(1)
    for module in converted_modules(model).values():
        nn.init.normal_(module.attnconv.router)
    return model


@pytest.mark.parametrize(
    ("kind", "settings", "model", "share_kv"),
    [
        # 12 heads divide no width of 32, so that a Llama is written as the Mistral that it is.
        ("llama", {}, "Mistral", False),
        ("llama", {"hidden_size": 48, "head_dim": 12}, "Llama", True),
        ("mistral", {"sliding_window": 8}, "Mistral", True),
        ("mixtral", {"num_local_experts": 3}, "Mixtral", False),
        ("qwen2", {}, "Qwen2", True),
        ("qwen2_moe", {"num_experts": 4}, "Qwen2Moe", False),
        ("qwen3", {"head_dim": 16}, "Qwen3", False),
        ("gemma", {"head_dim": 8}, "Gemma", True),
        ("granite", {}, "Granite", False),
    ],
)
def test_equal_attentions_are_together_what_one_is(
    tmp_path: Path, kind: str, settings: dict[str, Any], model: str, share_kv: bool
) -> None:
    base = dense(kind, tmp_path / "base", **LAYERS, **settings)
    run_conversion(base, widened(3, share_kv=share_kv), tmp_path / "out")
    old, new = loaded(base), with_random_routers(loaded(tmp_path / "out"))
    assert type(new).__name__ == f"{model}ForCausalLM"
    assert new.config.num_key_value_heads == old.config.num_key_value_heads * (1 if share_kv else 3)
    before, after = logits(old), logits(new)
    assert (after - before).abs().max() <= EXACT * before.abs().max()
    texts = [m.generate(PROMPTS[:, :9], max_new_tokens=8, do_sample=False) for m in (old, new)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("active", [1, 2])
def test_the_same_where_a_token_goes_through_some(tmp_path: Path, active: int) -> None:
    base = dense("llama", tmp_path / "base", **LAYERS)
    run_conversion(base, widened(3, active=active), tmp_path / "out")
    before = logits(loaded(base))
    after = logits(with_random_routers(loaded(tmp_path / "out")))
    assert (after - before).abs().max() <= EXACT * before.abs().max()


def unlike(model: PreTrainedModel, num_experts: int) -> nn.Module:
    """The first attention of a widened model, all whose projections differ."""
    torch.manual_seed(2)
    attention: nn.Module = with_random_routers(model).model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        nn.init.normal_(projection.weight, std=0.3)
    return attention


def heads_of(attention: Any, expert: int, base: Any, *, share_kv: bool) -> Any:
    """One of the attentions of a widened layer as a layer of its own, read off the order in which heads stand."""
    alone = copy.deepcopy(base)
    kv, groups, dim = 2, 2, 8
    for name, heads in (("q_proj", kv * groups), ("k_proj", kv), ("v_proj", kv)):
        weight = getattr(attention, name).weight
        if share_kv and name == "q_proj":
            part = weight.view(kv, -1, groups, dim, 32)[:, expert].reshape(-1, 32)
        elif share_kv:
            part = weight
        else:
            part = weight.view(-1, heads, dim, 32)[expert].reshape(-1, 32)
        getattr(alone, name).weight.data = part
    out = attention.o_proj.weight
    shape = (32, kv, -1, groups, dim) if share_kv else (32, -1, kv, groups, dim)
    alone.o_proj.weight.data = out.view(shape).select(2 if share_kv else 1, expert).reshape(32, -1)
    return alone


@pytest.mark.parametrize("share_kv", [False, True], ids=["own KV", "shared KV"])
def test_different_attentions_are_the_written_out_sum(tmp_path: Path, share_kv: bool) -> None:
    base = dense("mistral", tmp_path / "base", **LAYERS, sliding_window=None)
    run_conversion(base, widened(3, share_kv=share_kv), tmp_path / "out")
    model, hidden = loaded(tmp_path / "out"), torch.randn(2, 30, 32)
    attention, plain = unlike(model, 3), loaded(base)
    found = attend(model, attention, hidden)
    gates = (hidden @ attention.attnconv.router.T).softmax(-1)
    alone = [heads_of(attention, e, plain.model.layers[0].self_attn, share_kv=share_kv) for e in range(3)]
    wanted = sum(gates[..., e : e + 1] * attend(plain, one, hidden) for e, one in enumerate(alone))
    assert isinstance(wanted, Tensor)
    assert (found - wanted).abs().max() <= EXACT * wanted.abs().max()


def test_shared_keys_and_values_are_the_attention_of_jetmoe(tmp_path: Path) -> None:
    base = dense("mistral", tmp_path / "base", **LAYERS, sliding_window=None)
    run_conversion(base, widened(3, share_kv=True), tmp_path / "out")
    model, hidden = loaded(tmp_path / "out"), torch.randn(2, 30, 32)
    attention = unlike(model, 3)
    # An expert of JetMoe's is one query head of each KV head, and each of ours is as many of those as share a KV head.
    kv, groups, dim = 2, 2, 8
    config = JetMoeConfig(
        hidden_size=32,
        num_key_value_heads=kv,
        kv_channels=dim,
        num_local_experts=3 * groups,
        num_experts_per_tok=3 * groups,
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    theirs = JetMoeAttention(config, 0).eval()
    query = attention.q_proj.weight.view(kv, 3 * groups, dim, 32)
    out = attention.o_proj.weight.view(32, kv, 3 * groups, dim)
    with torch.no_grad():
        theirs.experts.bias.zero_()
        theirs.kv_proj.weight.copy_(torch.cat([attention.k_proj.weight, attention.v_proj.weight]))
        for expert in range(3 * groups):
            theirs.experts.input_linear.weight[expert].copy_(query[:, expert].reshape(-1, 32))
            theirs.experts.output_linear.weight[expert].copy_(out[:, :, expert].reshape(32, -1) * groups)
            theirs.experts.router.layer.weight[expert].copy_(attention.attnconv.router[expert // groups])
        causal = torch.full((30, 30), float("-inf")).triu(1)[None, None]
        embeddings = model.model.rotary_emb(hidden, torch.arange(30)[None])
        wanted = theirs(hidden, attention_mask=causal, position_embeddings=embeddings)[0]
    assert (attend(model, attention, hidden) - wanted).abs().max() <= EXACT * wanted.abs().max()


def test_heads_stand_side_by_side_and_keep_their_bytes(tmp_path: Path) -> None:
    base = dense("qwen2", tmp_path / "base", **LAYERS)
    run_conversion(base, widened(2), tmp_path / "out")
    before, after = (
        {name: tensor for file in (tmp_path / folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in ("base", "out")
    )
    prefix = "model.layers.1.self_attn"
    for name in ("q_proj.weight", "k_proj.bias", "v_proj.weight"):
        assert torch.equal(after[f"{prefix}.{name}"], torch.cat([before[f"{prefix}.{name}"]] * 2))
    out = before[f"{prefix}.o_proj.weight"]
    assert torch.equal(after[f"{prefix}.o_proj.weight"], torch.cat([out, out], 1))
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_it_can_follow_other_rewrites(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base", **LAYERS)
    recipe = widened(2)
    both = recipe.model_copy(
        update={"rewrite": [*Recipe(name="a", rewrite=[{"kind": "experts"}]).rewrite, *recipe.rewrite]}
    )
    run_conversion(base, both, tmp_path / "out")
    new = loaded(tmp_path / "out")
    assert type(new).__name__ == "MixtralForCausalLM"
    assert isinstance(new.model.layers[0].self_attn.attnconv, MoaAttention)
    before = logits(loaded(base))
    assert (logits(new) - before).abs().max() <= EXACT * before.abs().max()


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("gpt_neox", {}, "widen does not know the attention of gpt_neox models: it takes llama, mistral, .*gemma"),
        ("llama", {"attention_bias": True}, "a mistral has no attention_bias: choose num_experts so that the heads"),
    ],
)
def test_what_cannot_be_widened_is_refused(tmp_path: Path, kind: str, settings: dict[str, Any], said: str) -> None:
    base = dense(kind, tmp_path / "base", **LAYERS, **settings)
    with pytest.raises(PlanError, match=said):
        run_conversion(base, widened(3), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_experts_must_be_those_of_the_layer(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base", **LAYERS)
    for options, said in {
        "num_experts: 3": "num_experts=3 does not divide the 8 query heads",
        "num_experts: 2, active: 3": r"active=3 is more than there are experts \(2\)",
        "num_experts: 8, share_kv: true": "num_experts=8 does not divide the 4 query heads of each KV head",
    }.items():
        share = "true" if "share_kv" in options else "false"
        rewrite = f"[{{kind: widen, share_kv: {share}}}]"
        text = f"name: a\nrewrite: {rewrite}\nattention: [{{layers: all, method: moa, options: {{{options}}}}}]"
        with pytest.raises(PlanError, match=said):
            run_conversion(base, parse_recipe(text), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rewrite: [{kind: widen}]", r"makes layers for the method 'moa': add an attention rule \{layers: all, method"),
        (
            "rewrite: [{kind: widen, num_experts: 1}]\nattention: [{layers: all, method: moa}]",
            "num_experts must be at least 2",
        ),
    ],
)
def test_a_recipe_says_what_is_wrong_with_it(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"name: a\n{text}")
