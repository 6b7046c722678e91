"""A config.json that lost its sentinel: transformers alone refuses the weights, attnconv loads what was saved."""

import json
import os
from pathlib import Path
from typing import Any

import fresh_process
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from attnconv.convert import apply_plan, make_plan, probe
from attnconv.convert.reading.checkpoint import load_model, open_checkpoint
from attnconv.convert.writing.save import save_converted
from attnconv.convert.writing.stream import stream_convert
from attnconv.recipes import AttentionRule

IDS = torch.tensor([[1, 5, 9, 33, 2, 7, 40]])
# transformers by itself, as somebody without attnconv has it: says what becomes of each folder.
PLAIN = """
import json
import sys

sys.modules["attnconv"] = None
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

found = {}
for folder in sys.argv[1:]:
    # As `fine-tune, look at the config, save it again` does; the sentinel is gone afterwards.
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    with open(f"{folder}/config.json") as file:
        config = json.load(file)
    assert "attnconv" in config and "attn_implementation" not in config
    for name, load, options in (
        ("causal", AutoModelForCausalLM, {}),
        ("body", AutoModel, {}),
        ("sdpa", AutoModelForCausalLM, {"attn_implementation": "sdpa"}),
    ):
        try:
            load.from_pretrained(folder, **options)
            found[f"{folder} {name}"] = "loaded"
        except RuntimeError as error:
            found[f"{folder} {name}"] = str(error)
print(json.dumps(found))
"""


def bare_gpt2(folder: Path) -> PreTrainedModel:
    """GPT-2 as its first checkpoints were written, by the model without its head."""
    model = tiny_models.tiny_gpt2()
    tiny_models.save(model, folder)
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def convert(folder: Path, kind: str, method: str, way: str) -> PreTrainedModel:
    """Convert on disk or in memory; returns the converted model."""
    base = folder / "base"
    if kind == "gpt2":
        bare_gpt2(base)
    else:
        tiny_models.save(tiny_models.tiny_llama(), base, shards=kind == "shards")
    checkpoint = open_checkpoint(base)
    model_class: Any = GPT2LMHeadModel if kind == "gpt2" else LlamaForCausalLM
    rule = AttentionRule(layers="all", method=method, options={"window": 3})
    plan = make_plan([rule], probe(checkpoint.config, model_class))
    model = apply_plan(load_model(checkpoint), plan)
    (folder / "out").mkdir()
    if way == "streamed":
        stream_convert(checkpoint, plan, folder / "out")
    else:
        save_converted(model, folder / "out", checkpoint=checkpoint, plan=plan)
    return model


CASES = [
    ("llama", "sliding_window", "streamed"),
    ("llama", "sliding_window", "saved"),
    ("llama", "lolcats", "streamed"),
    ("shards", "lolcats", "saved"),
    ("gpt2", "sliding_window", "streamed"),
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    found = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp("-".join(case))
        found["-".join(case)] = (folder / "out", convert(folder, *case))
    return found


def same(folder: Path, model: PreTrainedModel, **options: Any) -> bool:
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        return torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_the_mark_survives_what_loses_the_sentinel(converted: dict[str, tuple[Path, PreTrainedModel]]) -> None:
    folders = [str(folder) for folder, _ in converted.values()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for folder, model in converted.values():
        assert same(folder, model)
        assert same(folder, model, attn_implementation="sdpa")
    run = fresh_process.run("-c", PLAIN, *folders, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 3 * len(CASES)
    for case, outcome in found.items():
        assert "ignore_mismatched_sizes" in outcome, (case, outcome)
    # With attnconv the section alone is enough, and the tensors are the base's own.
    for folder, model in converted.values():
        assert same(folder, model)


def test_the_config_of_the_base_does_not_open_the_weights(tmp_path: Path) -> None:
    convert(tmp_path, "llama", "sliding_window", "streamed")
    (tmp_path / "out" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("way", ["streamed", "saved"])
def test_every_tensor_has_its_place_in_the_index(tmp_path: Path, way: str) -> None:
    model = convert(tmp_path, "shards", "sliding_window", way)
    opened = open_checkpoint(tmp_path / "out", allow_converted=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert opened.weight_map == index
    assert len(index) == len(model.state_dict()) + 1
    kept = ("model.embed_tokens", "model.rotary_emb", "model.layers.1", "model.norm", "lm_head")
    places = dict.fromkeys(kept, "cpu") | {"model.layers.0": "disk"}
    assert same(tmp_path / "out", model, device_map=places, offload_folder=tmp_path / "offload")
