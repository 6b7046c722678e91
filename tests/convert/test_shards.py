"""What safetensors refuses is refused before anything is streamed, and what it takes is taken."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save

from attnconv.convert.reading.shards import read_shard
from attnconv.errors import CheckpointError

F32 = "F32"


def entry(begin: int, end: int, *, shape: tuple[int, ...] = (2,), dtype: str = F32) -> str:
    return json.dumps({"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]})


def file_of(header: str, data: int) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + bytes(data)


def header_of(**entries: str) -> str:
    return "{" + ", ".join(f'"{name}": {text}' for name, text in entries.items()) + "}"


GOOD = {
    "two tensors": file_of(header_of(a=entry(0, 8), b=entry(8, 16)), 16),
    "an empty tensor": file_of(header_of(a=entry(0, 8), b=entry(8, 8, shape=(0,))), 8),
    "a scalar": file_of(header_of(a=entry(0, 4, shape=())), 4),
    "the table in another order than the data": file_of(header_of(b=entry(8, 16), a=entry(0, 8)), 16),
    "notes": file_of('{"__metadata__": {"format": "pt"}, "a": ' + entry(0, 8) + "}", 8),
    "padding behind the table": file_of(header_of(a=entry(0, 8)) + "   ", 8),
}
BAD = {
    "a name twice": file_of('{"a": ' + entry(0, 8) + ', "a": ' + entry(8, 16) + "}", 16),
    "ranges that overlap": file_of(header_of(a=entry(0, 8), b=entry(4, 12)), 12),
    "the same range twice": file_of(header_of(a=entry(0, 8), b=entry(0, 8)), 8),
    "a gap": file_of(header_of(a=entry(0, 8), b=entry(12, 20)), 20),
    "a gap at the start": file_of(header_of(a=entry(4, 12)), 12),
    "a size that is not the shape's": file_of(header_of(a=entry(0, 8, shape=(3,))), 8),
    "part of a number": file_of(header_of(a=entry(0, 7)), 7),
    "bytes that follow": file_of(header_of(a=entry(0, 8)), 12),
    "bytes that are missing": file_of(header_of(a=entry(0, 8)), 4),
    "a range that ends before it begins": file_of(header_of(a=entry(8, 0)), 8),
    "no such dtype": file_of(header_of(a=entry(0, 8, dtype="F33")), 8),
    "a negative size": file_of(header_of(a=entry(0, 8, shape=(-2,))), 8),
    "a shape beyond all numbers": file_of(header_of(a=entry(0, 8, shape=(2**62, 2**62))), 8),
    "offsets as texts": file_of('{"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}', 8),
    "offsets as fractions": file_of('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.5]}}', 8),
    "a key that nobody knows": file_of('{"a": {"dtype": "F32", "shape": [2]}}', 8),
    "notes that are no texts": file_of('{"__metadata__": {"format": 1}, "a": ' + entry(0, 8) + "}", 8),
    "no table": file_of("[]", 0),
    "an empty file": b"",
    "half a length": b"\0\0\0",
    "a table that is cut": file_of(header_of(a=entry(0, 8)), 8)[:20],
}


def theirs(content: bytes, path: Path) -> Any:
    """What safetensors reads, in both of its ways."""
    read = dict(deserialize(content))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(read)
    return read


@pytest.mark.parametrize("kind", GOOD)
def test_what_safetensors_takes_is_taken(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD[kind])
    read, shard = theirs(GOOD[kind], path), read_shard(path, path.name)
    assert {name: (list(info.shape), info.dtype, info.nbytes) for name, info in shard.tensors.items()} == {
        name: (info["shape"], info["dtype"], len(info["data"])) for name, info in read.items()
    }


@pytest.mark.parametrize("kind", BAD)
def test_what_safetensors_refuses_is_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD[kind])
    with pytest.raises(SafetensorError):
        theirs(BAD[kind], path)
    with pytest.raises(CheckpointError) as caught:
        read_shard(path, path.name)
    said = str(caught.value)
    assert str(path) in said
    assert "\n" not in said


def test_a_name_that_stands_twice_is_refused_even_where_safetensors_takes_the_last(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of('{"a": ' + entry(0, 8) + ', "a": ' + entry(0, 8) + "}", 8))
    with pytest.raises(CheckpointError, match="twice"):
        read_shard(path, path.name)


def test_bytes_lie_where_it_says(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.arange(4, dtype=torch.int64)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors))
    for name, info in read_shard(path, path.name).tensors.items():
        data = path.read_bytes()[info.start : info.start + info.nbytes]
        assert data == tensors[name].numpy().tobytes()
