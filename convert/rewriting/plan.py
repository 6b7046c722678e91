"""A rewrite planned as a whole, before anything is written, and carried out."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, PlanError
from ...files.containment import inside
from ...files.digests import digest_files
from ...files.json_files import write_json
from ...files.own_files import CONFIG_FILE
from ..reading.checkpoint import Checkpoint
from ..writing.companion_files import copy_companions
from .steps import Step
from .tensors import Target, stored_tensors
from .writer import write_targets


@dataclass(frozen=True)
class RewritePlan:
    """What becomes of every tensor of a checkpoint.

    Attributes:
        checkpoint: what is rewritten.
        summaries: what each step does, a clause each.
        targets: the tensors of the result.
        config: its config.json.
    """

    checkpoint: Checkpoint = field(repr=False)
    summaries: tuple[str, ...]
    targets: tuple[Target, ...] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(target.nbytes for target in self.targets)


def plan_rewrite(checkpoint: Checkpoint, steps: Sequence[Step]) -> RewritePlan:
    """Plan a rewrite; only headers have been read.

    Args:
        checkpoint: an opened checkpoint.
        steps: what to do, in order; each works on what the one before gives.

    Raises:
        PlanError: a step cannot rewrite this model, loses one of its tensors, or the checkpoint is a GGUF file.
    """
    if checkpoint.gguf_file is not None:
        raise PlanError(f"{checkpoint.source} is a GGUF file, which no rewrite can read: give the model's safetensors")
    tensors = stored_tensors(checkpoint)
    config = dict(checkpoint.config_dict)
    for step in steps:
        step.check(config)
        tensors = _rewritten(step, tensors)
        config = step.config(config)
    return RewritePlan(checkpoint, tuple(step.summary for step in steps), tuple(tensors.values()), config)


def _rewritten(step: Step, tensors: Mapping[str, Target]) -> dict[str, Target]:
    """All tensors after a step: those it makes, and those it leaves alone."""
    claimed = {name: tensor for name, tensor in tensors.items() if step.claims(tensor)}
    made: dict[str, Target] = {}
    for target in step.rewrite(claimed):
        if target.name in made or (target.name in tensors and target.name not in claimed):
            raise PlanError(f"{step.summary}: two tensors would be named {target.name!r}")
        made[target.name] = target
    used = {source for target in made.values() for source in target.of}
    lost = [name for name, tensor in claimed.items() if not used.issuperset(tensor.of) and not step.drops(name)]
    if lost:
        raise PlanError(f"{step.summary}: nothing is made of the tensor {lost[0]!r} (of {len(lost)} in all)")
    # What takes a tensor's place stands where that stood, so that the result's files are read in the source's order.
    result: dict[str, Target] = {}
    for name, tensor in tensors.items():
        if name not in claimed:
            result[name] = tensor
        elif name in made:
            result[name] = made[name]
    return {**result, **made}


def write_rewritten(
    plan: RewritePlan, folder: Path, *, shard_bytes: int, tell: Callable[[str], None] | None = None
) -> dict[str, str]:
    """Write a rewritten checkpoint with everything its source brought along besides weights.

    A tensor is in memory at a time, or a piece of one, whatever the size of the model.

    Args:
        plan: what to write.
        folder: an empty folder, such as the one that `atomic_folder` gives.
        shard_bytes: data of one weight file at most.
        tell: told of what goes on.

    Returns:
        The digest of each source file by name.

    Raises:
        CheckpointError: a source file changed while it was read.
        PlanError: a tensor cannot be made.
    """
    checkpoint = plan.checkpoint
    if tell is not None:
        tell(f"Rewriting: {', '.join(plan.summaries)}")
    files = {shard.name: inside(checkpoint.path, shard.name) for shard in checkpoint.shards}
    with ThreadPoolExecutor(max_workers=1) as pool:
        digests = pool.submit(digest_files, files)
        write_targets(plan.targets, folder, shard_bytes=shard_bytes)
        read = digests.result()
    changed = read.changed()
    if changed:
        raise CheckpointError(f"{changed[0]} was changed while it was being rewritten: run the conversion again")
    copy_companions(checkpoint.path, checkpoint.companions, folder)
    write_json(folder / CONFIG_FILE, plan.config)
    return dict(read.digests)
