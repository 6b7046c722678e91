"""What the rewrites of a recipe would make of a model, from headers and configuration alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...convert.reading.checkpoint import open_checkpoint
from ...convert.reading.weight_files import weight_files
from ...convert.rewriting.plan import plan_rewrite
from ...errors import CheckpointError, PlanError
from ...recipes import Recipe


@dataclass(frozen=True)
class RewriteOutlook:
    """What becomes of a model before its attention is converted.

    Attributes:
        steps: what is done, a clause each.
        inexact: why the result does not start as the model, a clause each; empty if it is to start exactly.
        class_name: class of the result; None if it is refused.
        tensors: how many tensors the result has; None if the weights are not here.
        bytes_before: bytes of the model's tensors; None if they are not here.
        bytes_after: bytes of the result's.
        teacher_bytes: bytes of the model as a teacher beside the result while that is healed; None if it is none, or
            the weights are not here.
        refused: why the model cannot be rewritten so; None if it can.
    """

    steps: tuple[str, ...]
    inexact: tuple[str, ...] = ()
    class_name: str | None = None
    tensors: int | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    teacher_bytes: int | None = None
    refused: str | None = None


def foresee(
    source: str, folder: Path, config: Mapping[str, Any], recipe: Recipe, *, trust_remote_code: bool = False
) -> tuple[RewriteOutlook, Mapping[str, Any]]:
    """Plan the rewrites of a recipe; of weights that are not on this machine nothing is downloaded.

    Args:
        source: the model as it was named.
        folder: its local folder.
        config: its config.json.
        recipe: a recipe with rewrites.
        trust_remote_code: whether a model that brings its own code may run it.

    Returns:
        what they make of it, and the config.json of the result: that of the model if it is refused.
    """
    steps = recipe.steps()
    sizes: dict[str, Any] = {}
    numbers = None
    after = config
    try:
        if all((folder / name).is_file() for name in weight_files(folder)):
            checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
            plan = plan_rewrite(checkpoint, steps)
            after = plan.config
            numbers = sum(tensor.numbers for tensor in plan.states[0].tensors.values())
            sizes = {
                "tensors": len(plan.targets),
                "bytes_before": checkpoint.nbytes,
                "bytes_after": sum(target.nbytes for target in plan.targets),
            }
        else:
            for step in steps:
                step.check(after)
                after = step.config(after)
    except (CheckpointError, PlanError) as error:
        return RewriteOutlook(tuple(step.summary for step in steps), refused=str(error)), config
    inexact = tuple(step.inexact for step in steps if step.inexact is not None)
    learning = [stage.precision for stage in recipe.stages if stage.has_teacher]
    teacher_bytes = None
    differs = bool(inexact) or any(rewrite.needs_method for rewrite in recipe.rewrite)
    if differs and learning and numbers is not None:
        teacher_bytes = numbers * (4 if "fp32" in learning else 2)
    return (
        RewriteOutlook(
            steps=tuple(step.summary for step in steps),
            inexact=inexact,
            class_name=(after.get("architectures") or [None])[0],
            teacher_bytes=teacher_bytes,
            **sizes,
        ),
        after,
    )
