"""Running a suite: units of work one after another, each journaled, then figures with intervals in one document."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ..tasks.base import EvaluatedModel, Outcome, Scope, Task, make_task
from .attention import count_attention
from .bootstrap import make_figures
from .items import Item
from .jobs import Job, make_jobs, scope_of
from .journal import Journal
from .models import evaluated_dtype, find_device, load_evaluated, open_evaluated, same_tokens, unload
from .progress import Progress
from .remarks import remarks_on
from .results import describe_model, describe_setup, read_results, results_folder, results_path, write_results
from .schema import EvaluationFile, ItemColumns, MeasuredModel, TaskResult
from .suite import Suite

logger = logging.getLogger(__name__)

JOURNAL = "eval.partial"
OLD = "eval.old.json"
"""Where results of other models go when those of this one take their place."""


@dataclass(frozen=True)
class Evaluation:
    """The answer of `run_evaluation`.

    Attributes:
        results: what the file holds.
        path: the file.
        ran: names of the tasks of this run, in order; the file may hold more from earlier runs.
        skipped: tasks of the suite that could not be run, with the reason.
    """

    results: EvaluationFile
    path: Path
    ran: tuple[str, ...]
    skipped: Mapping[str, str]

    @cached_property
    def document(self) -> dict[str, Any]:
        """What the file holds, as plain JSON values."""
        return self.results.plain()

    def to_dict(self) -> dict[str, Any]:
        """The document without the single scores, which the file has."""
        left_out = ("items", "extras")
        tasks = {
            name: {key: value for key, value in task.items() if key not in left_out}
            for name, task in self.document["tasks"].items()
        }
        return {**self.document, "tasks": tasks, "path": str(self.path), "skipped": dict(self.skipped)}


def run_evaluation(
    source: str,
    suite: Suite,
    *,
    against: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    output: str | Path | None = None,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model, and another to compare it with, on the tasks of a suite.

    The models are loaded one after the other; both at once only for tasks that compare them token by token. What an
    interrupted run measured is not measured again. Tasks that the file of results holds from earlier runs of the same
    models stay in it.

    Args:
        source: a local folder, Hub id or `.gguf` file of a causal language model, converted or not.
        suite: the tasks.
        against: the model to compare with.
        limit: items of each task at most, the first ones; the suite's own limits hold too.
        batch_size: sequences in one forward pass at most.
        dtype: one of `engine.models.DTYPES`; auto is that of each checkpoint.
        device: where to run; None means a GPU if there is one.
        output: folder for the results; None means as `results_folder` says.
        restart: forget what an interrupted run measured.
        trust_remote_code: whether models that bring their own code may run it.
        progress: called with (tokens done, tokens in all, what is being done).

    Raises:
        CheckpointError: a model cannot be read, or is no causal language model.
        DataError: a task's data cannot be used, or a setting is none of those allowed.
        OutputError: the results cannot be written.
    """
    folder = results_folder(source, output)
    evaluated_models = [open_evaluated("model", source, trust_remote_code=trust_remote_code)]
    if against is not None:
        evaluated_models.insert(0, open_evaluated("base", against, trust_remote_code=trust_remote_code))
        evaluated_models[1].base = evaluated_models[0]
    about = {
        evaluated.role: describe_model(evaluated.checkpoint, evaluated_dtype(evaluated.checkpoint, dtype))
        for evaluated in evaluated_models
    }
    where = find_device(device)
    # Before anything is measured: a damaged file, and one that will have to make room.
    _kept_tasks(read_results(folder, EvaluationFile), about, warn=True)
    scope = Scope(limit, batch_size)
    tasks = {name: make_task(settings) for name, settings in suite.tasks.items()}
    skipped = {
        name: "it compares with a base: name one with --against"
        for name, task in tasks.items()
        if task.needs_base and against is None
    }
    tasks = {name: task for name, task in tasks.items() if name not in skipped}
    jobs = [job for evaluated in evaluated_models for job in make_jobs(evaluated, tasks, scope, about, where)]
    with Journal(folder / JOURNAL) as journal:
        if restart:
            journal.remove()
        seconds = _measure(
            jobs, evaluated_models, journal, dtype, where, progress, partial(_count_attention, journal, about)
        )
        paired = len(evaluated_models) == 1 or same_tokens(*evaluated_models)
        setup = describe_setup(where)
        done = {
            name: _summary(name, task, jobs, journal, scope, seconds, paired).model_copy(update={"setup": setup})
            for name, task in tasks.items()
        }
        # Read only now: another run may have added tasks in the meantime.
        earlier = read_results(folder, EvaluationFile)
        kept = _kept_tasks(earlier, about)
        if earlier is not None and kept is None:
            results_path(folder, EvaluationFile).replace(folder / OLD)
        measured = {**(kept or {}), **done}
        counted = {role: journal.entries.get(_attention_key(role, about)) for role in about}
        results = EvaluationFile(
            model=about["model"],
            base=about.get("base") or (earlier.base if earlier is not None and kept is not None else None),
            setup=setup,
            suite=suite.name,
            attention={role: found for role, found in counted.items() if found},
            tasks=measured,
            remarks=remarks_on(evaluated_models[-1].checkpoint.config, [task.settings for task in measured.values()]),
        )
        path = write_results(folder, results)
        journal.remove()
    return Evaluation(results, path, tuple(done), skipped)


