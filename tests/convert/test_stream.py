"""Conversions made on disk: what is copied, what is added, and that the result is the model that it should be."""

import errno
import json
import os
import resource
import shutil
import struct
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnconv.attention_modules import Geometry
from attnconv.convert import apply_plan
from attnconv.convert.planning.plan import Plan, PlanEntry
from attnconv.convert.reading.checkpoint import Checkpoint, load_model, open_checkpoint
from attnconv.convert.writing.stream import stream_convert
from attnconv.errors import CheckpointError, OutputError
from attnconv.files import fast_copy
from attnconv.files.fast_copy import COPY_CHUNK, copy_files, digest_of
from attnconv.files.output_folder import atomic_folder

IDS = torch.tensor([[1, 5, 9, 33, 2, 7, 40]])
LLAMA = [f"model.layers.{index}.self_attn" for index in range(2)]


def plan(method: str, names: list[str] = LLAMA, kv_heads: int = 2, causal: bool = True) -> Plan:
    geometry = Geometry(num_heads=4, num_kv_heads=kv_heads, head_dim=8, value_dim=8, causal=causal)
    options: dict[str, Any] = {"sliding_window": {"window": 3}, "lolcats": {"window": 3}, "hedgehog": {}}[method]
    return Plan(tuple(PlanEntry(name, index, method, options, geometry) for index, name in enumerate(names)))


def digest(path: Path) -> str:
    return "xxh3_128:" + xxhash.xxh3_128(path.read_bytes()).hexdigest()


def convert(checkpoint: Checkpoint, made: Plan, output: Path, **options: Any) -> dict[str, str]:
    with atomic_folder(output) as folder:
        return stream_convert(checkpoint, made, folder, **options).digests


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tiny_models.save(tiny_models.tiny_llama(), tmp_path / "base")
    tiny_models.write_tokenizer(folder)
    (folder / "LICENSE").write_text("do what you like")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_models.save(tiny_models.tiny_llama(), tmp_path / "sharded", shards=True)


