"""Attentions of several branches in one layer, for a gate to mix: BAM, with feed-forward experts out of the same."""

from pathlib import Path
from typing import Any

import pytest
import rewritten
import torch
from expert_models import branch
from rewritten import EXACT, loaded
from safetensors.torch import load_file
from torch import Tensor
from wide_models import LAYERS, SIZES, attend, widened

from attnconv.errors import PlanError, RecipeError
from attnconv.files.json_files import read_json
from attnconv.recipes import Recipe, load_recipe, parse_recipe
from attnconv.runs import run_conversion


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A model and two branches of it."""
    base = rewritten.dense("mistral", tmp_path / "base", sizes=SIZES, **LAYERS, sliding_window=None)
    return [base, *(branch(base, tmp_path / name, seed=place) for place, name in enumerate(("code", "maths")))]


def weights(folder: Path) -> dict[str, Tensor]:
    found = (item for file in folder.glob("*.safetensors") for item in load_file(file).items())
    # The mark of a converted model stands under the name of another tensor, and is empty.
    return {name: tensor for name, tensor in found if tensor.numel()}


def bam(branches: list[Path], *, share_kv: bool = False) -> Recipe:
    given: dict[str, Any] = {"sources": [str(folder) for folder in branches]}
    return Recipe(
        name="bam",
        rewrite=[
            {"kind": "experts", "target": "mixtral", **given},
            {"kind": "widen", "share_kv": share_kv, **given},
        ],
        attention=[{"layers": "all", "method": "moa", "options": {"num_experts": 3, "share_kv": share_kv}}],
    )


def test_copies_with_their_gates_are_exact_and_told_so(tmp_path: Path) -> None:
    base = rewritten.dense("llama", tmp_path / "base", sizes=SIZES, **LAYERS)
    found = run_conversion(base, widened(3), tmp_path / "out").exactness
    assert found is not None
    assert (found.promised, found.reasons, found.objection) == (True, (), None)
    assert found.difference is not None
    assert found.largest_logit is not None
    assert found.difference <= EXACT * found.largest_logit
    assert "exact as promised" in (tmp_path / "out" / "README.md").read_text()
    # Gates in some of the layers, or over other blocks of heads, complete nothing.
    for rule in ({"layers": "0"}, {"layers": "all", "options": {"num_experts": 6}}):
        recipe = Recipe(name="a", rewrite=widened(3).rewrite, attention=[{"method": "moa", **rule}])
        assert "only added up until" in str(recipe.steps()[0].inexact)


def test_each_branch_is_an_attention_of_its_own(models: list[Path], tmp_path: Path) -> None:
    found = run_conversion(models[0], bam(models[1:]), tmp_path / "out").exactness
    assert found is not None
    assert found.reasons == ("experts of several models", "attentions of several models")
    model, hidden = loaded(tmp_path / "out"), torch.randn(2, 30, 32)
    assert type(model).__name__ == "MixtralForCausalLM"
    attention = model.model.layers[1].self_attn
    torch.nn.init.normal_(attention.attnconv.router)
    gates = (hidden @ attention.attnconv.router.T).softmax(-1)
    parts = [loaded(folder) for folder in models]
    alone = [attend(part, part.model.layers[1].self_attn, hidden) for part in parts]
    wanted = sum(gates[..., place, None] * out for place, out in enumerate(alone))
    assert isinstance(wanted, Tensor)
    assert (attend(model, attention, hidden) - wanted).abs().max() <= EXACT * wanted.abs().max()
    receipt = read_json(tmp_path / "out" / "receipt.json")
    assert list(receipt["inputs"]) == ["model.safetensors", "code:model.safetensors", "maths:model.safetensors"]
    assert receipt["rewrites"][1].endswith("out of those of the model, code, maths")


def test_shared_keys_and_values_are_the_mean_and_the_rest_is_averaged(models: list[Path], tmp_path: Path) -> None:
    run_conversion(models[0], bam(models[1:], share_kv=True), tmp_path / "out")
    after, *parts = (weights(folder) for folder in (tmp_path / "out", *models))
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.norm.weight"):
        torch.testing.assert_close(after[name], (parts[0][name] + parts[1][name] + parts[2][name]) / 3)
    # By KV head, then by expert.
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(after[name].view(2, 3, -1, 32)[1, 2], parts[2][name].view(2, -1, 32)[1])
    expert = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    assert torch.equal(after[expert], parts[2]["model.layers.0.mlp.up_proj.weight"])


def test_branches_that_do_not_fit_are_refused(models: list[Path], tmp_path: Path) -> None:
    recipe = bam(models[1:])
    prune = Recipe(name="a", rewrite=[{"kind": "degroup"}]).rewrite
    with pytest.raises(PlanError, match="widen cannot take .*k_proj.weight' from the model: it is .* only after this"):
        run_conversion(models[0], recipe.model_copy(update={"rewrite": [*prune, recipe.rewrite[1]]}), tmp_path / "out")
    for given, said in {
        "sources: [a, b], num_experts: 2": "num_experts is 2, and there are 3 models",
        "include_base: false": "leaves no attention to take",
        "sources: [a], include_base: false": "num_experts must be at least 2",
    }.items():
        text = f"name: a\nrewrite: [{{kind: widen, {given}}}]\nattention: [{{layers: all, method: moa}}]"
        with pytest.raises(RecipeError, match=said):
            parse_recipe(text)


def test_the_shipped_recipe_mixes_what_it_is_given(models: list[Path], tmp_path: Path) -> None:
    sources = f"[{models[1]}, {models[2]}]"
    recipe = load_recipe("bam", [*(f"rewrite.{place}.sources={sources}" for place in (0, 1)), "stages=[]"])
    assert recipe.steps()[1].inexact == "attentions of several models"
    run_conversion(models[0], recipe, tmp_path / "out")
    assert loaded(tmp_path / "out").config.num_attention_heads == 12
