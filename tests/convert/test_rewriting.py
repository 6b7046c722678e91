"""Rewrites: what is written is bit for bit what was planned, streamed, whole or not at all, and an ordinary model."""

import json
import logging
import signal
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fresh_process
import pytest
import torch
from hub_server import HubServer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, save, tiny_llama, write_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from attnconv.convert.reading.checkpoint import open_checkpoint
from attnconv.convert.rewriting.cast import Cast
from attnconv.convert.rewriting.plan import plan_rewrite, write_rewritten
from attnconv.convert.rewriting.steps import Step
from attnconv.convert.rewriting.tensors import Target, made, stored_tensors
from attnconv.convert.rewriting.writer import write_targets
from attnconv.convert.writing.hub import published_files, push_folder
from attnconv.errors import CheckpointError, OutputError, PlanError
from attnconv.files.json_files import read_json
from attnconv.recipes import Recipe, load_recipe, parse_recipe
from attnconv.runs import run_conversion

PROMPT = torch.arange(1, 21)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = save(tiny_llama(), tmp_path / "base", shards=True)
    write_tokenizer(folder)
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def logits(folder: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(PROMPT).logits


def cast_recipe(dtype: str = "bfloat16", **more: Any) -> Recipe:
    return Recipe(name="cast", rewrite=[{"kind": "cast", "dtype": dtype}], **more)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_cast_is_equal_to_the_bit_and_loads_with_transformers_alone(base: Path, tmp_path: Path, dtype: str) -> None:
    result = run_conversion(base, cast_recipe(dtype), tmp_path / "out")
    assert result.plan.is_native
    assert result.plan.rewrites == (f"all weights cast to {dtype}",)
    before, after = all_tensors(base), all_tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    wanted = getattr(torch, dtype)
    assert all(torch.equal(after[name], tensor.to(wanted)) for name, tensor in before.items())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=wanted).eval()
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "out"), model(PROMPT).logits)
    config = read_json(tmp_path / "out" / "config.json")
    assert config == {**read_json(base / "config.json"), "dtype": dtype}


def test_what_tells_of_it_asks_for_nothing_of_ours(base: Path, tmp_path: Path) -> None:
    run_conversion(base, load_recipe("cast-bf16"), tmp_path / "out")
    receipt = read_json(tmp_path / "out" / "receipt.json")
    assert receipt["plan"] == {}
    assert receipt["rewrites"] == ["all weights cast to bfloat16"]
    assert set(receipt["inputs"]) == {path.name for path in base.glob("*.safetensors")}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import attnconv" not in card
    assert "trust_remote_code" not in card
    assert "license: mit" in card
    assert "This is `base` with its weights rewritten (all weights cast to bfloat16)" in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not list((tmp_path / "out").glob("*.py"))
    assert load_recipe(tmp_path / "out" / "recipe.yaml").rewrite == load_recipe("cast-bf16").rewrite


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    base = save(tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    run_conversion(base, cast_recipe(), tmp_path / "out")
    assert all_tensors(tmp_path / "out").keys() == all_tensors(base).keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    logits(tmp_path / "out")


def test_shards_are_as_large_as_the_recipe_says_and_aligned(base: Path, tmp_path: Path) -> None:
    run_conversion(base, cast_recipe(output={"shard_size": "9KB"}), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert len(files) > 3
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(tmp_path / "out").values())
    assert all(sum(t.nbytes for t in load_file(path).values()) <= 9000 for path in files)
    for shard in open_checkpoint(tmp_path / "out").shards:
        assert all(tensor.start % 8 == 0 for tensor in shard.tensors.values())


def test_whole_numbers_and_odd_shapes_come_through(tmp_path: Path) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    odd = {"mask": torch.tensor([True, False, True]), "ids": torch.arange(5), "none": torch.zeros(0, 4)}
    odd |= {"one": torch.tensor(2.5), "same": torch.randn(3).bfloat16(), "wide": torch.randn(7, dtype=torch.float64)}
    save_file(load_file(base / "model.safetensors") | odd, base / "model.safetensors", metadata={"format": "pt"})
    plan = plan_rewrite(open_checkpoint(base), [Cast(torch.bfloat16)])
    (tmp_path / "out").mkdir()
    write_rewritten(plan, tmp_path / "out", shard_bytes=10**9)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in odd.items():
        assert torch.equal(after[name], tensor.bfloat16() if tensor.is_floating_point() else tensor)


def test_tensors_are_made_in_pieces(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnconv.convert.rewriting import tensors

    monkeypatch.setattr(tensors, "PIECE_BYTES", 64)
    run_conversion(base, cast_recipe(), tmp_path / "out")
    after = all_tensors(tmp_path / "out")
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in all_tensors(base).items())


def test_steps_follow_each_other_without_a_checkpoint_in_between(base: Path, tmp_path: Path) -> None:
    twice = [{"kind": "cast", "dtype": "float16"}, {"kind": "cast", "dtype": "float32"}]
    result = run_conversion(base, Recipe(name="twice", rewrite=twice), tmp_path / "out")
    assert len(result.plan.rewrites) == 2
    after = all_tensors(tmp_path / "out")
    assert all(torch.equal(after[name], tensor.half().float()) for name, tensor in all_tensors(base).items())


class Halving(Step):
    """Joins each pair of norms into one, and may forget a tensor."""

    summary = "norms joined"

    def __init__(self, *, forget: bool = False, drop: bool = False, name: str = "joined") -> None:
        self.forget, self.drop, self.name = forget, drop, name

    def check(self, config: Mapping[str, Any]) -> None:
        pass

    def claims(self, tensor: Target) -> bool:
        return "layernorm" in tensor.name

    def drops(self, name: str) -> bool:
        return self.drop

    def rewrite(self, claimed: Mapping[str, Target]) -> Iterable[Target]:
        pair = tuple(claimed.values())[: 1 if self.forget else None]
        size = sum(tensor.numbers for tensor in pair)
        yield made(self.name, (size,), torch.float32, pair, lambda *found: torch.cat(found))

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, "joined": True}


