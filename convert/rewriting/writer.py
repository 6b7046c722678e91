"""Safetensors files written from planned tensors: headers first, then one tensor, or a piece of one, at a time."""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...files.fast_copy import NO_KERNEL_COPY
from ...files.json_files import write_json
from ..reading.weight_files import INDEX_FILE, SINGLE_FILE
from ..writing.weight_mark import shard_name
from .tensors import TORCH_TYPES, Stored, Target

ALIGNMENT = 8
"""Data begin at a multiple of this, as safetensors' own writer has it."""
COPY_BYTES = 1 << 26


def write_targets(targets: Iterable[Target], folder: Path, *, shard_bytes: int) -> dict[str, str]:
    """Write tensors into shards, with an index if there are several.

    Args:
        targets: the tensors; a shard takes as many as fit, in this order.
        folder: an empty folder, such as the one that `atomic_folder` gives.
        shard_bytes: data of a shard at most; a tensor that is larger has a shard of its own.

    Returns:
        the file of each tensor.

    Raises:
        CheckpointError: two tensors have one name, a source ended early, or a tensor cannot be made.
    """
    shards = _shards(targets, shard_bytes)
    names = [SINGLE_FILE] if len(shards) == 1 else [shard_name(i + 1, len(shards)) for i in range(len(shards))]
    weight_map: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        weight_map |= {target.name: name for target in shard}
        _write_shard(shard, folder / name)
    if len(shards) > 1:
        total = sum(target.nbytes for shard in shards for target in shard)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return weight_map


def _shards(targets: Iterable[Target], shard_bytes: int) -> list[list[Target]]:
    shards: list[list[Target]] = [[]]
    size, seen = 0, set[str]()
    for target in targets:
        if target.name in seen:
            raise CheckpointError(f"The rewritten model would hold two tensors named {target.name!r}")
        seen.add(target.name)
        if shards[-1] and size + target.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size += target.nbytes
    return shards


def _write_shard(targets: list[Target], path: Path) -> None:
    # Wide types first, as safetensors' own writer has it, so that each tensor lies at a multiple of its item's size.
    ordered = sorted(targets, key=lambda target: -_itemsize(target))
    with path.open("xb", buffering=0) as out:
        out.write(_header(ordered))
        for target in ordered:
            if isinstance(target.content, Stored):
                _copy(target.content, target.nbytes, out)
            else:
                _make(target, out)


def _header(targets: list[Target]) -> bytes:
    table: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for target in targets:
        offsets = [offset, offset + target.nbytes]
        table[target.name] = {"dtype": target.dtype, "shape": list(target.shape), "data_offsets": offsets}
        offset += target.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _itemsize(target: Target) -> int:
    return target.nbytes // target.numbers if target.numbers else 0


def _make(target: Target, out: BinaryIO) -> None:
    dtype = TORCH_TYPES[target.dtype]
    for start, stop in target.content.pieces(target.numbers, dtype.itemsize):
        piece = target.content.read(start, stop)
        if piece.dtype != dtype or piece.numel() != stop - start:
            # A defect of a rewrite, never of a model.
            raise CheckpointError(
                f"{target.name!r} was to become {stop - start} numbers of {dtype} and became {piece.numel()} of "
                f"{piece.dtype}"
            )
        _write_all(_bytes_of(piece), out)


def _bytes_of(piece: Tensor) -> memoryview:
    numbers: Any = piece.contiguous().view(-1).view(torch.uint8).numpy() if piece.numel() else b""
    return memoryview(numbers)


def _write_all(data: memoryview, out: BinaryIO) -> None:
    done = 0
    while done < len(data):
        done += out.write(data[done:])


def _copy(stored: Stored, nbytes: int, out: BinaryIO) -> None:
    """Copy a tensor's bytes, inside the kernel where it can."""
    with stored.path.open("rb", buffering=0) as source:
        copied = _copy_in_kernel(source, stored.start, nbytes, out)
        source.seek(stored.start + copied)
        while copied < nbytes:
            data = source.read(min(COPY_BYTES, nbytes - copied))
            if not data:
                raise CheckpointError(f"{stored.path} ended early while it was being read: run the conversion again")
            _write_all(memoryview(data), out)
            copied += len(data)


def _copy_in_kernel(source: BinaryIO, start: int, nbytes: int, out: BinaryIO) -> int:
    copied = 0
    if hasattr(os, "copy_file_range"):
        try:
            while copied < nbytes and (
                count := os.copy_file_range(source.fileno(), out.fileno(), nbytes - copied, start + copied)
            ):
                copied += count
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
    return copied
