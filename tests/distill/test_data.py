"""Sources of text: every kind of file, the packaged sample, the Hub's interface, and what is refused."""

import gzip
import itertools
import json
import random

import pytest

from attnconv.distill import data
from attnconv.distill.data import TokenStream, encode_document, read_documents, shuffled
from attnconv.errors import DataError
from attnconv.packaged.model import embedded_model_path, embedded_tokens
from attnconv.recipes import DataSection

STORIES = ["Once upon a time.", "Lily saw a cat.", "The end came soon."]


def write(path, text):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.txt", "a.txt.gz", "a.parquet"])
def test_every_kind_of_file_gives_its_documents(tmp_path, tokenizer, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame({"text": STORIES, "length": [1, 2, 3]}).to_parquet(path)
    else:
        write(path, json_lines({"text": story} for story in STORIES) if "json" in name else "\n\n".join(STORIES) + "\n")
    found = list(read_documents(DataSection(path=str(path)), tokenizer))
    assert [document.strip() for document in found] == STORIES


def test_another_field_and_rows_without_text(tmp_path, tokenizer):
    rows = [{"id": 1, "story": STORIES[0]}, {"id": 2, "story": None}, {"id": 3, "story": "  "}, {"id": 4, "story": "b"}]
    path = write(tmp_path / "a.jsonl", json_lines(rows))
    assert list(read_documents(DataSection(path=path, field="story"), tokenizer)) == [STORIES[0], "b"]


BAD = {
    "missing.jsonl": (None, "There is no data file"),
    "empty.jsonl": ("", "is empty"),
    "empty.jsonl.gz": ("", "holds no text"),
    "blank.txt": ("\n\n\n", "holds no text"),
    "odd.csv": ("text\na\n", "no known kind; use .jsonl"),
    "field.jsonl": (json_lines([{"story": "a", "id": 1}]), 'no field "text"; its fields are: story, id'),
    "type.jsonl": (json_lines([{"text": 5}]), r'no text \(int\) in the field "text"'),
    "broken.jsonl": ('{"text": "a"}\n{"text": \n', "cannot be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_sentence(tmp_path, tokenizer, name):
    content, message = BAD[name]
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(DataSection(path=str(tmp_path / name)), tokenizer))
    assert "\n" not in str(caught.value)


def test_a_file_that_only_claims_to_be_gzipped_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl.gz").write_text(json_lines([{"text": "a"}]))
    with pytest.raises(DataError, match="cannot be"):
        list(read_documents(DataSection(path=str(tmp_path / "a.jsonl.gz")), tokenizer))


def test_fewer_tokens_than_one_sequence_are_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", json_lines([{"text": "a b c"}]))
    with pytest.raises(DataError, match="one sequence of 64 tokens needs more"):
        next(TokenStream(DataSection(path=path), tokenizer).sequences(64))


def test_a_hub_data_set_is_streamed(monkeypatch, tokenizer):
    asked = {}

    def load_dataset(*args, **kwargs):
        asked.update(args=args, **kwargs)
        return iter([{"text": story} for story in STORIES])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    section = DataSection(hub="some/stories", name="tiny", split="validation")
    assert list(read_documents(section, tokenizer)) == STORIES
    assert asked == {"args": ("some/stories", "tiny"), "split": "validation", "streaming": True}


def test_a_hub_data_set_that_cannot_be_reached_is_one_sentence(monkeypatch, tokenizer):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r'^The data set "some/stories" cannot be opened: no route; .* with data.path\.$'
    ):
        list(read_documents(DataSection(hub="some/stories"), tokenizer))


def test_documents_end_with_eos_and_begin_as_the_tokenizer_says(tokenizer):
    ids = encode_document(tokenizer, STORIES[0])
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1


def test_the_order_depends_on_seed_and_epoch_alone_and_loses_nothing():
    documents = [f"document {number}" for number in range(500)]
    orders = {seed: list(shuffled(iter(documents), random.Random(seed))) for seed in ("0/0", "0/1", "1/0")}
    assert all(sorted(order) == sorted(documents) for order in orders.values())
    assert len({tuple(order) for order in orders.values()} | {tuple(documents)}) == 4
    assert orders["0/0"] == list(shuffled(iter(documents), random.Random("0/0")))


def test_large_documents_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("attnconv.distill.data.BUFFER_CHARACTERS", 100)
    drawn = []

    def documents():
        for number in range(50):
            assert number - len(drawn) <= 3
            yield str(number % 10) * 45

    for document in shuffled(documents(), random.Random(0)):
        drawn.append(document)
    assert len(drawn) == 50


def test_the_packaged_sample_comes_as_tokens_for_its_own_tokenizer(tokenizer):
    section = DataSection(embedded=True)
    first = next(TokenStream(section, tokenizer).sequences(384)).tokens
    assert any((row == first).all() for row in embedded_tokens("train"))
    assert embedded_tokens("train").shape == (3600, 384)
    assert embedded_tokens("valid").shape == (400, 384)
    with pytest.raises(DataError, match="train, valid"):
        embedded_tokens("test")


def test_the_packaged_sample_comes_as_text_for_other_tokenizers(tokenizer):
    class Other:
        def get_vocab(self):
            return {"a": 0}

    text = next(read_documents(DataSection(embedded=True, split="valid"), Other()))
    assert "Once upon a time" in text
    # A run reads its data many times, and decoding all of it takes a second.
    decoded = data._embedded_texts.cache_info().misses
    assert next(read_documents(DataSection(embedded=True, split="valid"), Other())) == text
    assert data._embedded_texts.cache_info().misses == decoded


def test_the_packaged_files_are_small():
    size = sum(file.stat().st_size for file in embedded_model_path().parent.rglob("*") if file.is_file())
    assert size < 2.2e6


def test_the_stream_is_the_same_every_time_and_from_any_place(tmp_path, tokenizer):
    rows = [{"text": f"Tom had {number} red balls."} for number in range(40)]
    section = DataSection(path=write(tmp_path / "a.jsonl.gz", json_lines(rows)), seed=3)
    whole = list(itertools.islice(TokenStream(section, tokenizer).sequences(32), 30))
    rest = list(itertools.islice(TokenStream(section, tokenizer).sequences(32, whole[19].end), 10))
    assert whole[-1].end.epoch >= 1
    assert [sequence.tokens.tolist() for sequence in rest] == [s.tokens.tolist() for s in whole[20:]]
