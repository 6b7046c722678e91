"""Conversions without training, made on disk: the base's shards are taken over, what is new goes beside them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointError
from ...files.containment import inside
from ...files.fast_copy import copy_files
from ...files.json_files import write_json
from ..planning.plan import Plan
from ..reading.checkpoint import Checkpoint
from ..reading.links import note_file
from ..reading.weight_files import INDEX_FILE
from .companion_files import copy_companions
from .save import mark_config, write_marked
from .weight_mark import MARK_NAME, marks, shard_name


@dataclass(frozen=True)
class Streamed:
    """What was taken over.

    Attributes:
        digests: the digest of each of the base's shards by name.
        links: size, time and digest of each file that is shared with the base, by its name in the conversion.
    """

    digests: dict[str, str]
    links: dict[str, dict[str, Any]]


def stream_convert(checkpoint: Checkpoint, plan: Plan, folder: Path, *, link: bool = True) -> Streamed:
    """Write a converted checkpoint without building the model or reading a tensor of it.

    New tensors, and the mark by which transformers without attnconv refuses the weights, go into one more shard, for
    which the base's shards are renamed. New tensors are named after the modules of the model class: transformers finds
    them even where the base's own tensors have other names (without the base model's prefix, or from before a
    renaming).

    Where the file system can share blocks until one side changes, files are copied so. Elsewhere, with `link`, the
    base's files get a second name in the output, which takes no time and no room either; deleting either folder leaves
    the other whole. But whoever writes into such a file in place, instead of putting a new one in its stead as
    safetensors from 0.8 on and the Hub's client do, changes both models, which `reading.links` notices.

    Args:
        checkpoint: a safetensors checkpoint.
        plan: what is converted.
        folder: an empty folder, such as the one that `atomic_folder` gives.
        link: share the base's files where the file system can; else, and everywhere with False, copy them.

    Raises:
        CheckpointError: the checkpoint is a GGUF file, or holds a tensor under a new tensor's name.
    """
    if checkpoint.gguf_file is not None:
        raise CheckpointError(f"{checkpoint.source} is a GGUF file, which has to be loaded to be converted.")
    new = {name: tensor.contiguous() for name, tensor in plan.new_tensors()}
    clash = sorted(new.keys() & checkpoint.weight_map.keys())
    if clash:
        raise CheckpointError(f"{checkpoint.source} holds a tensor named {clash[0]!r} already.")
    count = len(checkpoint.shards) + 1
    names = {shard.name: shard_name(index, count) for index, shard in enumerate(checkpoint.shards, start=1)}
    weight_map = {tensor: names[name] for tensor, name in checkpoint.weight_map.items()}
    weight_map |= dict.fromkeys([*new, MARK_NAME], last := shard_name(count, count))
    save_file({**new, **marks(plan, checkpoint.weight_map)}, folder / last, metadata={"format": "pt"})
    write_json(folder / INDEX_FILE, {"metadata": _totals(checkpoint, new), "weight_map": weight_map})
    config = {**checkpoint.config_dict, "architectures": [checkpoint.architecture]}
    write_marked(folder, mark_config(config, plan))
    copy_companions(checkpoint.path, checkpoint.companions, folder)
    paths = {name: inside(checkpoint.path, name) for name in names}
    for name in names.values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    # Before the digests are taken: what changes meanwhile has another time than this.
    noted = {name: note_file(path) for name, path in paths.items()}
    digests = copy_files([(paths[name], folder / new_name) for name, new_name in names.items()], link=link)
    shared = [name for name, path in paths.items() if path.samefile(folder / names[name])]
    links = {names[name]: {**noted[name], "digest": digests[paths[name]]} for name in shared}
    return Streamed({name: digests[path] for name, path in paths.items()}, links)


def _totals(checkpoint: Checkpoint, new: dict[str, Tensor]) -> dict[str, int]:
    return {"total_size": checkpoint.nbytes + sum(tensor.nbytes for tensor in new.values())}
