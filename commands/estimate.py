"""What `inspect --estimate` prints: a row for each stage, and what of it was measured."""

from typing import TYPE_CHECKING

from ..formats import count, duration, size
from .tables import make_console, make_table

if TYPE_CHECKING:
    from ..runs.estimate import Estimate


def show_estimate(found: "Estimate") -> None:
    """Memory and time of each stage, disk, and where each figure comes from."""
    console = make_console()
    memory = ["weights", "teacher", "training", "activations", "peak of a step"]
    table = make_table(["stage", ">tokens", *(f">{name}" for name in memory), ">step", ">time"])
    for place, stage in enumerate(found.stages, 1):
        table.add_row(
            f"{place}: {stage.reads.kind}",
            count(stage.reads.tokens),
            *(size(part) for part in (stage.weights_bytes, stage.teacher_bytes, stage.training_bytes)),
            f"~{size(stage.activation_bytes)}",
            "" if stage.peak_bytes is None else size(stage.peak_bytes),
            ", ".join(duration(seconds) for seconds in dict.fromkeys(stage.step_seconds)),
            "" if stage.seconds is None else duration(stage.seconds),
        )
    if found.stages:
        console.print(f"\nhealing on {found.device}:")
        console.print(table)
    console.print(f"disk: {size(found.result_bytes)} for the result, at most {size(found.work_bytes)} of work files")
    if found.not_measured is not None:
        console.print(f"measured: nothing, for {found.not_measured}; everything here is computed from sizes")
        return
    console.print(
        "measured: single steps of this model on the recipe's data, whose peak comes on top of weights and teacher; "
        f"{duration(found.seconds)} for all steps of that kind"
    )
    console.print(
        "computed: all other memory, activations roughly, and the disk; loading, perplexity and saving are not timed"
    )
