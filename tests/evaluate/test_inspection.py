import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    DiffLlamaConfig,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    T5Config,
)

from attnconv.attention_modules import Geometry, create
from attnconv.errors import CheckpointError, PlanError, RecipeError
from attnconv.evaluate.bench.footprint import CachedLayer, cache_bytes, footprints, native_window
from attnconv.evaluate.diagnose.inspection import inspect_model, join_names
from attnconv.recipes import build_recipe

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
KEY_VALUE = {"num_key_value_heads": 2, "head_dim": 8}


def recipe(*rules: dict) -> object:
    return build_recipe({"name": "test", "attention": list(rules)})


def folder(path: Path, config: PreTrainedConfig, architecture: str, dtype: str = "float32") -> str:
    config.architectures = [architecture]
    config.dtype = dtype
    config.save_pretrained(path)
    return str(path)


def llama(path: Path, layers: int = 4, **changes: object) -> str:
    return folder(path, LlamaConfig(num_hidden_layers=layers, **SIZES, **KEY_VALUE), "LlamaForCausalLM", **changes)


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["a.0.b"], "a.0.b"),
        (["a.0.b", "a.1.b", "a.2.b"], "a.0-2.b"),
        (["a.0.b", "a.1.b", "a.5.b"], "a.0-1,5.b"),
        (["h.0.a.0", "h.1.a.1"], "h.0.a.0 ... h.1.a.1"),
        (["block.9.layer.0", "block.10.layer.0"], "block.9-10.layer.0"),
    ],
)
def test_names_are_joined_by_their_numbers(names: list[str], joined: str) -> None:
    assert join_names(names) == joined


def test_without_a_recipe_it_shows_what_is_there(tmp_path: Path) -> None:
    found = inspect_model(llama(tmp_path, dtype="bfloat16"))
    (group,) = found.groups
    assert (group.modules, group.count, group.method) == ("model.layers.0-3.self_attn", 4, None)
    assert group.geometry == Geometry(4, 2, 8, 8, causal=True, hidden_size=32)
    assert (found.model_type, found.class_name, found.dtype) == ("llama", "LlamaForCausalLM", "bfloat16")
    assert (found.num_modules, found.num_converted, found.parameters) == (4, 0, 0)
    # 4 layers, 2 heads, 8 + 8 numbers of 2 bytes a token.
    assert [row.before for row in found.footprints] == [4 * 2 * 16 * 2 * n for n in (4096, 32768, 131072)]
    assert all(row.after == row.before for row in found.footprints)
    short = inspect_model(llama(tmp_path, dtype="bfloat16"), lengths=[100]).footprints
    assert [(row.tokens, row.before) for row in short] == [(100, 4 * 2 * 16 * 2 * 100)]


def test_a_recipe_splits_the_layers_into_runs(tmp_path: Path) -> None:
    found = inspect_model(
        llama(tmp_path),
        recipe=recipe(
            {"layers": {"last": 1}, "method": "softmax"},
            {"layers": "all", "method": "lolcats", "options": {"window": 16}},
        ),
    )
    converted, kept = found.groups
    assert (converted.modules, converted.method, converted.options["window"]) == (
        "model.layers.0-2.self_attn",
        "lolcats",
        16,
    )
    assert (kept.modules, kept.method) == ("model.layers.3.self_attn", None)
    core = create("lolcats", converted.geometry, window=16)
    assert found.parameters == 3 * sum(parameter.numel() for parameter in core.parameters())
    first, last = found.footprints[0], found.footprints[-1]
    # Only the kept layer's share grows with the length.
    assert last.after - first.after == (131072 - 4096) * 2 * 16 * 4
    json.dumps(found.to_dict())


def test_lossy_modules_are_reported_and_local_windows_bound_the_cache(tmp_path: Path) -> None:
    config = Gemma2Config(num_hidden_layers=2, sliding_window=32, **SIZES, **KEY_VALUE)
    found = inspect_model(
        folder(tmp_path, config, "Gemma2ForCausalLM"), recipe=recipe({"layers": "all", "method": "hedgehog"})
    )
    assert all("soft cap" in " ".join(group.lossy) for group in found.groups)
    assert native_window(config, 0) == 32
    assert native_window(config, 1) is None
    assert found.footprints[0].before == (32 + 4096) * 2 * 16 * 4


def test_refused_modules_are_reported(tmp_path: Path) -> None:
    config = DiffLlamaConfig(num_hidden_layers=2, **SIZES, num_key_value_heads=2)
    path = folder(tmp_path, config, "DiffLlamaForCausalLM")
    found = inspect_model(path, recipe=recipe({"layers": "all", "method": "hedgehog"}))
    assert all("runs 2 times" in str(group.refused) for group in found.groups)
    assert (found.num_modules, found.num_converted, found.parameters) == (2, 0, 0)


def test_an_encoder_has_no_cache(tmp_path: Path) -> None:
    config = BertConfig(num_hidden_layers=2, **SIZES)
    found = inspect_model(folder(tmp_path, config, "BertForMaskedLM"))
    assert not found.groups[0].geometry.causal
    assert found.footprints == ()


def test_cross_attention_is_shown_and_stays(tmp_path: Path) -> None:
    config = T5Config(vocab_size=97, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2)
    found = inspect_model(
        folder(tmp_path, config, "T5ForConditionalGeneration"), recipe=recipe({"layers": "all", "method": "hedgehog"})
    )
    cross = [group for group in found.groups if "EncDec" in group.modules]
    assert cross
    assert all(group.method is None for group in cross)


def test_a_converted_model_shows_its_own_conversion(tmp_path: Path) -> None:
    source = llama(tmp_path)
    entry = {
        "method": "lolcats",
        "options": {"window": 16},
        "geometry": Geometry(4, 2, 8, 8, causal=True, hidden_size=32).to_dict(),
        "layer_idx": 1,
    }
    config = json.loads((tmp_path / "config.json").read_text())
    config["attnconv"] = {"version": 1, "modules": {"model.layers.1.self_attn": entry}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect_model(source)
    assert found.already_converted
    assert [(group.modules, group.method) for group in found.groups] == [
        ("model.layers.0.self_attn", None),
        ("model.layers.1.self_attn", "lolcats"),
        ("model.layers.2-3.self_attn", None),
    ]


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        inspect_model(str(tmp_path / "none"))
    with pytest.raises(RecipeError):
        inspect_model(llama(tmp_path), recipe=recipe({"layers": "7", "method": "hedgehog"}))
    config = FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(PlanError, match="FalconForCausalLM"):
        inspect_model(folder(tmp_path, config, "FalconForCausalLM"))


def test_footprints_add_up() -> None:
    geometry = Geometry(4, 2, 8, 16)
    module = create("lolcats", geometry, window=8)
    layers = [CachedLayer(geometry, None, module), CachedLayer(geometry, 10, None)]
    (row,) = footprints(layers, torch.bfloat16, [100])
    assert cache_bytes(geometry, 100, torch.bfloat16) == 100 * 2 * 24 * 2
    assert row.before == 110 * 2 * 24 * 2
    assert row.after == module.state_bytes(1, 100, torch.bfloat16) + 10 * 2 * 24 * 2
