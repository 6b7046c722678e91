"""Experts: a dense model and the mixture made of it compute the same, and transformers loads the mixture alone."""

from pathlib import Path
from typing import Any

import fresh_process
import pytest
import torch
from expert_models import EXACT, PROMPTS, assert_equal, dense, experts, loaded, logits
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, save, tiny_llama
from transformers import AutoModelForCausalLM

from attnconv.errors import PlanError, RecipeError
from attnconv.files.json_files import read_json
from attnconv.recipes import Recipe, load_recipe, parse_recipe
from attnconv.runs import run_conversion

MIXTURES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "Mixtral"),
    ("llama", {"tie_word_embeddings": True}, "Mixtral"),
    ("llama", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "Mixtral"),
    ("mistral", {"sliding_window": 8, "head_dim": 16}, "Mixtral"),
    ("mistral", {"sliding_window": None}, "Mixtral"),
    ("qwen2", {}, "Qwen2Moe"),
    ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 3}, "Qwen2Moe"),
    ("qwen3", {"head_dim": 16}, "Qwen3Moe"),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}, "Qwen3Moe"),
]
# What routers start as does not depend on the class: zeros are tried with each of them in the long tests.
ROUTED = [pytest.param(*row, "random") for row in MIXTURES] + [pytest.param(*MIXTURES[0], "zero")]
ROUTED += [pytest.param(*row, "zero", marks=pytest.mark.slow) for row in MIXTURES[1:]]