def test_a_tensor_can_be_made_of_several(base: Path, tmp_path: Path) -> None:
    plan = plan_rewrite(open_checkpoint(base), [Halving(), Cast(torch.bfloat16)])
    write_rewritten(plan, tmp_path, shard_bytes=10**9)
    norms = [tensor for name, tensor in stored_tensors(open_checkpoint(base)).items() if "layernorm" in name]
    after = load_file(tmp_path / "model.safetensors")
    assert torch.equal(after["joined"], torch.cat([norm.read() for norm in norms]).bfloat16())
    assert read_json(tmp_path / "config.json")["joined"]


def test_every_tensor_is_claimed_or_copied_or_refused_by_name(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    with pytest.raises(PlanError, match=r"nothing is made of the tensor 'model\.layers\.0\.\w+layernorm\.weight'"):
        plan_rewrite(checkpoint, [Halving(forget=True)])
    plan_rewrite(checkpoint, [Halving(forget=True, drop=True)])
    with pytest.raises(PlanError, match=r"two tensors would be named 'model\.embed_tokens\.weight'"):
        plan_rewrite(checkpoint, [Halving(name="model.embed_tokens.weight")])


def test_two_tensors_of_one_name_and_ones_that_become_others_are_refused(base: Path, tmp_path: Path) -> None:
    tensors = list(stored_tensors(open_checkpoint(base)).values())
    with pytest.raises(CheckpointError, match="two tensors named"):
        write_targets([tensors[0], tensors[0]], tmp_path, shard_bytes=10**9)
    for shape, dtype, said in [((3,), torch.float32, "shape"), (tensors[0].shape, torch.float16, "of torch.float32")]:
        wrong = made("a", shape, dtype, (tensors[0],), lambda tensor: tensor)
        (tmp_path / said).mkdir()
        with pytest.raises(CheckpointError, match=said):
            write_targets([wrong], tmp_path / said, shard_bytes=10**9)


def test_what_cannot_be_cast_is_refused_in_one_sentence(base: Path, tmp_path: Path) -> None:
    def refused(folder: Path, match: str, dtype: str = "bfloat16") -> None:
        with pytest.raises(PlanError, match=match):
            run_conversion(folder, cast_recipe(dtype), tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} <= {"base", "f8", "large"}

    edit_config(base, quantization_config={"quant_method": "fp8"})
    refused(base, "quantised, as config.json says")
    edit_config(base, quantization_config=None)
    f8 = save(tiny_llama(), tmp_path / "f8")
    weights = load_file(f8 / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, f8 / "model.safetensors")
    refused(f8, r"'model\.layers\.0\.mlp\.up_proj\.weight', which has the type F8_E4M3")
    large = save(tiny_llama(), tmp_path / "large")
    weights[name][0, 0] = 1e6
    save_file(weights, large / "model.safetensors")
    refused(large, "holds numbers too large for float16", "float16")
    with pytest.raises(PlanError, match="leave --self-contained out"):
        run_conversion(base, cast_recipe(), tmp_path / "out", self_contained=True)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        run_conversion(base, cast_recipe(), tmp_path / "out")
    assert "model.norm.weight" in caplog.text


def test_a_header_whose_bytes_do_not_make_up_the_shape_is_refused(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    (name, info), *_ = checkpoint.shards[0].tensors.items()
    shard = replace(checkpoint.shards[0], tensors={name: replace(info, nbytes=info.nbytes - 4)})
    with pytest.raises(CheckpointError, match="do not make up"):
        stored_tensors(replace(checkpoint, shards=(shard,)))


def test_the_parts_of_a_configuration_get_the_type_too() -> None:
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "vision_config": {"a": 1}, "size": {}}
    assert Cast(torch.bfloat16).config(config) == {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
        "vision_config": {"a": 1},
        "size": {},
    }


def test_an_interruption_leaves_nothing(base: Path, repository: Path, tmp_path: Path) -> None:
    """Killed in the middle of the second shard; what is left over is removed by the next run."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(repository / ".dev")!r})
from attnconv.convert.rewriting import writer
whole = writer._write_shard
def killed(targets, path):
    if path.name.startswith("model-00002"):
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    whole(targets, path)
writer._write_shard = killed
from attnconv.recipes import load_recipe
from attnconv.runs import run_conversion
run_conversion({str(base)!r}, load_recipe("cast-bf16", ["output.shard_size=20KB"]), {str(tmp_path / "out")!r})
"""
    done = fresh_process.run("-c", code)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".out")]) == 1
    run_conversion(base, cast_recipe(), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}
    with pytest.raises(OutputError, match="--overwrite"):
        run_conversion(base, cast_recipe("float16"), tmp_path / "out")
    run_conversion(base, cast_recipe("float16"), tmp_path / "out", overwrite=True)
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "float16"


