"""A whole conversion: open, plan, swap, heal, measure, save."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..convert.planning.plan import Plan, make_plan
from ..convert.planning.probe import probe
from ..convert.reading.checkpoint import Checkpoint, load_tokenizer, model_class_of, open_checkpoint
from ..convert.reading.weight_files import is_new_tensor
from ..convert.writing.card import make_card
from ..convert.writing.receipt import make_receipt
from ..convert.writing.save import save_converted, save_native, write_companions
from ..convert.writing.self_contained import check_self_contained, write_self_contained
from ..convert.writing.stream import stream_convert
from ..distill.checks import check_data
from ..distill.healing import final_model, heal, load_converted, seeded
from ..distill.health import check_finite, warn_if_not_finite
from ..distill.measuring import measure, measure_path_use, measure_positions
from ..distill.progress import Progress, Silent
from ..distill.run import Run
from ..distill.team import find_team
from ..distill.trackers import Trackers, check_trackers
from ..distill.trainee import Trainee
from ..distill.work_folder import WorkFolder
from ..errors import OutputError, PlanError, TrainingError
from ..files.foreign_errors import first_line
from ..files.output_folder import atomic_folder, check_output, trial_folder
from ..files.own_files import CONFIG_FILE, RECEIPT_FILE
from ..recipes import Recipe
from .executed import STREAMED, count_executed
from .figures import metric_rows, start_distance, write_figures
from .identity import digest_weights, find_revisions, run_identity
from .pruning import check_model, check_observed, without_unused_heads
from .result import ConversionResult
from .rewriting import Base, rewritten_base, write_native

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"


def run_conversion(
    source: str | Path,
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    resume_from: str | Path | None = None,
    overwrite: bool = False,
    allow_lossy: bool = False,
    allow_inexact: bool = False,
    compare_on: str | Path | None = None,
    trust_remote_code: bool = False,
    self_contained: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
    log_to: Sequence[str] = (),
) -> ConversionResult:
    """Convert a model by a recipe, heal it, and save it.

    A recipe without attention rules gives an ordinary model. Without stages the model is never built: the weights are
    copied or rewritten as files. Otherwise what is needed to go on after an interruption is kept in a folder beside
    `output` until that is complete.

    Args:
        source: a folder, a `.gguf` file or a Hub id.
        recipe: the recipe.
        output: the folder to write; it appears when all is done.
        resume: go on with an interrupted conversion; the result is bit for bit that of an uninterrupted one. What the
            recipe says about saving and reporting may be another than before, all else must be as it was.
        resume_from: go on with the conversion that was to write this other output, or that has this work folder.
        overwrite: replace an earlier result, and give up an unfinished one unless it is resumed.
        allow_lossy: accept that a method leaves out soft caps, sinks or biases of the model.
        allow_inexact: write the result of a rewrite that does not keep what it promised.
        compare_on: a text on which a rewritten model is compared with its source, both whole, in float32, where twice
            the source's own rounding counts as none; None compares models that are cut to a few layers and words.
        trust_remote_code: let the checkpoint's own Python code define the model.
        self_contained: write a modeling file that loads the result without attnconv.
        device: where to compute, as torch names it; None means the accelerator if there is one.
        progress: whom to tell; None means nobody; `TerminalProgress` of `attnconv.distill` draws bars
            on standard error, its `LineProgress` writes lines.
        log_to: experiment trackers that get the lines of `metrics.jsonl` too: `tensorboard`, whose files go to
            `attnconv-logs` beside the output, `trackio` or `wandb`.

    Raises:
        AttnConvError: one of its kinds, in one sentence, whatever is wrong with model, recipe, data or output.
    """
    began = time.monotonic()
    output = Path(output).expanduser()
    progress = progress or Silent()
    check_trackers(log_to)
    if log_to and not recipe.stages:
        raise PlanError(f"The recipe {recipe.name!r} has no stages, so there is nothing to log: leave --log-to out")
    progress.phase("Reading the model's headers")
    opened = open_checkpoint(source, trust_remote_code=trust_remote_code)
    if not recipe.attention and self_contained:
        raise PlanError("The result is an ordinary model, which needs no code of its own: leave --self-contained out")
    if compare_on is not None and not recipe.rewrite:
        raise PlanError("compare_on is for rewritten models, and the recipe has no rewrite: leave it out")
    if not (recipe.attention or recipe.stages):
        plan, exactness = write_native(
            opened,
            recipe,
            output,
            team=find_team(device),
            overwrite=overwrite,
            allow_inexact=allow_inexact,
            progress=progress,
            compare_on=compare_on,
        )
        return ConversionResult(output, plan, (), {}, time.monotonic() - began, exactness)
    if recipe.rewrite and not (resume or resume_from):
        # Before gigabytes are written; a run that goes on may replace what the one before was allowed to.
        check_output(output, overwrite=overwrite)
    with rewritten_base(
        opened,
        recipe,
        output,
        allow_inexact=allow_inexact,
        progress=progress,
        device=device,
        compare_on=compare_on,
    ) as base:
        work = WorkFolder(output if resume_from is None else Path(resume_from).expanduser())
        if self_contained:
            check_self_contained(base.checkpoint.architecture)
        run = _make_run(base, recipe, work, allow_lossy=allow_lossy, device=device, progress=progress)
        run = replace(run, trackers=_trackers(run, log_to, output))
        # Only a run with stages has a work folder, and one process of a team keeps it.
        with run.work.claimed() if recipe.stages and run.team.leads else nullcontext():
            elsewhere = resume_from is not None
            resume = resume or elsewhere
            finished, overwrite = _begin(run, output, resume=resume, elsewhere=elsewhere, overwrite=overwrite)
            if not finished:
                with run.trackers.running():
                    _convert(run, output, overwrite=overwrite, self_contained=self_contained)
            if run.team.leads:
                run.work.remove()
        run.team.wait()
    measured = metric_rows(run), start_distance(run), time.monotonic() - began, base.exactness
    return ConversionResult(output, run.plan, *measured, self_contained, bool(run.measured.get("links")))


def _make_run(
    base: Base, recipe: Recipe, work: WorkFolder, *, allow_lossy: bool, device: str | None, progress: Progress
) -> Run:
    """Plan the conversion of a base, and put together all that it works with."""
    checkpoint = base.checkpoint
    if getattr(checkpoint.config, "output_attentions", False):
        raise PlanError(
            f"The {CONFIG_FILE} of {checkpoint.source} sets output_attentions, which only eager softmax attention "
            "can give: set it to false"
        )
    plan = Plan(())
    if recipe.attention:
        model_class = model_class_of(checkpoint.config, trust_remote_code=checkpoint.trust_remote_code)
        plan = make_plan(recipe.attention, probe(checkpoint.config, model_class), allow_lossy=allow_lossy)
    check_observed(plan, recipe)
    streams = _streams(recipe, checkpoint)
    if not streams:
        progress.phase("Taking the weights' digests")
    run = Run(
        checkpoint=checkpoint,
        plan=replace(plan, rewrites=base.rewrites),
        recipe=recipe,
        tokenizer=load_tokenizer(checkpoint) if recipe.stages or recipe.evaluate else None,
        team=find_team(device),
        work=work,
        progress=progress,
        weights=None if streams else digest_weights(checkpoint),
        origin=base.origin,
        origin_digests=base.digests,
        exactness=None if base.exactness is None else base.exactness.to_dict(),
        differs=base.differs,
    )
    progress.end()
    return run


def _trackers(run: Run, names: Sequence[str], output: Path) -> Trackers:
    """What lines of metrics are sent to; in one process of a team alone."""
    steps = [stage.steps_of(run.team.size) for stage in run.recipe.stages]
    config = {"recipe": run.recipe.name, "model": (run.origin or run.checkpoint).name}
    return Trackers(names if run.team.leads else (), output, steps, config)


def _convert(run: Run, output: Path, *, overwrite: bool, self_contained: bool) -> None:
    """Heal the model and put the result in its place."""
    try:
        trainee = _healed(run, partial(_rehearse, run, output, overwrite=overwrite, self_contained=self_contained))
    except Exception:
        # Nothing is lost by starting over, perhaps with another recipe.
        if run.recipe.stages and run.team.leads:
            run.work.remove_if_empty()
        raise
    if run.team.leads:
        run.progress.phase("Saving")
        with _keeping_work(run), atomic_folder(output, overwrite=overwrite) as folder:
            _write(run, trainee, folder, output, self_contained)
            if run.recipe.stages:
                run.work.finishing(folder / RECEIPT_FILE)
        run.progress.end()


@contextmanager
def _keeping_work(run: Run) -> Iterator[None]:
    """Say of an output that cannot be put in its place after the healing how to do so without healing again."""
    try:
        yield
    except OutputError as error:
        if not run.recipe.stages:
            raise
        raise OutputError(
            f"{str(error).rstrip('.')}; the healing is kept: run the same command with --resume when that is done, "
            f"or with --resume-from {run.work.output} and another --output"
        ) from error


def _begin(run: Run, output: Path, *, resume: bool, elsewhere: bool, overwrite: bool) -> tuple[bool, bool]:
    """Check output, data and work folder before anything slow.

    Returns:
        whether all is done and only the work folder was left over; whether an earlier result is replaced.
    """
    unfinished = bool(run.recipe.stages) and run.work.exists()
    left_over = unfinished and not resume and run.work.is_finished(output)
    run.team.wait()
    if left_over:
        # The run before was killed between its last two steps.
        unfinished = False
        if run.team.leads:
            run.work.clear()
    if elsewhere and not unfinished:
        raise TrainingError(f"There is no unfinished run for {run.work.output}: it has no folder {run.work.path}.")
    if unfinished and resume:
        run.work.check(run_identity(run))
        run.measured.update(run.work.measured())
        if run.work.is_finished(output):
            return True, overwrite
        overwrite = overwrite or bool(run.measured.get("overwrite"))
    if unfinished and not (resume or overwrite):
        raise TrainingError(
            f"{run.work.path} holds an unfinished run: go on with --resume, or start over with --overwrite."
        )
    check_output(output, overwrite=overwrite)
    if not run.recipe.stages:
        return False, overwrite
    check_data(run)
    run.team.wait()
    if run.team.leads and not (unfinished and resume):
        if resume:
            logger.warning("There is no unfinished run for %s, so the conversion starts at the beginning.", output)
        known = {"overwrite": overwrite, "revisions": find_revisions(run.recipe)}
        run.work.begin(run_identity(run), known)
    run.team.wait()
    run.measured.update(run.work.measured())
    run.record("overwrite", overwrite)
    return False, overwrite


def _rehearse(run: Run, output: Path, model: PreTrainedModel, *, overwrite: bool, self_contained: bool) -> None:
    """Save the model without its weights and throw that away, so that what cannot be saved is not healed in vain."""
    if not run.team.leads:
        return
    # Nor should one be healed whose layers run something else.
    if run.plan.converted:
        count_executed(run, model)
        check_model(run, model)
    # One of the base's own, for which the saved weights have a mark.
    name, tensor = next(item for item in model.state_dict().items() if not is_new_tensor(item[0]))
    with trial_folder(output, overwrite=overwrite) as folder:
        try:
            _save(run, model, folder, weights={name: tensor[:1].clone()})
        # What transformers refuses to write it refuses with errors of many kinds; a full disk is told by the folder.
        except (ValueError, TypeError, RuntimeError) as error:
            raise OutputError(
                f"The converted model could not be saved after its healing: {first_line(error)}"
            ) from error
        _describe(run, folder, output, self_contained, digests=None if run.weights is None else run.weights.digests)


def _healed(run: Run, prepare: Callable[[PreTrainedModel], None]) -> Trainee | None:
    """The model after all stages, in the dtype it is saved in; None if it need not be built."""
    dtype = _output_dtype(run.recipe, run.checkpoint)
    if run.recipe.stages:
        return final_model(run, heal(run, prepare), dtype)
    if _streams(run.recipe, run.checkpoint):
        return None
    trainee = load_converted(run, dtype, first_time=True)
    measure(run, trainee.model, "swap")
    measure_path_use(run, trainee.model, "swap")
    measure_positions(run, trainee.model, "swap")
    return trainee


def _output_dtype(recipe: Recipe, checkpoint: Checkpoint) -> torch.dtype:
    name = recipe.output.dtype
    return checkpoint.dtype if name is None else getattr(torch, name)


def _streams(recipe: Recipe, checkpoint: Checkpoint) -> bool:
    """Whether the conversion is one of files, for which the model need not be built."""
    same = checkpoint.gguf_file is None and checkpoint.dtype == _output_dtype(recipe, checkpoint)
    return same and not recipe.stages and recipe.evaluate is None


def _write(run: Run, trainee: Trainee | None, folder: Path, output: Path, self_contained: bool) -> None:
    """Fill the folder: weights and configuration, then all that tells how they came about."""
    digests = None if run.weights is None else run.weights.digests
    if trainee is None:
        with seeded(run.seed):
            streamed = stream_convert(run.checkpoint, run.plan, folder)
        digests = streamed.digests
        # Links to a rewritten base are its only name when the run is over.
        run.record("links", streamed.links if run.origin is None else {})
        run.record("attention", {"not_measured": STREAMED})
        warn_if_not_finite(run.checkpoint.shards)
    else:
        if run.recipe.output.merge_lora:
            model = trainee.merge_adapters()
        else:
            model = trainee.detach_adapters(folder / ADAPTER_FOLDER, base=str(output))
        check_finite(model.state_dict().items())
        run = without_unused_heads(run, model)
        if run.plan.converted:
            run.record("attention", count_executed(run, model))
        _save(run, model, folder)
    _describe(run, folder, output, self_contained, digests=digests)
    write_figures(run, folder)


def _save(run: Run, model: PreTrainedModel, folder: Path, *, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    given: dict[str, Any] = {"shard_size": run.recipe.output.shard_bytes, "weights": weights}
    if run.plan.converted:
        save_converted(model, folder, checkpoint=run.checkpoint, plan=run.plan, **given)
    else:
        save_native(model, folder, checkpoint=run.checkpoint, **given)


def _describe(run: Run, folder: Path, output: Path, self_contained: bool, *, digests: Mapping[str, str] | None) -> None:
    """Write what tells how the model came about, beside its weights and configuration."""
    if self_contained:
        write_self_contained(folder, json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    base = run.origin or run.checkpoint
    receipt = make_receipt(
        base,
        run.plan,
        inputs=run.origin_digests or digests,
        links=run.measured.get("links"),
        exactness=run.exactness,
        start_distance=start_distance(run),
        metrics=metric_rows(run),
        path_use=run.measured.get("path_use"),
        attention=run.measured.get("attention"),
    )
    recipe_yaml = run.recipe.to_yaml()
    card = make_card(
        output.name,
        checkpoint=base,
        plan=run.plan,
        receipt=receipt,
        recipe_name=run.recipe.name,
        recipe_yaml=recipe_yaml,
        papers=[run.recipe.paper] if run.recipe.paper else [],
        self_contained=self_contained,
        native_config=None if run.plan.converted else run.checkpoint.config_dict,
    )
    write_companions(folder, recipe_yaml=recipe_yaml, receipt=receipt, card=card)
