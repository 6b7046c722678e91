"""Windows as settings of a class: texts that fit come out as before, longer ones as through a mask."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten import (
    EXACT,
    PROMPTS,
    assert_saved_alike,
    dense,
    loaded,
    logits,
    logits_of_a_fresh_process,
    rewriting,
)
from tiny_models import edit_config
from transformers import CONFIG_MAPPING, PreTrainedModel

from attnconv.errors import PlanError, RecipeError
from attnconv.files.json_files import read_json
from attnconv.recipes import load_recipe, parse_recipe
from attnconv.runs import run_conversion

NAMES = {"mistral": "Mistral", "ministral": "Ministral", "qwen2": "Qwen2", "qwen3": "Qwen3", "mixtral": "Mixtral"}


def windowed(folder: Path, window: int, layers: list[int]) -> torch.Tensor:
    """What a model computes if these layers see so many tokens only, by a mask for each layer."""
    model = loaded(folder)
    length = PROMPTS.shape[1]
    far = torch.arange(length)[:, None] - torch.arange(length)[None]
    for index, layer in enumerate(model.model.layers):
        seen = (far >= 0) & (far < (window if index in layers else length))
        mask = torch.where(seen, 0.0, -torch.inf)[None, None].expand(2, 1, -1, -1)
        layer.self_attn.register_forward_pre_hook(
            lambda _module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
    return logits(model)


CASES = [
    ("llama", {}, {"every": 3, "offset": 1}, "ministral", [0, 2]),
    ("llama", {"tie_word_embeddings": True}, None, "mistral", [0, 1, 2]),
    ("mistral", {"sliding_window": None}, "0", "ministral", [1, 2]),
    ("mistral", {"sliding_window": 64}, None, "mistral", [0, 1, 2]),
    ("qwen2", {}, {"last": 1}, "qwen2", [0, 1]),
    ("qwen3", {"attention_bias": True}, {"first": 1}, "qwen3", [1, 2]),
    ("mixtral", {"num_local_experts": 2, "sliding_window": None}, None, "mixtral", [0, 1, 2]),
]


@pytest.mark.parametrize(("kind", "settings", "keep", "target", "layers"), CASES)
def test_windows_are_those_of_a_mask(
    tmp_path: Path, kind: str, settings: dict[str, Any], keep: Any, target: str, layers: list[int]
) -> None:
    base = dense(kind, tmp_path / "base", **settings)
    run_conversion(base, rewriting({"kind": "window", "window": 8, "keep": keep}), tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert type(model).__name__ == f"{NAMES[target]}ForCausalLM"
    wanted = windowed(base, 8, layers)
    assert (logits(model) - wanted).abs().max() <= EXACT * wanted.abs().max()
    assert (wanted - logits(loaded(base))).abs().max() > 0.1
    assert_saved_alike(tmp_path / "out", tmp_path / "again")
    # On texts that fit nothing changes, not by one bit; with a cache longer texts come out as without.
    run_conversion(base, rewriting({"kind": "window", "window": 40, "keep": keep}), tmp_path / "wide")
    assert torch.equal(logits(loaded(tmp_path / "wide")), logits(loaded(base)))
    assert_decodes(model)


def assert_decodes(model: PreTrainedModel) -> None:
    texts = [model.generate(PROMPTS, max_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts)


needs_granite = pytest.mark.skipif("granite_swa" not in CONFIG_MAPPING, reason="this transformers has no GraniteSWA")


@needs_granite
@pytest.mark.parametrize("settings", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}])
def test_sinks_that_are_shut_change_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = dense("llama", tmp_path / "base", **settings)
    step = {"kind": "window", "window": 8, "keep": "1", "sinks": -10000}
    run_conversion(base, rewriting(step), tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert type(model).__name__ == "GraniteSWAForCausalLM"
    wanted = windowed(base, 8, [0, 2])
    assert (logits(model) - wanted).abs().max() <= 5 * EXACT * wanted.abs().max()
    assert_saved_alike(tmp_path / "out", tmp_path / "again")
    run_conversion(base, rewriting({**step, "sinks": 0.0}), tmp_path / "open")
    assert (logits(loaded(tmp_path / "open")) - wanted).abs().max() > 0.1


def test_the_shipped_recipe_gives_a_model_of_transformers_alone(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base", num_hidden_layers=4)
    edit_config(base, rms_norm_eps=None)
    run_conversion(base, load_recipe("window-native", ["rewrite.0.window=8"]), tmp_path / "out")
    fresh = logits_of_a_fresh_process(tmp_path / "out", tmp_path / "logits")
    wanted = windowed(base, 8, [0, 1, 2])
    assert (fresh - wanted).abs().max() <= EXACT * wanted.abs().max()
    receipt = read_json(tmp_path / "out" / "receipt.json")
    assert receipt["rewrites"] == ["attention of 3 layers within windows of 8 tokens"]


@pytest.mark.parametrize(
    ("kind", "settings", "step", "said"),
    [
        ("llama", {}, {"keep": "0-2"}, "on none of the 3 layers"),
        ("llama", {"mlp_bias": True}, {"keep": "0"}, r"which have no biases \(mlp_bias\): use the attention method"),
        ("mistral", {"sliding_window": 64}, {"keep": "1"}, "give some layers 8 tokens and leave layer 1 its 64"),
        ("mixtral", {"sliding_window": None, "num_local_experts": 2}, {"keep": "1"}, "2 of 3 layers .*: choose all"),
        ("smollm3", {}, {}, "3 of 3 layers for smollm3 models: use the attention method sliding_window"),
        ("qwen2", {}, {"sinks": -10}, "sinks to llama and mistral models, and not to qwen2 models"),
        ("gemma2", {}, {}, "does not know the attention of gemma2"),
    ],
)
def test_windows_that_no_class_has_are_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], step: dict[str, Any], said: str
) -> None:
    base = dense(kind, tmp_path / "base", **settings)
    with pytest.raises(PlanError, match=said):
        run_conversion(base, rewriting({"kind": "window", "window": 8, **step}), tmp_path / "out")


def test_a_transformers_without_the_class_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = dense("llama", tmp_path / "base")
    monkeypatch.setattr("attnconv.convert.rewriting.window.CONFIG_MAPPING", {})
    with pytest.raises(PlanError, match="a ministral model, which this transformers does not have"):
        run_conversion(base, rewriting({"kind": "window", "window": 8, "keep": "0"}), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keep: '0'", "rewrite.0.window: this key is"),
        ("window: 0", "greater than"),
        ("window: 8, keep: {evry: 2}", "evry"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_its_windows(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"name: a\nrewrite: [{{kind: window, {text}}}]")
