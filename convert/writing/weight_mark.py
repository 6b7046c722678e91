"""A mark in the weights of a converted model that refuses to load where attnconv is not at work.

config.json can lose its sentinel: whoever reads and writes it with transformers keeps the section and drops
`attn_implementation`, or names another implementation while loading. The last shard of a conversion therefore holds,
under the name of one tensor of a converted module, an empty tensor. transformers lets later shards win over earlier
ones, finds a tensor of the wrong shape and refuses. attnconv reads the shards in the opposite order, so that the
base's own tensor, which its own shard and the index still hold, wins.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...files.json_files import read_json, write_json
from ..planning.plan import Plan
from ..reading.weight_files import INDEX_FILE, is_new_tensor, read_weights, weight_files

MARK_NAME = "attnconv.mark"
"""The name under which the index lists the last shard, which need not hold any other tensor of the model."""
MARK_PATTERN = r"^attnconv\.mark$"


def marked_tensor(plan: Plan, names: Iterable[str]) -> str:
    """The name of the tensor that the mark stands for.

    Args:
        plan: what is converted.
        names: names of the base's tensors as they are on disk, which need not be those of the modules.
    """
    present = sorted(name for name in names if not is_new_tensor(name))
    first = plan.converted[0].name
    # With the prefix of a model with a head, and without.
    places = [f"{first}.", f"{first.partition('.')[2]}."]
    for place in places:
        for name in present:
            if name.startswith(place) and name.endswith(".weight"):
                return name
    layer = next((part for part in first.split(".") if part.isdigit()), "0")
    of_layer = [name for name in present if layer in name.split(".")]
    return next((name for name in of_layer if "att" in name), next(iter(of_layer or present)))


def marks(plan: Plan, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of the mark, which have no bytes and the shape of no parameter.

    Args:
        plan: what is converted; nothing needs no mark.
        names: names of the base's tensors as they are on disk.
    """
    if not plan.converted:
        return {}
    return {MARK_NAME: torch.zeros(0), marked_tensor(plan, names): torch.zeros(0)}


def shard_name(index: int, count: int) -> str:
    """What transformers calls a shard, counted from 1."""
    return f"model-{index:05}-of-{count:05}.safetensors"


def mark_weights(folder: Path, plan: Plan) -> None:
    """Add the shard with the mark to weights that transformers has just written, whose files get other names."""
    shards = read_weights(folder, weight_files(folder))
    index = read_json(folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else {}
    count = len(shards) + 1
    weight_map: dict[str, str] = {}
    # Into names that are free, then into their own: a new name may be another shard's old one.
    for number, shard in enumerate(shards, start=1):
        shard.path.rename(folder / f"{shard_name(number, count)}.new")
        weight_map |= dict.fromkeys(shard.tensors, shard_name(number, count))
    for name in set(weight_map.values()):
        (folder / f"{name}.new").rename(folder / name)
    last = shard_name(count, count)
    save_file(marks(plan, weight_map), folder / last, metadata={"format": "pt"})
    metadata = index.get("metadata") or {"total_size": sum(shard.nbytes for shard in shards)}
    write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map | {MARK_NAME: last}})


def true_tensors_last(files: Sequence[str]) -> list[str]:
    """Shards in the order in which the mark comes before the tensor that it stands for."""
    return sorted(files, key=os.path.basename, reverse=True)
