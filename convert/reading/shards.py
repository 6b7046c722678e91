"""Safetensors files read by their headers alone: 8 bytes of length, a JSON table of tensors, and data left alone.

`safetensors.safe_open` judges each file, so that nothing is streamed which it would refuse when loading. The table is
read here besides, for it does not tell where a tensor's bytes begin, which copying without loading needs, nor how many
bytes of a file are missing or too many.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...errors import CheckpointError

# The format's own limit; a longer header is no header.
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a header describes it.

    Attributes:
        dtype: safetensors' name of the type, such as `"BF16"`.
        shape: the sizes.
        nbytes: bytes of data.
        start: where in the file the data begin, which safetensors' own reader does not tell.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint.

    Attributes:
        name: the file's path relative to the checkpoint's folder.
        path: where the file lies.
        tensors: its tensors by name.
    """

    name: str
    path: Path
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, the header not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_shard(path: Path, name: str) -> Shard:
    """Read a safetensors file's header and check that the file holds all the data it promises.

    Args:
        path: the file.
        name: its path relative to the checkpoint's folder.

    Raises:
        CheckpointError: the file cannot be read, is no safetensors file, or is truncated.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(LENGTH_BYTES)
            length = struct.unpack("<Q", start)[0] if len(start) == LENGTH_BYTES else 0
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is not a safetensors file: its header would be {length} bytes long.")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(start) < LENGTH_BYTES or len(header) < length:
        raise CheckpointError(f"{path} is truncated inside its header ({size} bytes in all): download it again.")
    table = _parse(header, path)
    tensors, end = _tensors(table, path, LENGTH_BYTES + length)
    expected = LENGTH_BYTES + length + end
    if size < expected:
        raise CheckpointError(
            f"{path} is truncated: its header promises {expected} bytes and the file has {size}; download it again."
        )
    if size > expected:
        raise CheckpointError(f"{path} is damaged: {size - expected} bytes follow the data that its header lists.")
    _refuse_unusual(path)
    return Shard(name, path, tensors)


def _refuse_unusual(path: Path) -> None:
    """Refuse what safetensors itself does: gaps, overlaps, sizes that are not those of the shapes."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ").splitlines()[0]
        raise CheckpointError(f"{path} is damaged: safetensors refuses it ({reason}); download it again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _parse(header: bytes, path: Path) -> dict[str, Any]:
    try:
        table = json.loads(header, object_pairs_hook=_named_once)
    # A header nested thousands of levels deep is none that a writer of tensors makes.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is not valid JSON ({error}).") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a table of tensors.")
    return table


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # safetensors takes the last of two entries of one name, other readers the first.
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands there twice")
    return table


def _tensors(table: dict[str, Any], path: Path, start: int) -> tuple[dict[str, TensorInfo], int]:
    """The tensors of a header whose data begin at `start`, and where behind that the last of them ends."""
    tensors = {}
    last = 0
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = (int(offset) for offset in entry["data_offsets"])
            tensors[name] = TensorInfo(
                str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), end - begin, start + begin
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: its header's entry for {name!r} cannot be read.") from error
        if not 0 <= begin <= end:
            raise CheckpointError(f"{path} is damaged: the data of {name!r} ends before it begins.")
        last = max(last, end)
    return tensors, last
