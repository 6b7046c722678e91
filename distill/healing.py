"""All stages of a recipe on one model, from wherever an earlier run left them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ..convert.reading.checkpoint import load_model
from ..convert.surgery.swap import apply_plan
from ..formats import size
from ..recipes import Recipe, StageBase, TrainingStage
from .data import TokenStream
from .fit import Fit, run_fit
from .health import warn_if_worse
from .images import ImageStream, unit_of
from .measuring import measure, measure_distance, measure_path_use, measure_positions
from .metrics import MetricsFile
from .objective import Objective
from .packing import Position
from .run import Run
from .targets import find_targets
from .trainee import Trainee
from .training import StageJob, run_stage, stage_name
from .work_folder import StageState, fingerprint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def heal(run: Run, prepare: Callable[[PreTrainedModel], None]) -> Trainee:
    """Run the recipe's stages, or those that are left, and measure before and after each.

    What was measured is kept in the run's work folder.

    Args:
        run: the run.
        prepare: called with the converted model before anything of it is trained.

    Returns:
        the healed model with its adapters.

    Raises:
        TrainingError: a stage cannot be run on this model, or its loss is not finite.
    """
    snapshot = run.work.latest()
    state = StageState(0) if snapshot is None else snapshot.state
    if run.team.leads:
        MetricsFile(run.work.metrics).cut(state.stage, state.step)
    stages = run.recipe.stages
    trainee = _fresh_trainee(run, stages[state.stage])
    for stage in stages:
        if stage.adapter is not None:
            find_targets(trainee.model, stage.adapter)
    prepare(trainee.model)
    if snapshot is not None:
        open_trained(run, trainee, state.stage + 1)
        trainee.load_trained(snapshot.trained)
    for index in range(state.stage, len(stages)):
        stage = stages[index]
        trainee = in_precision(run, trainee, index)
        stream = run.stream(stage)
        if state.stage != index:
            state = StageState(index, position=_position(run, stream))
        open_trained(run, trainee, index + 1)
        moments = snapshot.optimizer if snapshot is not None and snapshot.state.stage == index else {}
        state = _run(run, trainee, stage, stream, state, moments)
        run.record(_section_key(stream), asdict(state.position))
        label = stage_label(run.recipe, index)
        run.record(f"training/{label}", _training_figures(run, stage, state, unit_of(stream)))
        measure(run, trainee.model, label)
        warn_if_worse(run.measured, stage_label(run.recipe, index - 1) if index else run.start, label)
        if stage.measures_layers:
            measure_distance(run, trainee, label)
    last = stage_label(run.recipe, len(stages) - 1)
    measure_path_use(run, trainee.model, last)
    measure_positions(run, trainee.model, last)
    return trainee


def stage_label(recipe: Recipe, index: int) -> str:
    """What a stage is called in tables: its kind, and its number where it is not the only one of its kind."""
    kinds = [stage.kind for stage in recipe.stages]
    return kinds[index] if kinds.count(kinds[index]) == 1 else f"{kinds[index]} {index + 1}"


def load_converted(run: Run, dtype: torch.dtype, *, first_time: bool = False) -> Trainee:
    """Load the model and swap its attention, if the plan says so.

    Args:
        run: the run.
        dtype: type of its weights; those of the cores are fp32.
        first_time: measure the teacher, and the model before the swap.
    """
    if first_time and run.taught_by is not None and run.evaluation_tokens is not None:
        teacher = load_teacher(run, dtype)
        measure(run, teacher, "teacher")
        measure_positions(run, teacher, "teacher")
        # Gone before the other one comes.
        del teacher
    run.progress.phase("Loading the model")
    model = load_model(run.checkpoint, dtype=dtype, device=run.team.device)
    run.check_weights()
    run.progress.end()
    # What some rewrites make is not a model before the swap.
    if first_time and not any(rewrite.needs_method for rewrite in run.recipe.rewrite):
        measure(run, model, "rewrite" if run.differs else "teacher")
        if not run.differs:
            measure_positions(run, model, "teacher")
    if run.plan.converted:
        with seeded(run.seed):
            apply_plan(model, run.plan)
    return Trainee(model, None if run.taught_by is None else partial(load_teacher, run, dtype), run.tokenizer)


def load_teacher(run: Run, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model that a rewritten one learns from.

    Args:
        run: a run with a teacher of its own.
        dtype: type of its weights.
    """
    assert run.taught_by is not None
    numbers = run.taught_by.nbytes // run.taught_by.dtype.itemsize
    run.progress.phase(f"Loading the teacher, a model of its own ({size(numbers * dtype.itemsize)})")
    model = load_model(run.taught_by, dtype=dtype, device=run.team.device)
    run.progress.end()
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the context random starts depend on the seed alone; outside nothing is changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def final_model(run: Run, trainee: Trainee, dtype: torch.dtype) -> Trainee:
    """The healed model on weights of the type that is saved, so that training in bf16 leaves no trace in fp32 ones."""
    return trainee if trainee.model.dtype == dtype else _reloaded(run, trainee, dtype)


