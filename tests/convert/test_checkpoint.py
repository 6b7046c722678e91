"""Opening and loading checkpoints, and every way in which one is refused."""

import builtins
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from attnconv.convert.reading.checkpoint import (
    architecture_of,
    load_model,
    load_tokenizer,
    model_class_of,
    open_checkpoint,
)
from attnconv.errors import CheckpointError

IDS = torch.tensor([[1, 5, 9, 33, 2]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.save(tiny_models.tiny_llama(), tmp_path / "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_models.save(tiny_models.tiny_llama(), tmp_path / "sharded", shards=True)


def refusal(source: Path | str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_opens_a_single_file(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    assert checkpoint.path == folder.resolve()
    assert checkpoint.source == str(folder)
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.config.num_key_value_heads == 2
    assert checkpoint.config_dict["model_type"] == "llama"
    assert checkpoint.dtype == torch.float32
    assert dict(checkpoint.weight_map) == dict.fromkeys(tensors, "model.safetensors")
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert [shard.tensors[name].shape for shard in checkpoint.shards for name in sorted(shard.tensors)] == [
        tuple(tensors[name].shape) for name in sorted(tensors)
    ]
    assert (checkpoint.gguf_file, checkpoint.repo_id, checkpoint.is_converted) == (None, None, False)


def test_opens_shards(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    checkpoint = open_checkpoint(sharded)
    assert len(checkpoint.shards) > 2
    assert dict(checkpoint.weight_map) == index["weight_map"]
    assert checkpoint.nbytes == index["metadata"]["total_size"]


def test_reads_no_tensor_and_imports_no_model_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read = []
    original = Path.open

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def read(self, count: int) -> bytes:
            data: bytes = self.file.read(count)
            read.append(len(data))
            return data

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        file = original(path, *args, **kwargs)
        return Counting(file) if path.suffix == ".safetensors" else file

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.delitem(sys.modules, "transformers.models.llama.modeling_llama")
    checkpoint = open_checkpoint(folder)
    assert sum(read) == (folder / "model.safetensors").stat().st_size - checkpoint.nbytes
    assert "transformers.models.llama.modeling_llama" not in sys.modules


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_type_of_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    # A few tensors of another type, as norms often are, do not count.
    model = tiny_models.tiny_llama().to(dtype)
    model.model.norm.to(torch.float32)
    tiny_models.save(model, tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.dtype == dtype
    assert load_model(checkpoint).dtype == dtype
    assert load_model(checkpoint, dtype=torch.float64).dtype == torch.float64


def test_loads_what_was_saved(sharded: Path) -> None:
    model = load_model(open_checkpoint(sharded), device="cpu")
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_models.tiny_llama()(IDS).logits)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("LlamaForSequenceClassification", {"model_type": "llama"}),
        ("BertForMaskedLM", {"model_type": "bert"}),
        ("ViTForImageClassification", {"model_type": "vit"}),
    ],
)
def test_takes_the_class_that_the_configuration_names(name: str, config: dict[str, str]) -> None:
    import transformers

    built = transformers.CONFIG_MAPPING[config["model_type"]](architectures=[name])
    assert model_class_of(built) is getattr(transformers, name)


def test_without_architectures_a_language_model_is_meant() -> None:
    import transformers

    assert architecture_of(transformers.LlamaConfig()) == "LlamaForCausalLM"
    assert architecture_of(transformers.ViTConfig()) == "ViTModel"


def test_refuses_a_class_that_transformers_does_not_have(folder: Path) -> None:
    tiny_models.edit_config(folder, architectures=["LlamaForTelepathy"])
    with pytest.raises(CheckpointError, match="'LlamaForTelepathy', which transformers .* does not have"):
        model_class_of(open_checkpoint(folder).config)


def test_refuses_a_model_with_weights_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 are missing, the first is 'model\.layers\.1\.self_attn\.k_proj"):
        load_model(open_checkpoint(folder))


def test_refuses_weights_of_other_shapes(folder: Path) -> None:
    tiny_models.edit_config(folder, intermediate_size=40)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(open_checkpoint(folder))


def test_refuses_what_is_not_there(tmp_path: Path) -> None:
    assert "does not exist, and it is no Hub id" in refusal(tmp_path / "nowhere")
    assert "does not exist, and it is no Hub id" in refusal("not/a/hub/id")
    assert "There is no file" in refusal("nowhere.gguf")


def test_refuses_a_folder_without_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "is not a model folder: it has no config.json" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "", "[1, 2]", '"llama"', "\udcff", "[" * 100_000])
def test_refuses_a_damaged_configuration(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert "config.json is not" in refusal(folder)


def test_refuses_values_that_transformers_does_not_accept(folder: Path) -> None:
    tiny_models.edit_config(folder, hidden_size="wide")
    assert "config.json is not accepted by transformers" in refusal(folder)


def test_refuses_an_unknown_model_type(folder: Path) -> None:
    tiny_models.edit_config(folder, model_type="lama")
    assert "model_type 'lama', which transformers" in refusal(folder)
    tiny_models.edit_config(folder, model_type=None)
    assert "names no model_type" in refusal(folder)


def test_refuses_a_missing_shard(sharded: Path) -> None:
    name = sorted(path.name for path in sharded.glob("*.safetensors"))[1]
    (sharded / name).unlink()
    assert f"the shard {name} named by model.safetensors.index.json is missing" in refusal(sharded)


def test_refuses_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(folder)


@pytest.mark.parametrize("left", [-1, 40, 8, 3, 0])
def test_refuses_a_truncated_file(folder: Path, left: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert "is truncated" in refusal(folder)


def test_refuses_a_file_that_is_too_long(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "4 bytes follow the data" in refusal(folder)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 a pickle in disguise", b"\x04" + b"\0" * 7 + b"[1]]", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_refuses_what_is_no_safetensors_file(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert "is not a safetensors file" in refusal(folder)


def test_refuses_a_header_that_is_nested_without_end(folder: Path) -> None:
    header = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "is not a safetensors file: its header is not valid JSON" in refusal(folder)


@pytest.mark.parametrize("classes", ["LlamaForCausalLM", {"a": 1}, 7, [7], [["LlamaForCausalLM"]], "x" * 500])
def test_refuses_architectures_that_are_no_list_of_names(folder: Path, classes: Any) -> None:
    tiny_models.edit_config(folder, architectures=classes)
    message = refusal(folder)
    assert "its 'architectures' must be a list of class names, and is " in message
    assert len(message) < 300 + len(str(folder))


@pytest.mark.parametrize("offsets", [[8, 4], [-8, 4], ["a", "b"], [1], None])
def test_refuses_a_header_with_impossible_offsets(folder: Path, offsets: Any) -> None:
    def change(header: dict[str, Any]) -> None:
        header["model.norm.weight"]["data_offsets"] = offsets

    tiny_models.edit_header(folder / "model.safetensors", change)
    assert "is damaged" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/etc/passwd", "a/../../b.safetensors", "C:\\w.safetensors", "..\\b", ""]
)
def test_refuses_an_index_that_points_outside(sharded: Path, name: str) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    assert "which lies outside the folder" in refusal(sharded)


@pytest.mark.parametrize("weight_map", [{}, None, ["a"], {"a": 1}])
def test_refuses_an_index_without_a_map(sharded: Path, weight_map: Any) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "is damaged: its 'weight_map'" in refusal(sharded)


def test_refuses_an_index_that_promises_too_much(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    assert "does not hold the tensor 'model.extra.weight'" in refusal(sharded)


def test_refuses_links_that_lead_outside(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "outside the folder" in refusal(folder)


def test_refuses_companions_that_lead_outside(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    assert "outside the folder" in refusal(folder)


def test_follows_a_link_to_the_folder_and_links_inside_it(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    assert open_checkpoint(tmp_path / "link").nbytes > 0


def cached(folder: Path, cache: Path) -> Path:
    """Put a folder's files into a cache laid out as the Hub client does, with links to blobs."""
    repository = cache / "models--someone--tiny-llama"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_opens_a_snapshot_of_the_hub_cache(sharded: Path, tmp_path: Path) -> None:
    snapshot = cached(sharded, tmp_path / "hub")
    checkpoint = open_checkpoint(snapshot)
    assert (checkpoint.repo_id, checkpoint.revision) == ("someone/tiny-llama", snapshot.name)
    assert len(checkpoint.shards) > 2


def test_opens_a_hub_id_offline_from_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(folder, tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    checkpoint = open_checkpoint("someone/tiny-llama")
    assert (checkpoint.path, checkpoint.repo_id, checkpoint.revision) == (snapshot, "someone/tiny-llama", snapshot.name)


def test_says_that_the_hub_cannot_be_reached() -> None:
    assert "the Hub cannot be reached" in refusal("someone/not-in-the-cache")
    assert "the Hub cannot be reached" in refusal("someone/not-in-the-cache/model.Q4_0.gguf")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_refuses_a_pickle_with_advice(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    for source in (folder, folder / name):
        message = refusal(source)
        assert "pickle" in message
        assert "save_pretrained" in message


def test_refuses_other_files(folder: Path) -> None:
    assert "give the folder of a model" in refusal(folder / "model.safetensors")


def test_refuses_a_converted_model(folder: Path) -> None:
    tiny_models.edit_config(folder, attnconv={"version": 1, "modules": {}}, auto_map={"AutoModel": "m.M"})
    assert "is converted already" in refusal(folder)


def test_runs_no_code_of_the_checkpoint_unless_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from transformers import LlamaForCausalLM\nclass Odd(LlamaForCausalLM):\n    odd = True\n"
    (folder / "modeling_odd.py").write_text("import builtins\nbuiltins.odd_code_ran = True\n" + code)
    references = {"AutoModelForCausalLM": "modeling_odd.Odd"}
    tiny_models.edit_config(folder, auto_map=references, architectures=["Odd"])
    assert "--trust-remote-code" in refusal(folder)
    assert not hasattr(builtins, "odd_code_ran")
    monkeypatch.setattr(builtins, "odd_code_ran", False, raising=False)
    checkpoint = open_checkpoint(folder, trust_remote_code=True)
    assert not getattr(builtins, "odd_code_ran")  # noqa: B009
    assert getattr(load_model(checkpoint), "odd", False)
    assert getattr(builtins, "odd_code_ran")  # noqa: B009


def test_loads_a_tokenizer_or_none(folder: Path) -> None:
    assert load_tokenizer(open_checkpoint(folder)) is None
    tiny_models.write_tokenizer(folder)
    assert load_tokenizer(open_checkpoint(folder))("a b")["input_ids"] == [1, 2]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer or processor of .* cannot be loaded"):
        load_tokenizer(open_checkpoint(folder))


@pytest.mark.parametrize("kind", ["image_processor_type", "feature_extractor_type"])
def test_loads_a_processor_for_other_inputs(folder: Path, kind: str) -> None:
    class_name = {"image_processor_type": "ViTImageProcessor", "feature_extractor_type": "Wav2Vec2FeatureExtractor"}[
        kind
    ]
    (folder / "preprocessor_config.json").write_text(json.dumps({kind: class_name}))
    assert type(load_tokenizer(open_checkpoint(folder))).__name__.startswith(class_name)


def test_companions_are_what_a_conversion_takes_over(folder: Path) -> None:
    taken = ["LICENSE", "1_Pooling/config.json", "chat_template.jinja", "generation_config.json", "vocab.txt"]
    left = ["README.md", "optimizer.pt", "checkpoint-5/config.json", "trainer_state.json", "modeling_odd.py", "x.gguf"]
    for name in taken + left:
        (folder / name).parent.mkdir(exist_ok=True)
        # This one is read, and must be JSON.
        (folder / name).write_text("{}" if name == "generation_config.json" else name)
    assert set(open_checkpoint(folder).companions) == set(taken)


@pytest.mark.slow
def test_is_fast(shared: Path) -> None:
    began = time.perf_counter()
    open_checkpoint(shared / "data" / "models" / "stories260K")
    assert time.perf_counter() - began < 1
