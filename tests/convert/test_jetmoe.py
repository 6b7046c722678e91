"""JetMoe: query heads and feed-forwards as experts that compute what the dense model did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import EXACT, assert_equal, dense, experts, loaded, logits
from safetensors.torch import load_file, save_file

from attnconv.errors import PlanError, RecipeError
from attnconv.recipes import Recipe
from attnconv.runs import run_conversion

# Without a padding token, whose embedding would be zero and so take experts of several copies.
NORMS: dict[str, Any] = {"rms_norm_eps": 1e-6, "pad_token_id": None}
SIX = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 48}


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, (2, 2)),
        ({}, (6, 2)),
        (
            {
                "tie_word_embeddings": True,
                "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            },
            (4, 2),
        ),
        (SIX, (6, 3)),
        ({"num_key_value_heads": 4}, (3, 1)),
    ],
)
def test_it_is_exact_and_keeps_its_names(tmp_path: Path, settings: dict[str, Any], counts: tuple[int, int]) -> None:
    base = dense("llama", tmp_path / "base", **NORMS, **settings)
    result = run_conversion(base, experts(target="jetmoe", num_experts=counts[0], active=counts[1]), tmp_path / "out")
    assert result.exactness is not None
    assert result.exactness.promised
    model = assert_equal(base, tmp_path / "out")
    assert type(model).__name__ == "JetMoeForCausalLM"
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_it_says_when_the_factor_is_rounded(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base", **NORMS, **SIX)
    steps = [
        {"kind": "cast", "dtype": "bfloat16"},
        {"kind": "experts", "target": "jetmoe", "num_experts": 6, "active": 3},
    ]
    found = run_conversion(base, Recipe(name="a", rewrite=steps), tmp_path / "out").exactness
    assert found is not None
    assert found.reasons[1] == "3 times the output projections rounded to bfloat16"
    before = logits(loaded(base))
    assert EXACT < (logits(loaded(tmp_path / "out")) - before).abs().max() / before.abs().max() < 0.1


@pytest.mark.parametrize(
    ("kind", "settings", "counts", "said"),
    [
        ("llama", {}, (4, 3), "are the 2 query heads of each key/value head, .* give active: 2"),
        ("llama", {}, (5, 2), "copies of 2: give num_experts a multiple of 2"),
        ("llama", {"rms_norm_eps": 1e-5}, (4, 2), "norms that add 1e-05, where the layers of a jetmoe add 1e-06"),
        ("llama", {"attention_bias": True}, (4, 2), "attention with biases"),
        ("llama", {"mlp_bias": True}, (4, 2), "with biases"),
        ("llama", {"hidden_act": "gelu"}, (4, 2), "with the activation 'gelu'"),
        ("qwen2", {}, (4, 2), "cannot make qwen2 models jetmoe"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], counts: tuple[int, int], said: str
) -> None:
    base = dense(kind, tmp_path / "base", **{**NORMS, **settings})
    with pytest.raises(PlanError, match=said):
        run_conversion(base, experts(target="jetmoe", num_experts=counts[0], active=counts[1]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base", **NORMS)
    weights = load_file(base / "model.safetensors")
    up = "model.layers.1.mlp.up_proj.weight"
    odd = {
        "'model.layers.0.mlp.gate.weight' over": weights | {"model.layers.0.mlp.gate.weight": torch.zeros(2)},
        "2 whole layers of 3": {name: tensor for name, tensor in weights.items() if name != up},
        "which has the type F8_E4M3": weights | {up: weights[up].to(torch.float8_e4m3fn)},
    }
    for said, tensors in odd.items():
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(PlanError, match=said):
            run_conversion(base, experts(target="jetmoe"), tmp_path / "out")


def test_settings_that_it_has_no_use_for_are_refused() -> None:
    with pytest.raises(ValueError, match="target: jetmoe knows no granularity, router: leave it out"):
        experts(target="jetmoe", granularity=2, router="zero")
    assert issubclass(RecipeError, ValueError)
