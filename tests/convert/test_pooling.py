"""Pooled heads: exact where the heads say the same, better than their mean where they do not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten import (
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

from attnconv.convert.rewriting.components import (
    complex_pairs,
    key_components,
    meeting,
    principal,
    real_rows,
    weighted_values,
)
from attnconv.errors import PlanError, RecipeError
from attnconv.recipes import load_recipe, parse_recipe
from attnconv.runs import run_conversion


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def disguised(folder: Path) -> Path:
    """A model whose three key/value heads say the same in three ways; gives it in a folder of its own."""
    run_conversion(folder, rewriting({"kind": "degroup", "kv_heads": 3}), folder.parent / "disguised")
    file = folder.parent / "disguised" / "model.safetensors"
    weights = load_file(file)
    for layer in range(3):
        parts = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for name in "qkvo"]
        query, key, value, output = (weights[name].double() for name in parts)
        for head in range(3):
            own, readers = slice(8 * head, 8 * head + 8), slice(16 * head, 16 * head + 16)
            turn = torch.complex(drawn(4, 1), drawn(1, 4 + head)[:, :4].T)
            key[own] = real_rows(complex_pairs(key[own], 1) * turn)
            query[readers] = real_rows(complex_pairs(query[readers], 2) / turn.conj())
            mixing = drawn(8, 8 + head)[:, :8] + 3 * torch.eye(8)
            value[own] = mixing @ value[own]
            output[:, readers] = (output[:, readers].view(-1, 2, 8) @ mixing.inverse()).flatten(1)
        weights |= {name: tensor.float() for name, tensor in zip(parts, (query, key, value, output), strict=True)}
    save_file(weights, file, metadata={"format": "pt"})
    return file.parent


def calibrate(text: Path) -> dict[str, Any]:
    return {"path": str(text), "tokens": 600, "sequence_length": 100}


def test_heads_that_say_the_same_become_one_without_loss(tmp_path: Path) -> None:
    plain = dense("llama", tmp_path / "plain", num_key_value_heads=1, initializer_range=0.15)
    text = word_tokenizer(plain)
    base = disguised(plain)
    wanted = loaded(plain)
    assert (logits(loaded(base)) - logits(wanted)).abs().max() < 1e-4
    settings = [f"rewrite.0.calibrate.{key}={value}" for key, value in calibrate(text).items()]
    recipe = load_recipe("pool-heads", ["stages=[]", *settings])
    run_conversion(base, recipe, tmp_path / "out")
    assert loaded(tmp_path / "out").config.num_key_value_heads == 1
    assert_same(wanted, loaded(tmp_path / "out"), 1e-5)
    assert_saved_alike(tmp_path / "out", tmp_path / "again")
    fresh = logits_of_a_fresh_process(tmp_path / "out", tmp_path / "logits")
    assert (fresh - logits(wanted)).abs().max() < 1e-4
    run_conversion(base, rewriting({"kind": "pool_heads", "kv_heads": 1, "how": "mean"}), tmp_path / "mean")
    assert (logits(loaded(tmp_path / "mean")) - logits(wanted)).abs().max() > 0.1


def test_factors_of_a_product_have_the_same_size(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base")
    text = word_tokenizer(base)
    step = {"kind": "pool_heads", "kv_heads": 1, "calibrate": calibrate(text)}
    run_conversion(base, rewriting(step), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    query, key, value, output = (weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkvo")
    sizes = complex_pairs(query, 6).abs().square().mean((0, 2)), complex_pairs(key, 1)[0].abs().square().mean(1)
    assert torch.allclose(*sizes, rtol=1e-4)
    assert torch.allclose(output.view(48, 6, 8).square().mean((0, 1)), value.square().mean(1), rtol=1e-4)


@pytest.mark.parametrize("how", ["pca", "mean", "select"])
def test_biases_are_pooled_with_their_weights(tmp_path: Path, how: str) -> None:
    """Four heads to two; a bias is a weight of an input that is always 1."""
    base = dense("llama", tmp_path / "base", attention_bias=True, num_attention_heads=4, num_key_value_heads=4)
    step: dict[str, Any] = {"kind": "pool_heads", "kv_heads": 2, "how": how}
    if how != "mean":
        step["calibrate"] = calibrate(word_tokenizer(base))
    run_conversion(base, rewriting(step), tmp_path / "out")
    assert loaded(tmp_path / "out").config.num_key_value_heads == 2
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    name = "model.layers.2.self_attn.v_proj.bias"
    old, new = before[name].view(2, 2, 8), after[name].view(2, 8)
    if how == "mean":
        assert torch.allclose(new, old.mean(1))
    elif how == "select":
        assert all(any(torch.equal(new[pool], old[pool, head]) for head in range(2)) for pool in range(2))
    else:
        assert after["model.layers.2.self_attn.q_proj.bias"].shape == (32,)
    assert torch.equal(after["model.layers.2.self_attn.o_proj.bias"], before["model.layers.2.self_attn.o_proj.bias"])


def test_all_components_give_the_products_back() -> None:
    queries, keys = complex_pairs(drawn(48, 20), 6), complex_pairs(drawn(24, 20), 3)
    second = drawn(20, 21) @ drawn(20, 21).T
    found = key_components(queries, keys, second)
    x, y = (drawn(20, number)[:, 0].to(queries.dtype) for number in (1, 2))
    for head in range(6):
        wanted = (queries[head] @ x).conj() * (keys[head // 2] @ y)
        got = ((found.queries(queries[head], head // 2) @ x).conj() * (found.maps @ y)).sum(-1)
        assert torch.allclose(got, wanted)
    assert (found.energies.diff(dim=-1) <= 1e-9).all()
    assert torch.allclose(complex_pairs(real_rows(queries), 6), queries)


def test_values_are_cut_where_the_output_sees_them_least() -> None:
    values, output, second = drawn(24, 20), drawn(20, 48), torch.eye(20, dtype=torch.float64)
    seen = weighted_values(values, output, 3)
    whole = seen.recovered(principal(seen.maps, second, 24)) @ (principal(seen.maps, second, 24).T @ seen.maps)
    assert torch.allclose(whole.flatten(0, 1), values)
    split = output.view(20, 3, 2, 8)
    errors = []
    for maps, recover in ((seen.maps, seen.recovered), (values, lambda basis: basis.view(3, 8, -1))):
        basis = principal(maps, second, 10)
        lost = values.view(3, 8, 20) - recover(basis) @ (basis.T @ maps)
        errors.append(float(torch.einsum("dhqa,hai->dhqi", split, lost).square().sum()))
    assert errors[0] < errors[1]


def test_factors_meet_in_the_middle() -> None:
    left, right = torch.tensor([16.0, 1.0]).double(), torch.tensor([1.0, 1.0]).double()
    scale = meeting(left, right)
    assert torch.allclose(left / scale**2, right * scale**2)


@pytest.mark.parametrize(
    ("kind", "settings", "kv_heads", "said"),
    [
        ("llama", {}, 2, "cannot make 2 key/value heads of 3: kv_heads can be 1$"),
        ("llama", {}, 3, "cannot make 3 key/value heads of 3"),
        ("llama", {"num_key_value_heads": 1}, 1, "of 1: there is but one"),
        ("qwen3", {}, 1, "qwen3 model: its queries and keys are normalised head by head"),
        ("smollm3", {}, 1, "smollm3 model: some of its layers have no rotary embedding"),
        ("gemma2", {}, 1, "does not know the attention of gemma2 models"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            1,
            "rotated in part only",
        ),
    ],
)
def test_heads_that_cannot_be_mixed_are_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], kv_heads: int, said: str
) -> None:
    base = dense(kind, tmp_path / "base", **settings)
    step = {"kind": "pool_heads", "kv_heads": kv_heads, "calibrate": {"path": "missing.txt"}}
    with pytest.raises(PlanError, match=said):
        run_conversion(base, rewriting(step), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kv_heads: 1", "pca goes by what keys and values are like on a text: give calibrate"),
        ("kv_heads: 1, how: select", "select goes by"),
        ("kv_heads: 1, how: mean, calibrate: {embedded: true}", "calibrate has no effect beside how: mean"),
        ("how: mean", "kv_heads"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_its_pools(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"name: a\nrewrite: [{{kind: pool_heads, {text}}}]")
