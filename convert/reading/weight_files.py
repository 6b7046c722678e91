"""The weight files of a model folder: which they are, that they lie inside it, and that they are whole."""

from pathlib import Path

import torch

from ...errors import CheckpointError
from ...files.containment import inside, is_relative
from ...files.json_files import read_json
from .shards import Shard, read_shard
from .sources import PICKLE_ADVICE, PICKLES

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' names of the types that computing is done in."""


def weight_files(folder: Path) -> tuple[str, ...]:
    """Names of the files that hold a folder's weights; they need not be there yet.

    A single `model.safetensors` comes before an index, as in transformers.

    Raises:
        CheckpointError: the index is damaged or names a file outside the folder.
    """
    if (folder / SINGLE_FILE).exists() or not (folder / INDEX_FILE).exists():
        return (SINGLE_FILE,)
    weight_map = _index(folder)
    names = sorted(set(weight_map.values()))
    for name in names:
        if not is_relative(name):
            raise CheckpointError(f"{folder / INDEX_FILE} names {name!r}, which lies outside the folder.")
    return tuple(names)


def read_weights(folder: Path, names: tuple[str, ...]) -> tuple[Shard, ...]:
    """Read the headers of a folder's weight files, and of nothing else.

    Raises:
        CheckpointError: a file is missing, truncated, outside the folder, or lacks a tensor that the index promises;
            or there are no safetensors at all.
    """
    if names == (SINGLE_FILE,) and not (folder / SINGLE_FILE).exists():
        _refuse_no_weights(folder)
    shards = []
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not complete: the shard {name} named by {INDEX_FILE} is missing.")
        shards.append(read_shard(inside(folder, name), name))
    if names != (SINGLE_FILE,):
        _check_index(folder, shards)
    return tuple(shards)


def is_new_tensor(name: str) -> bool:
    """Whether a conversion made the tensor: a parameter of a core, or the mark."""
    return "attnconv" in name.split(".")


def float_type(shards: tuple[Shard, ...]) -> torch.dtype | None:
    """The floating type that most bytes of the weights have, None if they have none (quantised weights)."""
    counts = dict.fromkeys(FLOAT_TYPES, 0)
    for shard in shards:
        for tensor in shard.tensors.values():
            if tensor.dtype in counts:
                counts[tensor.dtype] += tensor.nbytes
    most = max(counts, key=lambda name: counts[name])
    return FLOAT_TYPES[most] if counts[most] else None


def _index(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX_FILE} is damaged: its 'weight_map' does not name a file per tensor.")
    return weight_map


def _check_index(folder: Path, shards: list[Shard]) -> None:
    tensors = {shard.name: shard.tensors for shard in shards}
    for tensor, name in _index(folder).items():
        if tensor not in tensors[name]:
            raise CheckpointError(f"{folder / name} does not hold the tensor {tensor!r} that {INDEX_FILE} promises.")


def _refuse_no_weights(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run any code when opened: "
            f"{PICKLE_ADVICE}."
        )
    raise CheckpointError(f"{folder} holds no weights: there is neither {SINGLE_FILE} nor {INDEX_FILE}.")