def _fresh_trainee(run: Run, stage: StageBase) -> Trainee:
    """The converted model before any healing; measured, if that has not been done."""
    dtype = DTYPES[stage.precision]
    first_time = "distance/swap" not in run.measured
    trainee = load_converted(run, dtype, first_time=first_time)
    if first_time:
        measure(run, trainee.model, run.start)
        measure_distance(run, trainee, "swap")
    return trainee


def in_precision(run: Run, trainee: Trainee, index: int) -> Trainee:
    """The same model on weights of the type that the stage of an index wants."""
    dtype = DTYPES[run.recipe.stages[index].precision]
    return trainee if trainee.model.dtype == dtype else _reloaded(run, trainee, dtype)


def _reloaded(run: Run, trainee: Trainee, dtype: torch.dtype) -> Trainee:
    """The same healed model on freshly loaded weights of another type."""
    trained, adapters, routed = trainee.trained_tensors(), len(trainee.adapters), bool(trainee.own.trained)
    # Two copies of the weights must not be in memory at once.
    trainee.release()
    renewed = load_converted(run, dtype)
    if routed:
        renewed.open_routers()
    settings = [stage.adapter for stage in run.recipe.stages]
    for chosen in [setting for setting in settings if setting is not None][:adapters]:
        renewed.add_adapter(chosen, seed=run.seed)
    renewed.load_trained(trained)
    return renewed


def open_trained(run: Run, trainee: Trainee, stages: int) -> None:
    """Put on the model, and open of its own, what the first `stages` stages train, as far as it is missing."""
    settings = [stage.adapter for stage in run.recipe.stages[:stages]]
    wanted = [setting for setting in settings if setting is not None]
    if any(stage.trains_routers for stage in run.recipe.stages[:stages]):
        trainee.open_routers()
    for number in range(len(trainee.adapters), len(wanted)):
        trainee.add_adapter(wanted[number], seed=run.seed + number)


def _run(
    run: Run,
    trainee: Trainee,
    stage: StageBase,
    stream: TokenStream | ImageStream,
    state: StageState,
    moments: dict[str, torch.Tensor],
) -> StageState:
    """Train or settle a stage from where it stands to its end."""
    objective = stage.objective(trainee, None if stage.adapter is None else trainee.adapters[-1])
    if isinstance(stage, TrainingStage) and isinstance(objective, Objective):
        job = StageJob(state.stage, stage, objective, trainee, stream, run.team, run.work, run.progress, run.trackers)
        return run_stage(job, state, moments)
    assert isinstance(objective, Fit)
    run.progress.phase(f"{stage_name(state.stage, stage)}: observing")
    state = run_fit(objective, state, stream, run.team)
    run.progress.end()
    if run.team.leads:
        run.work.save(state, trainee.trained_tensors(), {})
    run.team.wait()
    return state


def _training_figures(run: Run, stage: StageBase, state: StageState, unit: str) -> dict[str, Any]:
    """Loss at the end of a stage, its lengths, its tokens or images, and how fast they went by."""
    lines = [record for record in MetricsFile(run.work.metrics).records() if record.index == state.stage]
    speed = state.tokens / max(state.seconds, 1e-9)
    lengths = {"sequence_length": stage.sequence_length} if stage.lengths else {}
    loss = {"loss": lines[-1].loss} if lines else {}
    return {**loss, **lengths, unit: state.tokens, f"{unit}_per_second": speed}


def _section_key(stream: TokenStream | ImageStream) -> str:
    return f"position/{fingerprint(stream.section.model_dump_json())}"


def _position(run: Run, stream: TokenStream | ImageStream) -> Position:
    """Where a stage begins to read: behind what earlier stages took from the same data, so that it sees fresh text."""
    recorded: dict[str, Any] | None = run.measured.get(_section_key(stream))
    return Position() if recorded is None else Position(**recorded)
