import gzip
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from attnconv.errors import DataError
from attnconv.evaluate.tasks.textfile import adds_bos, load_tokens, read_documents

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.\n"


@pytest.fixture(scope="module")
def tokenizer(repository: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(repository / "packaged" / "assets" / "stories260K")


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.TXT"])
def test_a_text_file_is_one_document_kept_as_it_is(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\n one\n\n two é\n")
    assert list(read_documents(path)) == ["\n one\n\n two é\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_are_documents(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, '{"text": "one", "n": 1}\n\n{"text": "two"}\n')
    assert list(read_documents(path)) == ["one", "two"]


def test_another_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"passage": "p"}))
    assert list(read_documents(path, field="passage")) == ["p"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.pdf", "x", "not a kind of text file"),
        ("a.jsonl", '{"text": "one"}\n{"text"\n', "Line 2 of .* is not JSON"),
        ("a.jsonl", '{"body": "one"}\n', r'no text under "text" \(it has: body\)'),
        ("a.jsonl", '["one"]\n', r"it has: list"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, content: str, match: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=match):
        list(read_documents(path))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text file at"):
        list(read_documents(tmp_path / "none.txt"))


def test_damaged_files(tmp_path: Path) -> None:
    for name, data in [
        ("a.txt", b"\xff\xfe\x00"),
        ("a.txt.gz", b"no gzip"),
        ("b.txt.gz", gzip.compress(b"x" * 99)[:-9]),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
            list(read_documents(tmp_path / name))


def test_every_window_starts_with_bos(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert adds_bos(tokenizer)
    ids = load_tokens(write(tmp_path / "a.txt", STORY * 5), tokenizer, context=32).tolist()
    assert [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id] == list(range(0, len(ids), 32))
    plain = [token for token in ids if token != tokenizer.bos_token_id]
    assert plain == tokenizer(STORY * 5, add_special_tokens=False)["input_ids"]


def test_no_bos_where_the_tokenizer_adds_none(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch) -> None:
    monkeypatch.setattr("attnconv.evaluate.tasks.textfile.adds_bos", lambda _: False)
    ids = load_tokens(write(tmp_path / "a.txt", STORY), tokenizer, context=8).tolist()
    assert ids == tokenizer(STORY, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("limit", [2, 31, 32, 33, 400])
def test_a_limited_read_gives_the_first_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    path = write(tmp_path / "a.txt", STORY * 2000)
    whole = load_tokens(path, tokenizer, context=32)
    assert load_tokens(path, tokenizer, context=32, limit=limit).equal(whole[:limit])


def test_text_of_long_tokens_is_read_again_in_full(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch
) -> None:
    monkeypatch.setattr("attnconv.evaluate.tasks.textfile.CHARACTERS_PER_TOKEN", 1)
    path = write(tmp_path / "a.txt", STORY * 200)
    whole = load_tokens(path, tokenizer, context=32)
    assert load_tokens(path, tokenizer, context=32, limit=500).equal(whole[:500])


def test_documents_are_joined_by_an_empty_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = write(tmp_path / "a.jsonl", '{"text": "one two"}\n{"text": "three"}\n')
    text = write(tmp_path / "a.txt", "one two\n\nthree")
    assert load_tokens(lines, tokenizer, context=64).equal(load_tokens(text, tokenizer, context=64))


@pytest.mark.parametrize("content", ["", " "])
def test_an_empty_file_is_an_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: str, monkeypatch
) -> None:
    monkeypatch.setattr("attnconv.evaluate.tasks.textfile.adds_bos", lambda _: False)
    with pytest.raises(DataError, match="at least 2"):
        load_tokens(write(tmp_path / "a.txt", content), tokenizer, context=64)
