"""Rewrites planned in full: those that decide by what the model does on a text are told what was measured there."""

from contextlib import nullcontext
from pathlib import Path

import torch

from ..convert.reading.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from ..convert.rewriting.moments import Moments
from ..convert.rewriting.plan import RewritePlan, plan_rewrite, write_rewritten
from ..distill.calibration import measure_moments
from ..distill.progress import Progress
from ..files.output_folder import scratch_folder
from ..recipes import CalibrateSection, Recipe


def settled_plan(
    opened: Checkpoint, recipe: Recipe, output: Path, *, device: torch.device, progress: Progress
) -> RewritePlan:
    """Plan the rewrites of a recipe, and measure the model for those that ask for it.

    What a rewrite measures is the model as the rewrites before it leave it, which is written beside the output for
    that and removed again.

    Args:
        opened: the model that the user named.
        recipe: the recipe.
        output: the folder that the run will write.
        device: where to compute.
        progress: whom to tell.

    Raises:
        PlanError: the model cannot be rewritten so.
        DataError: a text to measure on cannot be read.
    """
    steps = recipe.steps()
    # All that can be refused is refused before anything slow.
    plan = plan_rewrite(opened, steps)
    sections = [rewrite.calibration for rewrite in recipe.rewrite]
    for index, section in enumerate(sections):
        if section is None:
            continue
        with nullcontext() if index == 0 else scratch_folder(output) as folder:
            measured = opened
            if folder is not None:
                before = plan_rewrite(opened, steps[:index])
                write_rewritten(before, folder, shard_bytes=recipe.output.shard_bytes, tell=progress.phase)
                progress.end()
                measured = open_checkpoint(folder, trust_remote_code=opened.trust_remote_code)
            steps[index].settle(_measured(measured, section, device, progress))
        plan = plan_rewrite(opened, steps)
    return plan


def _measured(checkpoint: Checkpoint, section: CalibrateSection, device: torch.device, progress: Progress) -> Moments:
    tokenizer = load_tokenizer(checkpoint)
    progress.phase("Loading the model")
    # Sums are taken in float64, which Apple's GPUs do not have.
    model = load_model(checkpoint, device="cpu" if device.type == "mps" else device)
    progress.end()
    return measure_moments(model, tokenizer, section, progress)