@pytest.mark.parametrize(("kind", "settings", "model", "router"), ROUTED)
def test_the_mixture_computes_what_the_dense_model_does(
    tmp_path: Path, kind: str, settings: dict[str, Any], model: str, router: str
) -> None:
    base = dense(kind, tmp_path / "base", **settings)
    result = run_conversion(base, experts(num_experts=5, active=3, router=router), tmp_path / "out")
    assert result.plan.is_native
    mixture = assert_equal(base, tmp_path / "out")
    assert type(mixture).__name__ == f"{model}ForCausalLM"
    assert (mixture.config.num_experts, mixture.config.num_experts_per_tok) == (5, 3)
    # Saved by transformers, it has the same tensors under the same names.
    mixture.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_the_shared_expert_is_the_dense_feed_forward(tmp_path: Path) -> None:
    base = dense("qwen2", tmp_path / "base")
    run_conversion(base, experts(), tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    for name in ("gate_proj", "up_proj", "down_proj"):
        shared = after[f"model.layers.1.mlp.shared_expert.{name}.weight"]
        assert torch.equal(shared, before[f"model.layers.1.mlp.{name}.weight"])
    down = after["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert torch.equal(down * 2, before["model.layers.1.mlp.down_proj.weight"])
    assert not after["model.layers.1.mlp.shared_expert_gate.weight"].any()


def test_routers_are_drawn_from_the_seed_and_tell_experts_apart(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base")
    routers = []
    for folder, settings in {"a": {}, "b": {}, "c": {"seed": 1}, "zero": {"router": "zero"}}.items():
        run_conversion(base, experts(**settings), tmp_path / folder)
        found = load_file(tmp_path / folder / "model.safetensors")
        routers.append(torch.stack([found[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(3)]))
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    assert not torch.equal(routers[0][0], routers[0][1])
    assert 0.25 < routers[0].std() < 0.35
    assert not routers[3].any()
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    chosen = mixture(PROMPTS, output_router_logits=True).router_logits[0].argmax(-1)
    assert len(chosen.unique()) == 4


def test_settings_that_config_json_leaves_out_are_those_of_the_dense_class(tmp_path: Path) -> None:
    """Defaults differ: Llama has a rotary base of 10,000 and Mixtral one of a million, Mistral a window."""
    for kind, omitted in {"llama": ("rope_parameters", "rms_norm_eps"), "mistral": ("rms_norm_eps",)}.items():
        base = dense(kind, tmp_path / kind, rms_norm_eps=1e-6)
        edit_config(base, **dict.fromkeys(omitted))
        run_conversion(base, experts(), tmp_path / f"{kind}-out")
        assert_equal(base, tmp_path / f"{kind}-out")
        config = read_json(tmp_path / f"{kind}-out" / "config.json")
        assert config["sliding_window"] == (4096 if kind == "mistral" else None)


def test_a_stray_window_that_the_dense_class_ignores_stays_ignored(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base")
    edit_config(base, sliding_window=4)
    run_conversion(base, experts(), tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["sliding_window"] is None
    before = logits(loaded(base))
    assert (logits(loaded(tmp_path / "out")) - before).abs().max() <= EXACT * before.abs().max()


LOAD = """
import sys
import torch
from safetensors.torch import save_file
sys.modules["attnconv"] = None
from transformers import AutoModelForCausalLM
prompts = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    save_file({"logits": AutoModelForCausalLM.from_pretrained(sys.argv[1])(prompts).logits}, sys.argv[2])
"""


def test_the_shipped_recipe_gives_a_model_of_transformers_alone(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base")
    run_conversion(base, load_recipe("upcycle-mixtral", ["output.shard_size=60KB"]), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    fresh_process.run("-c", LOAD, tmp_path / "out", tmp_path / "logits", check=True)
    wanted = logits(loaded(base))
    assert (load_file(tmp_path / "logits")["logits"] - wanted).abs().max() <= EXACT * wanted.abs().max()
    receipt = read_json(tmp_path / "out" / "receipt.json")
    assert receipt["rewrites"] == ["each feed-forward made 4 experts of which a token goes through 2"]
    assert "import attnconv" not in (tmp_path / "out" / "README.md").read_text()


def test_other_rewrites_and_attention_can_stand_beside_it(tmp_path: Path) -> None:
    base = dense("qwen2", tmp_path / "base")
    both = [{"kind": "cast", "dtype": "bfloat16"}, {"kind": "experts"}]
    for name, steps in {"cast": both, "mixed": both[::-1]}.items():
        run_conversion(base, Recipe(name="both", rewrite=steps), tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("cast", "mixed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    text = "name: a\nrewrite: [{kind: experts}]\nattention: [{layers: all, method: sliding_window}]"
    run_conversion(base, parse_recipe(text), tmp_path / "converted")
    before = logits(loaded(base))
    # The prompt is shorter than the window.
    assert (logits(loaded(tmp_path / "converted")) - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize(
    ("kind", "settings", "target", "said"),
    [
        (
            "qwen2",
            {},
            "mixtral",
            "qwen2 models mixtral, whose attention has neither biases nor norms .* write qwen2_moe",
        ),
        ("llama", {"attention_bias": True}, "auto", r"attention with biases \(attention_bias\), which mixtral has no"),
        ("llama", {"mlp_bias": True}, "auto", r"with biases \(mlp_bias\)"),
        ("llama", {"hidden_act": "gelu"}, "auto", "with the activation 'gelu', only with 'silu'"),
        (
            "gemma2",
            {"head_dim": 8},
            "auto",
            "no class for gemma2 models .* it takes llama, mistral, qwen2, qwen3",
        ),
        ("mixtral", {"num_local_experts": 2}, "auto", r"this one \(mixtral\) is a mixture of experts already"),
        ("olmoe", {"num_experts": 2, "num_experts_per_tok": 1}, "auto", r"\(olmoe\) is a mixture of experts already"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "auto",
            "a sliding window in some layers, which qwen3_moe models have in all or none",
        ),
    ],
)
def test_what_would_not_be_exact_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], target: str, said: str
) -> None:
    base = dense(kind, tmp_path / "base", **settings)
    with pytest.raises(PlanError, match=said):
        run_conversion(base, experts(target=target), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_files_that_do_not_fit_the_class_are_refused(tmp_path: Path) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    bias = "model.layers.0.self_attn.q_proj.bias"
    up, down = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "down"))
    f8 = weights[down].to(torch.float8_e4m3fn)
    odd = {
        "the tensor 'model.layers.0.self_attn.q_proj.bias' over: a mixtral": weights | {bias: torch.zeros(32)},
        "'model.layers.0.mlp.gate.weight' over": weights | {"model.layers.0.mlp.gate.weight": torch.zeros(2)},
        "whole feed-forwards in 1 of 2 layers": {name: tensor for name, tensor in weights.items() if name != up},
        "which has the type F8_E4M3": weights | {down: f8},
    }
    for said, tensors in odd.items():
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(PlanError, match=said):
            run_conversion(base, experts(), tmp_path / "out")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for changes, said in [
        ({"architectures": ["LlamaForSequenceClassification"]}, "of a LlamaForSequenceClassification, only of a"),
        ({"quantization_config": {"quant_method": "fp8"}}, "of quantised weights"),
    ]:
        edit_config(base, **changes)
        with pytest.raises(PlanError, match=said):
            run_conversion(base, experts(), tmp_path / "out")
        edit_config(base, architectures=["LlamaForCausalLM"], quantization_config=None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_experts: 2, active: 3", "active is 3, and there are only 2 experts"),
        ("num_experts: 1, active: 1", "num_experts must be at least 2"),
        ("active: 0", "active"),
        ("target: qwen2_mo", "did you mean 'qwen2_moe'"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_its_experts(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"name: a\nrewrite: [{{kind: experts, {text}}}]")
