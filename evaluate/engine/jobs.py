"""The work of an evaluation: each task for each model, cut into pieces that the journal knows by key."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...files.fast_copy import digest_of
from ..tasks.base import EvaluatedModel, Scope, Task, Unit
from ..tasks.packaged import data_file
from .journal import Journal
from .results import package_versions
from .schema import MeasuredModel


@dataclass(frozen=True)
class Job:
    """One task for one model, cut into units.

    Attributes:
        name: the task's name in the suite.
        task: the task.
        evaluated: the model.
        units: its pieces of work.
        keys: what the journal calls each: equal keys mean equal work on equal models.
    """

    name: str
    task: Task[Any]
    evaluated: EvaluatedModel
    units: Sequence[Unit]
    keys: Sequence[str]

    def missing(self, journal: Journal) -> list[tuple[str, Unit]]:
        """The pieces that are not done."""
        return [(key, unit) for key, unit in zip(self.keys, self.units, strict=True) if key not in journal]


def make_jobs(
    evaluated: EvaluatedModel,
    tasks: Mapping[str, Task[Any]],
    scope: Scope,
    about: Mapping[str, MeasuredModel],
    device: torch.device,
) -> Iterator[Job]:
    """The jobs of one model; a task that compares is a job of the model, not of the base."""
    for name, task in tasks.items():
        if task.needs_base and evaluated.role == "base":
            continue
        own = scope_of(task, scope)
        units = task.units(evaluated, own)
        identity = {
            "task": name,
            "settings": task.settings.model_dump(mode="json"),
            "scope": asdict(own),
            "models": [about[role].identity for role in (("base", "model") if task.needs_base else (evaluated.role,))],
            "data": _digests(task),
            "role": evaluated.role,
            "device": device.type,
            "units": len(units),
            "versions": package_versions(),
        }
        stem = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
        yield Job(name, task, evaluated, units, [f"{stem}/{index}" for index in range(len(units))])


def scope_of(task: Task[Any], scope: Scope) -> Scope:
    """A run's scope with the task's own limit in it."""
    limits = [limit for limit in (scope.limit, task.settings.limit) if limit is not None]
    return Scope(min(limits, default=None), scope.batch_size)


def _digests(task: Task[Any]) -> dict[str, str]:
    """Digests of the files that a task reads: a file can change behind its name."""
    data, folder = (getattr(task.settings, key, None) for key in ("data", "include_path"))
    files = [] if data is None else [data_file(data)]
    if folder is not None:
        files += sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): digest_of(path) for path in files}
