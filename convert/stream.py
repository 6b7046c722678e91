"""Conversions without training, made on disk: the base's shards are copied, and what is new goes beside them."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .companions import copy_companions
from .copying import copy_files
from .inside import inside
from .jsonfiles import write_json
from .plan import Plan
from .save import mark_config, write_marked
from .weights import INDEX_FILE

Digests = dict[str, str]
"""The digest of each base shard by name."""


@contextmanager
def copying_shards(checkpoint: Checkpoint, folder: Path, *, link: bool | None = None) -> Iterator["Future[Digests]"]:
    """Copy a checkpoint's shards into a folder in the background, while the plan is still being made.

    Args:
        checkpoint: a safetensors checkpoint.
        folder: an empty folder, such as the one that `atomic_folder` gives.
        link: share the base's files (hard links) instead of copying them. That takes no time and no room, but whoever
            later changes one of them in place, as safetensors before 0.8 does when it saves, changes both models. The
            default shares only what nobody changes: the blobs of the Hub's cache.

    Yields:
        What to give to `stream_convert`; leaving the block without having done so stops the copying.

    Raises:
        CheckpointError: the checkpoint is a GGUF file.
    """
    if checkpoint.gguf_file is not None:
        raise CheckpointError(f"{checkpoint.source} is a GGUF file, which has to be loaded to be converted.")
    stop = Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            yield pool.submit(_copy_shards, checkpoint, folder, link, stop)
        finally:
            stop.set()


def stream_convert(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    *,
    link: bool | None = None,
    shards: "Future[Digests] | None" = None,
) -> Digests:
    """Write a converted checkpoint without building the model or reading a tensor of it.

    Time is that of copying the files, memory that of the new tensors. These go into one more shard, for which the
    base's shards are renamed; where a plan adds none, the base's names stay.

    New tensors are named after the modules of the model class. transformers finds them even where the base's own
    tensors have other names (without the base model's prefix, or from before a renaming).

    Args:
        checkpoint: a safetensors checkpoint.
        plan: what is converted.
        folder: an empty folder, such as the one that `atomic_folder` gives.
        link: see `copying_shards`.
        shards: what `copying_shards` gave for this folder; the default copies now.

    Returns:
        The digest of each base shard by name.

    Raises:
        CheckpointError: the checkpoint is a GGUF file, or holds a tensor under a new tensor's name.
    """
    if shards is None:
        with copying_shards(checkpoint, folder, link=link) as shards:
            return stream_convert(checkpoint, plan, folder, shards=shards)
    new = {name: tensor.contiguous() for name, tensor in plan.new_tensors()}
    clash = sorted(new.keys() & checkpoint.weight_map.keys())
    if clash:
        raise CheckpointError(f"{checkpoint.source} holds a tensor named {clash[0]!r} already.")
    config = {**checkpoint.config_dict, "architectures": [checkpoint.architecture]}
    write_marked(folder, mark_config(config, plan))
    copy_companions(checkpoint.path, checkpoint.companions, folder)
    names = {shard.name: shard.name for shard in checkpoint.shards}
    if new:
        count = len(names) + 1
        names = {name: _shard_name(index, count) for index, name in enumerate(names, start=1)}
        save_file(new, folder / _shard_name(count, count), metadata={"format": "pt"})
    weight_map = {tensor: names[name] for tensor, name in checkpoint.weight_map.items()}
    weight_map |= dict.fromkeys(new, _shard_name(len(names) + 1, len(names) + 1))
    if len(names) > 1 or new:
        write_json(folder / INDEX_FILE, {"metadata": _totals(checkpoint, new), "weight_map": weight_map})
    digests = shards.result()
    for index, name in enumerate(names.values()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _waiting(folder, index).rename(folder / name)
    return digests


def _copy_shards(checkpoint: Checkpoint, folder: Path, link: bool | None, stop: Event) -> Digests:
    paths = {shard.name: inside(checkpoint.path, shard.name) for shard in checkpoint.shards}
    if link is None:
        # What lies outside the folder is a blob of the cache, or it would have been refused.
        link = not any(path.is_relative_to(checkpoint.path) for path in paths.values())
    pairs = [(path, _waiting(folder, index)) for index, path in enumerate(paths.values())]
    digests = copy_files(pairs, link=link, stop=stop)
    return {name: digests[path] for name, path in paths.items()}


def _waiting(folder: Path, index: int) -> Path:
    """Where a shard's copy lies until the number of shards is known."""
    return folder / f"shard-{index}.copy"


def _totals(checkpoint: Checkpoint, new: dict[str, Tensor]) -> dict[str, int]:
    return {"total_size": checkpoint.nbytes + sum(tensor.nbytes for tensor in new.values())}


def _shard_name(index: int, count: int) -> str:
    return f"model-{index:05}-of-{count:05}.safetensors"
