"""Saving with `save_pretrained` and loading with `from_pretrained`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from attnconv.compat import cache_of
from attnconv.convert import apply_plan, convert_model, converted_modules, make_plan, probe
from attnconv.convert.writing.reload import resolve_names
from attnconv.errors import PlanError
from attnconv.recipes import AttentionRule

pytestmark = pytest.mark.compat

IDS = torch.arange(3, 21).view(2, 9)
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
        pad_token_id=0,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, pad_token_id=0),
}


def converted(kind: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    convert_model(model, "lolcats", window=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attnconv" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip_is_exact(kind: str, tmp_path: Path) -> None:
    model = converted(kind)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(logits(again), logits(model))
    assert len(converted_modules(again)) == 2
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")), logits(model))


def test_state_is_constant_after_reload(tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    sizes = []
    for length in (9, 60):
        out = model(input_ids=torch.ones(1, length, dtype=torch.long), use_cache=True)
        sizes.append([layer.nbytes for layer in cache_of(out).layers])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_other_heads_find_the_converted_modules(kind: str, tmp_path: Path) -> None:
    model = converted(kind)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    expected = model.base_model(input_ids=IDS).last_hidden_state
    assert torch.equal(base(input_ids=IDS).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert len(converted_modules(classifier)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_low_precision_keeps_cores_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "attnconv" in name else dtype)


def test_missing_core_parameters_get_their_own_start(tmp_path: Path) -> None:
    model = converted()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = "model.layers.1.self_attn.attnconv.mixing"
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {gone}
    loaded = again.state_dict()
    torch.testing.assert_close(loaded[gone].sigmoid(), torch.full((4,), 0.1))
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_disk_offload(tmp_path: Path) -> None:
    model = converted()
    model.save_pretrained(tmp_path / "saved")
    places = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(logits(again), logits(model))


def test_unknown_section_version_is_refused(tmp_path: Path) -> None:
    model = converted()
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, attnconv={**model.config.attnconv, "version": 99})
    with pytest.raises(PlanError, match=r"version 99.*update attnconv with `pip install .`"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_unknown_method_is_refused(tmp_path: Path) -> None:
    model = converted()
    model.save_pretrained(tmp_path)
    modules = {name: {**entry, "method": "novel"} for name, entry in model.config.attnconv["modules"].items()}
    edit_config(tmp_path, attnconv={"version": 1, "modules": modules})
    with pytest.raises(PlanError, match="novel"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_modules_are_refused(tmp_path: Path) -> None:
    model = converted()
    model.save_pretrained(tmp_path)
    modules = {name.replace("self_attn", "attention"): e for name, e in model.config.attnconv["modules"].items()}
    edit_config(tmp_path, attnconv={"version": 1, "modules": modules})
    with pytest.raises(PlanError, match="are not in LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    # Another head is not the architecture of the checkpoint, so it is refused when it runs.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    with pytest.raises(PlanError, match="converted modules are not in it"):
        model(input_ids=IDS)


def test_names_are_found_with_and_without_a_head() -> None:
    saved = ["model.layers.0.attn", "model.layers.1.attn"]
    inner = ["", "layers", "layers.0.attn", "layers.1.attn"]
    outer = [f"language_model.{name}" for name in saved]
    assert resolve_names(saved, saved, "model") == dict(zip(saved, saved, strict=True))
    assert resolve_names(saved, inner, "model") == {name: name.removeprefix("model.") for name in saved}
    assert resolve_names(saved, outer, "language_model") == {name: f"language_model.{name}" for name in saved}
    assert resolve_names(saved, inner[:-1], "model") is None
    assert resolve_names(saved, ["attn"], "model") is None


def test_names_of_one_part_are_not_found_in_another() -> None:
    saved = ["decoder.layers.0.attn"]
    assert resolve_names(saved, ["", "layers", "layers.0.attn"], "model") is None


def test_only_the_decoder_that_was_converted_is(tmp_path: Path) -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    rule = AttentionRule(layers={"last": 1}, method="lolcats", options={"window": 3})
    apply_plan(model, make_plan([rule], probe(config, type(model)), allow_lossy=True))
    model.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert list(converted_modules(again)) == list(converted_modules(model)) == ["decoder.block.1.layer.0.SelfAttention"]
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("by_name", [True, False])
def test_nothing_is_published_before_it_is_marked(by_name: bool, tmp_path: Path) -> None:
    given: dict[str, Any] = {"push_to_hub": True} if by_name else {}
    with pytest.raises(PlanError, match=r"push_to_hub=True.* would publish .*`attnconv push FOLDER USER/NAME`"):
        converted().save_pretrained(tmp_path / "out", *(() if by_name else (True, None, True)), **given)
    assert not (tmp_path / "out").exists()


def test_a_process_that_does_not_write_marks_nothing(tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path, False)
    assert not (tmp_path / "config.json").exists()
