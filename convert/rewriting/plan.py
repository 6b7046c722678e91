"""A rewrite planned as a whole, before anything is written, and carried out."""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

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

OF_LAYER = re.compile(r"(?:[^.]+\.)*?(?:layers|layer|blocks|h)\.(\d+)\.(.+)")


def layer_of(name: str) -> tuple[int, str] | None:
    """The place of the layer that a tensor belongs to, and what it is called in it; None if it is in no layer."""
    found = OF_LAYER.fullmatch(name)
    return None if found is None else (int(found[1]), found[2])


@dataclass(frozen=True)
class State:
    """A model between two steps.

    Attributes:
        tensors: its tensors by name.
        config: its config.json.
    """

    tensors: Mapping[str, Target] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)

    def key(self, name: str) -> str:
        """What its configuration calls a setting that most classes call `name`."""
        kind = str(self.config.get("model_type"))
        known: Mapping[str, str] = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
        return known.get(name, name)

    @property
    def num_layers(self) -> int | None:
        """How many layers it has, None if nobody says."""
        return self._count("num_hidden_layers")

    @property
    def num_words(self) -> int | None:
        """How large its vocabulary is, None if nobody says."""
        return self._count("vocab_size")

    def _count(self, name: str) -> int | None:
        found, kind = self.config.get(self.key(name)), str(self.config.get("model_type"))
        if found is None and kind in CONFIG_MAPPING:
            found = getattr(CONFIG_MAPPING[kind](), name, None)
        return found if isinstance(found, int) else None


@dataclass(frozen=True)
class RewritePlan:
    """What becomes of every tensor of a checkpoint.

    Attributes:
        checkpoint: what is rewritten.
        steps: what is done to it, in order.
        states: the model before the first step, and after each.
    """

    checkpoint: Checkpoint = field(repr=False)
    steps: tuple[Step, ...] = field(repr=False)
    states: tuple[State, ...] = field(repr=False)

    @property
    def summaries(self) -> tuple[str, ...]:
        """What each step does, a clause each."""
        return tuple(step.summary for step in self.steps)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The tensors of the result."""
        return tuple(self.states[-1].tensors.values())

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.json of the result."""
        return self.states[-1].config

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
    states = [State(stored_tensors(checkpoint), dict(checkpoint.config_dict))]
    for step in steps:
        step.begin(checkpoint)
        before = states[-1]
        step.check(before.config)
        states.append(State(_rewritten(step, before.tensors), step.config(before.config)))
    return RewritePlan(checkpoint, tuple(steps), tuple(states))


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
        the digest of each source file by name, and behind `NAME:` of each file of the further checkpoint NAME.

    Raises:
        CheckpointError: a source file changed while it was read.
        PlanError: a tensor cannot be made.
    """
    checkpoint = plan.checkpoint
    if tell is not None:
        tell(f"Rewriting: {', '.join(plan.summaries)}")
    files = {shard.name: inside(checkpoint.path, shard.name) for shard in checkpoint.shards}
    for step in plan.steps:
        for name, source in step.sources.items():
            files |= {f"{name}:{shard.name}": inside(source.path, shard.name) for shard in source.shards}
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