ATTENTION = "attention: [{layers: all, method: hedgehog}]\n"
HEALED = (
    "data: {embedded: true}\n"
    "stages: [{kind: attention_transfer, steps: 2, sequence_length: 8, learning_rate: 0.001, save_every: 1}]\n"
)


@pytest.mark.parametrize("healing", ["", HEALED], ids=["swap", "healed"])
def test_attention_can_follow_a_rewrite(base: Path, tmp_path: Path, healing: str) -> None:
    text = f"name: both\nrewrite: [{{kind: cast, dtype: bfloat16}}]\n{ATTENTION}{healing}"
    result = run_conversion(base, parse_recipe(text), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}
    assert not result.plan.is_native
    before, after = all_tensors(base), all_tensors(tmp_path / "out")
    kept = [name for name in before if after[name].numel()]
    assert len(kept) >= len(before) - 1
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in kept)
    receipt = read_json(tmp_path / "out" / "receipt.json")
    assert (receipt["source"], receipt["rewrites"]) == ("base", ["all weights cast to bfloat16"])
    assert set(receipt["inputs"]) == {path.name for path in base.glob("*.safetensors")}
    assert receipt["plan"]["modules"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "its weights rewritten (all weights cast to bfloat16) and another attention" in card
    assert "license: mit" in card
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.generate(PROMPT, max_new_tokens=3, do_sample=False).shape == (1, 23)


def test_a_run_on_a_rewritten_model_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnconv.distill.work_folder import WorkFolder

    recipe = parse_recipe(f"name: both\nrewrite: [{{kind: cast, dtype: bfloat16}}]\n{ATTENTION}{HEALED}")
    run_conversion(base, recipe, tmp_path / "whole")
    saved = WorkFolder.save

    def stop(self: WorkFolder, *arguments: Any) -> None:
        saved(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkFolder, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run_conversion(base, recipe, tmp_path / "out")
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "whole", ".out.attnconv-work"}
    run_conversion(base, recipe, tmp_path / "out", resume=True)
    whole, resumed = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "out")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


LOAD = """
import sys
import torch
from safetensors.torch import save_file
sys.modules["attnconv"] = None
from transformers import AutoModelForCausalLM
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained("tester/native")
    save_file({"logits": model(torch.arange(1, 21)[None]).logits}, sys.argv[1])
"""


@pytest.mark.parametrize("rewrite", [{"kind": "cast", "dtype": "bfloat16"}, {"kind": "experts"}, {"kind": "latent"}])
def test_a_native_result_comes_back_from_the_hub(
    base: Path, tmp_path: Path, hub: HubServer, hub_environment: dict[str, str], rewrite: dict[str, Any]
) -> None:
    run_conversion(base, Recipe(name="a", rewrite=[rewrite]), tmp_path / "out")
    push_folder(tmp_path / "out", "tester/native")
    assert hub.files("tester/native").keys() == {path.name for path in (tmp_path / "out").iterdir()}
    fresh_process.run("-c", LOAD, tmp_path / "logits", env=hub_environment, check=True)
    assert torch.equal(load_file(tmp_path / "logits")["logits"], logits(tmp_path / "out"))


def test_a_native_result_is_published_by_its_receipt(base: Path, tmp_path: Path) -> None:
    run_conversion(base, cast_recipe(), tmp_path / "out")
    assert published_files(tmp_path / "out")
    (tmp_path / "out" / "receipt.json").unlink()
    with pytest.raises(CheckpointError, match="neither a receipt"):
        published_files(tmp_path / "out")
    run_conversion(base, parse_recipe(f"name: a\n{ATTENTION}"), tmp_path / "converted")
    config = read_json(tmp_path / "converted" / "config.json")
    del config["attnconv"]
    (tmp_path / "converted" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="tells of converted attention"):
        published_files(tmp_path / "converted")


def test_a_model_in_memory_cannot_be_rewritten() -> None:
    from attnconv.convert import convert_model

    recipe = parse_recipe(f"name: a\nrewrite: [{{kind: cast, dtype: float16}}]\n{ATTENTION}")
    with pytest.raises(PlanError, match="convert the model's folder"):
        convert_model(tiny_llama(), recipe)


def test_the_writer_gives_files_that_safetensors_reads(base: Path, tmp_path: Path) -> None:
    write_targets(stored_tensors(open_checkpoint(base)).values(), tmp_path, shard_bytes=10**9)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(all_tensors(base))
    assert all(torch.equal(tensor, all_tensors(base)[name]) for name, tensor in all_tensors(tmp_path).items())
