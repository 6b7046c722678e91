"""A checkpoint rewritten from Python, by steps instead of a recipe."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ...files.output_folder import atomic_folder, check_output
from ..planning.plan import Plan
from ..reading.checkpoint import Checkpoint, open_checkpoint
from ..writing.receipt import make_receipt, write_receipt
from .exactness import Exactness, check_exactness
from .plan import plan_rewrite, write_rewritten
from .steps import Step

SHARD_BYTES = 5_000_000_000


def rewrite_checkpoint(
    source: str | Path | Checkpoint,
    steps: Sequence[Step],
    output: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    allow_inexact: bool = False,
    text: Tensor | None = None,
) -> Exactness:
    """Rewrite a model into a folder, which is an ordinary model that transformers alone loads.

        rewrite_checkpoint("org/model", [Experts(num_experts=8, active=2)], "out")

    Args:
        source: a folder, a Hub id, or an opened checkpoint.
        steps: what to do to it, in order.
        output: the folder to write; it appears when all is done.
        shard_bytes: data of one weight file at most.
        overwrite: replace an earlier result.
        allow_inexact: write a result that is not what its steps promised.
        text: `[tokens]` int64, a text on which source and result are compared whole; None compares cut ones.

    Returns:
        how far the result is from the model at the start.

    Raises:
        CheckpointError: the model cannot be read.
        PlanError: it cannot be rewritten so, or the result would not be what a step promises.
        OutputError: the output cannot be written.
    """
    opened = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    check_output(output, overwrite=overwrite)
    plan = plan_rewrite(opened, steps)
    exactness = check_exactness(plan, allow_inexact=allow_inexact, text=text)
    with atomic_folder(output, overwrite=overwrite) as folder:
        digests = write_rewritten(plan, folder, shard_bytes=shard_bytes)
        open_checkpoint(folder, trust_remote_code=opened.trust_remote_code)
        done = Plan((), plan.summaries)
        write_receipt(folder, make_receipt(opened, done, inputs=digests, exactness=exactness.to_dict()))
    return exactness