@pytest.fixture
def no_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behave as on a file system that cannot share blocks, whatever this one can."""
    monkeypatch.setattr(fast_copy, "_clone", lambda source, target: False)


FIRST = "model-00001-of-00002.safetensors"
MARK = "attnconv.mark"
MARKED = "model.layers.0.self_attn.k_proj.weight"


def test_a_plan_without_tensors_keeps_the_files(base: Path, tmp_path: Path) -> None:
    digests = convert(open_checkpoint(base), plan("sliding_window"), tmp_path / "out")
    assert digests == {"model.safetensors": digest(base / "model.safetensors")}
    assert (tmp_path / "out" / FIRST).read_bytes() == (base / "model.safetensors").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_a_plan_without_tensors_adds_the_mark_alone(sharded: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(sharded), plan("sliding_window"), tmp_path / "out")
    before = sorted(sharded.glob("*.safetensors"))
    *after, last = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.read_bytes() for path in after] == [path.read_bytes() for path in before]
    assert {name: tensor.numel() for name, tensor in load_file(last).items()} == {MARK: 0, MARKED: 0}
    old, new = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (sharded, tmp_path / "out"))
    names = {path.name: new_path.name for path, new_path in zip(before, after, strict=True)}
    assert new["weight_map"] == {n: names[f] for n, f in old["weight_map"].items()} | {MARK: last.name}
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"]


@pytest.mark.parametrize("source", ["base", "sharded"])
def test_new_tensors_come_in_a_shard_of_their_own(source: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(source))
    made = plan("lolcats")
    convert(checkpoint, made, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(checkpoint.shards) + 1
    assert [path.name for path in files] == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for shard, path in zip(checkpoint.shards, files, strict=False):
        assert path.read_bytes() == shard.path.read_bytes()
    new = load_file(files[-1])
    assert {name: tensor.shape for name, tensor in new.items()} == {
        name: tensor.shape for name, tensor in made.new_tensors()
    } | {MARK: (0,), MARKED: (0,)}
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    # What the mark stands for is in the shard of its base.
    held = {name: path.name for path in reversed(files) for name in safe_open(path, "pt").keys()}  # noqa: SIM118
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == checkpoint.nbytes + sum(tensor.nbytes for tensor in new.values())


@pytest.mark.parametrize("method", ["sliding_window", "lolcats", "hedgehog"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_the_converted_model(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_models.tiny_llama().to(dtype)
    checkpoint = open_checkpoint(tiny_models.save(model, tmp_path / "base"))
    convert(checkpoint, plan(method), tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    expected = apply_plan(load_model(checkpoint), plan(method))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
        assert not torch.equal(loaded(IDS).logits, model(IDS).logits)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Give the new tensors values that no initialisation gives."""
    path = max(folder.glob("*.safetensors"))
    tensors = {name: torch.randn_like(tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


def assert_holds(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    assert tensors
    for name, tensor in tensors.items():
        assert torch.equal(parameters[name], tensor), name


def test_new_tensors_load_beside_names_without_the_prefix(tmp_path: Path) -> None:
    folder = tiny_models.save(tiny_models.tiny_gpt2(), tmp_path / "base")
    # As the first GPT-2 checkpoints were written: by the model without its head.
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    names = [f"transformer.h.{index}.attn" for index in range(2)]
    convert(open_checkpoint(folder), plan("lolcats", names, kv_heads=4), tmp_path / "out")
    new = trained(tmp_path / "out")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_holds(loaded, new)
    without_head = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert_holds(without_head, {name.removeprefix("transformer."): tensor for name, tensor in new.items()})


def test_new_tensors_load_beside_names_from_before_a_renaming(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4
    )
    model = transformers.ViTForImageClassification(config).eval()
    folder = tiny_models.save(model, tmp_path / "base")
    names = [name for name, module in model.named_modules() if type(module).__name__ == "ViTAttention"]
    # On disk the attention lies under names that the modules no longer have.
    assert not any(name.startswith(f"{names[0]}.") for name in open_checkpoint(folder).weight_map)
    convert(open_checkpoint(folder), plan("hedgehog", names, kv_heads=4, causal=False), tmp_path / "out")
    new = trained(tmp_path / "out")
    loaded, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert_holds(loaded, new)


def test_shards_may_have_any_names(sharded: Path, tmp_path: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    # Names that the output will have too, each for another shard.
    count = len(names) + 1
    new_names = {name: f"model-{i:05}-of-{count:05}.safetensors" for i, name in enumerate(reversed(names), start=2)}
    for name, new_name in new_names.items():
        (sharded / name).rename(sharded / new_name)
    index["weight_map"] = {tensor: new_names[name] for tensor, name in index["weight_map"].items()}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(sharded)
    convert(checkpoint, plan("lolcats"), tmp_path / "out")
    out = open_checkpoint(tmp_path / "out", allow_converted=True)
    assert len(out.weight_map) == len(checkpoint.weight_map) + len(dict(plan("lolcats").new_tensors())) + 1


def test_imports_no_model_code(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers.models.llama.modeling_llama")
    convert(open_checkpoint(base), plan("lolcats"), tmp_path / "out")
    assert "transformers.models.llama.modeling_llama" not in sys.modules


def test_a_copy_is_independent_of_the_base(base: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(base), plan("sliding_window"), tmp_path / "out", link=False)
    before = digest(tmp_path / "out" / FIRST)
    with (base / "model.safetensors").open("r+b") as file:
        file.write(bytes(100))
    assert digest(tmp_path / "out" / FIRST) == before


@pytest.mark.usefixtures("no_clones")
def test_a_link_shares_the_base(base: Path, tmp_path: Path) -> None:
    digests = convert(open_checkpoint(base), plan("lolcats"), tmp_path / "out", link=True)
    assert digests == {"model.safetensors": digest(base / "model.safetensors")}
    assert (tmp_path / "out" / FIRST).samefile(base / "model.safetensors")


def test_blocks_are_shared_rather_than_the_file(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clone(target: int, request: int, source: int) -> int:
        assert request == fast_copy.FICLONE
        return os.sendfile(target, source, 0, 1 << 30)

    monkeypatch.setattr("fcntl.ioctl", clone)
    with atomic_folder(tmp_path / "out") as folder:
        streamed = stream_convert(open_checkpoint(base), plan("sliding_window"), folder)
    assert streamed.links == {}
    assert not (tmp_path / "out" / FIRST).samefile(base / "model.safetensors")
    assert digest(tmp_path / "out" / FIRST) == digest(base / "model.safetensors")


@pytest.mark.usefixtures("no_clones")
def test_blobs_of_the_hub_cache_become_ordinary_files(base: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    blob = tmp_path / "hub" / "models--a--b" / "blobs" / "abc"
    snapshot.parent.mkdir(parents=True)
    blob.parent.mkdir()
    base.rename(snapshot)
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    for link in (True, False):
        convert(open_checkpoint(snapshot), plan("sliding_window"), tmp_path / f"{link}", link=link)
        path = tmp_path / f"{link}" / FIRST
        assert not path.is_symlink()
        assert path.samefile(blob) == link
        assert digest(path) == digest(blob)


def test_a_shared_file_outlives_the_base(base: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(base), plan("lolcats"), tmp_path / "out")
    mode = (base / "model.safetensors").stat().st_mode
    before = digest(base / "model.safetensors")
    # Whoever saves the base anew puts a new file in the old one's stead.
    save_file({"a": torch.zeros(1)}, base / "model.safetensors")
    assert digest(tmp_path / "out" / FIRST) == before
    shutil.rmtree(base)
    assert digest(tmp_path / "out" / FIRST) == before
    assert (tmp_path / "out" / FIRST).stat().st_mode == mode


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_are_impossible_it_copies(
    base: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    convert(open_checkpoint(base), plan("sliding_window"), tmp_path / "out", link=True)
    assert not (tmp_path / "out" / FIRST).samefile(base / "model.safetensors")
    assert digest(tmp_path / "out" / FIRST) == digest(base / "model.safetensors")


@pytest.mark.parametrize("way", ["no call", "refused", "refused later"])
def test_where_the_kernel_cannot_copy_it_copies_itself(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_000))
    calls = []

    def refuse(reader: int, writer: int, count: int) -> int:
        calls.append(count)
        if way == "refused later" and len(calls) == 1:
            return os.write(writer, os.read(reader, 1_000_000))
        raise OSError(errno.EXDEV, "across devices")

    if way == "no call":
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    assert copy_files([(source, tmp_path / "copy")]) == {source: digest(source)}
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_other_errors_of_copying_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EIO, "bad block")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    (tmp_path / "source").write_bytes(b"x")
    with pytest.raises(OSError, match="bad block"):
        copy_files([(tmp_path / "source", tmp_path / "copy")])


def test_a_file_that_grows_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(1000))

    def copy_and_grow(reader: int, writer: int, _: int) -> int:
        with source.open("ab") as file:
            file.write(b"more")
        return os.write(writer, os.read(reader, 10_000)) if source.stat().st_size < 1010 else 0

    monkeypatch.setattr(os, "copy_file_range", copy_and_grow)
    with pytest.raises(OutputError, match="changed while it was copied"):
        copy_files([(source, tmp_path / "copy")])


def test_digests_are_those_of_the_usual_tool(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert digest_of(tmp_path / "empty") == "xxh3_128:99aa06d3014798d86001c324468d497f"
    (tmp_path / "long").write_bytes(os.urandom(5_000_001))
    assert digest_of(tmp_path / "long") == digest(tmp_path / "long")


def sparse_checkpoint(folder: Path, megabytes: int) -> None:
    """A checkpoint of zeros that takes no room on disk."""
    size = megabytes << 20
    shape = [size // 4]
    header = json.dumps({"model.embed.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


def test_memory_does_not_grow_with_the_checkpoint(base: Path, tmp_path: Path) -> None:
    sparse_checkpoint(base, 4 * COPY_CHUNK >> 20)

    def task() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        convert(open_checkpoint(base), plan("lolcats"), tmp_path / "out", link=False)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os._exit(0 if grown < 60_000 else 1)

    process = get_context("fork").Process(target=task)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "out" / FIRST).stat().st_size > 4 * COPY_CHUNK


def test_refuses_a_tensor_that_is_there_already(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    name = next(iter(dict(plan("lolcats").new_tensors())))
    save_file({**tensors, name: torch.zeros(1)}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds weights that attnconv converted"):
        convert(open_checkpoint(base), plan("lolcats"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_gguf(tmp_path: Path) -> None:
    tiny_gguf = pytest.importorskip("tiny_gguf", reason="needs the gguf package", exc_type=ImportError)
    path = tiny_gguf.write_gguf(tiny_models.tiny_llama(), tmp_path / "tiny.gguf")
    with pytest.raises(CheckpointError, match="has to be loaded"):
        convert(open_checkpoint(path), plan("lolcats"), tmp_path / "out")
