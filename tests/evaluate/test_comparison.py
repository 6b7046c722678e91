import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from attnconv.errors import CheckpointError, DataError
from attnconv.evaluate.comparison import compare

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.\n"


@pytest.fixture(scope="module")
def teacher(repository: Path) -> str:
    return str(repository / "distill" / "assets" / "stories260K")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(STORY * 20)
    return path


def test_one_model(teacher: str, text: Path) -> None:
    calls = []
    found = compare([teacher], text=text, tokens=100, context=32, progress=lambda *done: calls.append(done))
    (row,) = found.measurements
    assert (row.model, row.dtype, row.converted, row.result.tokens) == (teacher, "float32", False, 96)
    assert 1 < row.result.perplexity < 30
    assert found.same_tokens
    assert found.context == 32
    assert calls[-1] == (100, 100)
    assert found.to_dict()["measurements"][0]["result"]["tokens"] == 96


def test_two_models_and_a_dtype(teacher: str, text: Path) -> None:
    calls = []
    found = compare(
        [teacher, teacher], text=text, tokens=64, dtype="bfloat16", progress=lambda *done: calls.append(done)
    )
    first, second = found.measurements
    assert first == second
    assert first.dtype == "bfloat16"
    assert calls[0] == (64, 128)
    assert calls[-1] == (128, 128)


def test_the_context_follows_the_model_unless_it_is_given(teacher: str, text: Path, caplog) -> None:
    assert compare([teacher], text=text, tokens=64).context == 512
    assert not caplog.records
    compare([teacher], text=text, tokens=64, context=600)
    assert "fewer positions" in caplog.text


def test_other_tokens_are_said(teacher: str, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["Lily"])
    tokenizer.save_pretrained(other)
    config = LlamaConfig(
        vocab_size=520, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(other)
    assert not compare([teacher, str(other)], text=text, tokens=64, context=32).same_tokens


def test_what_cannot_be_compared(teacher: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dtype is 'int8'"):
        compare([teacher], text=text, dtype="int8")
    with pytest.raises(DataError, match="no device 'toaster'"):
        compare([teacher], text=text, device="toaster")
    with pytest.raises(DataError, match="no text file"):
        compare([teacher], text=tmp_path / "none.txt")
    config = BertConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="needs a causal language model"):
        compare([str(tmp_path / "bert")], text=text)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "mute")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        compare([str(tmp_path / "mute")], text=text)
