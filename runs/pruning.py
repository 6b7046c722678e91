"""Heads that a recipe leaves out: what that needs is checked before anything slow, and they go before the saving."""

from dataclasses import replace

from transformers import PreTrainedModel

from ..convert.planning.plan import Plan
from ..convert.surgery.pruned_heads import check_prunable, prune_plan, take_heads_out
from ..distill.run import Run
from ..errors import PlanError
from ..recipes import Recipe


def check_observed(plan: Plan, recipe: Recipe) -> None:
    """Insist that a recipe that leaves heads out observes which, and puts its updates into the weights.

    Args:
        plan: what is converted how.
        recipe: the recipe.

    Raises:
        PlanError: it does not.
    """
    pruned = prune_plan(plan)
    if pruned == plan:
        return
    wide, narrow = next(pair for pair in zip(plan.entries, pruned.entries, strict=True) if pair[0] != pair[1])
    leaves = f"{wide.method!r} is to keep {narrow.geometry.num_kv_heads} of {wide.geometry.num_kv_heads} KV heads"
    if not any(stage.kind == "calibrate" for stage in recipe.stages):
        raise PlanError(f"{leaves}, and no stage observes which are used: begin the stages with {{kind: calibrate}}")
    if not recipe.output.merge_lora:
        raise PlanError(f"{leaves}, which changes the weights that updates are for: set output.merge_lora to true")


def check_model(run: Run, model: PreTrainedModel) -> None:
    """Insist that the heads that a run will leave out can be taken out of its model.

    Raises:
        PlanError: a layer's projections are of another kind.
    """
    check_prunable(model, prune_plan(run.plan))


def without_unused_heads(run: Run, model: PreTrainedModel) -> Run:
    """Take the heads that the methods of a healed model leave out of it, in place.

    Args:
        run: the run.
        model: its healed model, without adapters.

    Returns:
        the run with the plan of what is left.
    """
    plan = prune_plan(run.plan)
    if plan == run.plan:
        return run
    take_heads_out(model, plan)
    return replace(run, plan=plan)