def _measure(
    jobs: Sequence[Job],
    evaluated_models: Sequence[EvaluatedModel],
    journal: Journal,
    dtype: str,
    device: torch.device,
    progress: Progress | None,
    loaded: Callable[[EvaluatedModel, Sequence[Job]], None],
) -> dict[tuple[str, str], float]:
    """Work off what the journal does not hold; returns seconds by (task, role)."""
    in_all = sum(unit.tokens for job in jobs for unit in job.units)
    todo = sum(unit.tokens for job in jobs for _, unit in job.missing(journal))
    done = in_all - todo
    seconds: dict[tuple[str, str], float] = {}
    if done and todo:
        logger.warning("Going on after an interruption: %.0f %% are measured already.", 100 * done / in_all)
    pairs = any(job.task.needs_base and job.missing(journal) for job in jobs)
    try:
        for evaluated in evaluated_models:
            own = [job for job in jobs if job.evaluated is evaluated and job.missing(journal)]
            if not own and not (evaluated.role == "base" and pairs):
                continue
            if progress is not None:
                progress(done, in_all, f"loading {evaluated.source}")
            load_evaluated(evaluated, dtype=dtype, device=str(device))
            loaded(evaluated, jobs)
            for job in own:
                began = time.monotonic()
                for key, unit in job.missing(journal):
                    if progress is not None:
                        progress(done, in_all, f"{job.name}, {evaluated.role}")
                    with torch.inference_mode():
                        outcome = job.task.measure(evaluated, unit)
                    journal.add(key, {"items": [asdict(item) for item in outcome.items], "extra": outcome.extra})
                    done += unit.tokens
                seconds[job.name, evaluated.role] = time.monotonic() - began
            if not (evaluated.role == "base" and pairs):
                unload(evaluated)
    finally:
        for evaluated in evaluated_models:
            unload(evaluated)
    if progress is not None:
        progress(in_all, in_all, "")
    return seconds


def _count_attention(
    journal: Journal, about: Mapping[str, MeasuredModel], evaluated: EvaluatedModel, jobs: Sequence[Job]
) -> None:
    """Count what a converted model's attention does, which is an error if that is not what it should."""
    if evaluated.checkpoint.is_converted:
        found = count_attention(evaluated, [job.task.settings for job in jobs])
        journal.add(_attention_key(evaluated.role, about), found)


def _attention_key(role: str, about: Mapping[str, MeasuredModel]) -> str:
    identity = json.dumps([role, about[role].identity], sort_keys=True)
    return f"attention/{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _outcome(entry: Mapping[str, Any]) -> Outcome:
    # The journal has null for what is no number.
    items = []
    for raw in entry["items"]:
        values = {key: float("nan") if value is None else value for key, value in raw["values"].items()}
        items.append(Item(raw["id"], values, raw["group"], raw["note"], raw["cluster"]))
    return Outcome(items, entry["extra"])


def _summary(
    name: str,
    task: Task[Any],
    jobs: Sequence[Job],
    journal: Journal,
    scope: Scope,
    seconds: Mapping[tuple[str, str], float],
    same: bool,
) -> TaskResult:
    """One task of the file: figures, and the scores that they are made of."""
    outcomes = {job.evaluated.role: [_outcome(journal[key]) for key in job.keys] for job in jobs if job.name == name}
    items = {role: [item for outcome in found for item in outcome.items] for role, found in outcomes.items()}
    metrics = task.metrics_of(items["model"])
    pair = same or not task.counts_tokens
    slices = [(), *task.slices] if task.overall else task.slices
    figures = make_figures(items["model"], items.get("base"), metrics, slices, pair=pair)
    extras = {role: [o.extra for o in found if o.extra is not None] for role, found in outcomes.items()}
    return TaskResult(
        kind=task.settings.kind,
        settings=task.settings.model_dump(mode="json"),
        limit=scope_of(task, scope).limit,
        batch_size=scope.batch_size,
        time=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        seconds={role: round(seconds[name, role], 3) for role in items if (name, role) in seconds},
        metrics=list(metrics),
        figures=list(figures),
        items={role: _columns(found) for role, found in items.items()},
        extras={role: found for role, found in extras.items() if found},
    )


def _columns(items: Sequence[Item]) -> ItemColumns:
    names = list(dict.fromkeys(key for item in items for key in item.values))
    return ItemColumns(
        ids=[item.id for item in items],
        groups=[dict(item.group) for item in items],
        values={name: [item.values.get(name) for item in items] for name in names},
        notes={item.id: item.note for item in items if item.note},
        clusters=[item.cluster for item in items] if any(item.cluster for item in items) else None,
    )


def _kept_tasks(
    earlier: EvaluationFile | None, about: Mapping[str, MeasuredModel], *, warn: bool = False
) -> Mapping[str, TaskResult] | None:
    """The tasks of an earlier file; None if it is about other models."""
    if earlier is None:
        return {}
    for role, before in (("model", earlier.model), ("base", earlier.base)):
        now = about.get(role)
        if before is not None and now is not None and before.identity != now.identity:
            if warn:
                logger.warning("The earlier results are of another %s, or of another dtype; they become %s.", role, OLD)
            return None
    return earlier.tasks
