"""What a comparison of conversions holds, and which of their differences are more than chance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..engine.bootstrap import make_figures
from ..engine.items import Better, Item, Style
from ..engine.schema import ItemColumns, TaskResult
from .gathering import Report


@dataclass(frozen=True)
class Column:
    """One figure that models are compared by.

    Attributes:
        key: its name in JSON: `TASK: METRIC`, `decode`, `prefill`, `cache` or `density`.
        label: what tables call it.
        better: which way is better.
        style: how to print it: as a figure of a task, or `seconds`, `ms` or `bytes`.
        task: the task that it is of; empty for speed and counts.
    """

    key: str
    label: str
    better: Better
    style: Style | str
    task: str = ""

    @property
    def metric(self) -> str:
        """The task's metric; empty for speed."""
        return self.key.removeprefix(f"{self.task}: ") if self.task else ""


@dataclass(frozen=True)
class Value:
    """A model's number in a column, with its 95 % interval if it has one."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class ComparedModel:
    """One row.

    Attributes:
        name: what to call it; unique.
        folder: where it is; None for the base.
        methods: its methods, with the number of layers of each.
        parameters: its new parameters.
        values: its numbers by column; those that were not measured are not there.
    """

    name: str
    folder: str | None
    methods: Mapping[str, int]
    parameters: int
    values: Mapping[str, Value]


@dataclass(frozen=True)
class Difference:
    """How a model differs from the best conversion in a column.

    Attributes:
        column: the column.
        name: the model.
        best: the conversion that is best in it.
        change: ratio or difference.
        interval: 95 % interval, from the same resamples of both if `paired`.
        paired: whether both were scored on the same items.
        compare: `ratio` or `difference`.
        style: how to print it.
        differs: whether the interval leaves out no change; None without an interval.
    """

    column: str
    name: str
    best: str
    change: float | None
    interval: tuple[float, float] | None
    paired: bool
    compare: str
    style: Style
    differs: bool | None


def best_of(rows: Sequence[ComparedModel], column: Column) -> ComparedModel | None:
    """The conversion that is best in a column; None if none was measured."""
    measured = [row for row in rows if row.folder is not None and column.key in row.values]
    sign = 1 if column.better == "lower" else -1
    return min(measured, key=lambda row: sign * row.values[column.key].value, default=None)


def find_differences(
    reports: Mapping[str, Report], rows: Sequence[ComparedModel], columns: Sequence[Column]
) -> list[Difference]:
    """Each conversion against the best one, from the scores of single items."""
    found = []
    for column in columns:
        best = best_of(rows, column)
        tasks = {name: task for name, report in reports.items() if (task := report.tasks().get(column.task))}
        if best is None:
            continue
        for name, task in tasks.items():
            if name != best.name and same_settings(task, tasks[best.name]):
                difference = _difference(column, name, task, best.name, tasks[best.name])
                found += [difference] if difference is not None else []
    return found


def _difference(column: Column, name: str, task: TaskResult, best: str, best_task: TaskResult) -> Difference | None:
    metric = next((metric for metric in task.metrics if f"{column.task}: {metric.name}" == column.key), None)
    if metric is None or "model" not in task.items or "model" not in best_task.items:
        return None
    figures = make_figures(_items(task.items["model"]), _items(best_task.items["model"]), [metric], [()])
    if not figures:
        return None
    figure, middle = figures[0], 1.0 if metric.compare == "ratio" else 0.0
    interval = figure.change_interval
    differs = None if interval is None else not interval[0] <= middle <= interval[1]
    return Difference(
        column.key, name, best, figure.change, interval, figure.paired, metric.compare, metric.style, differs
    )


def _items(columns: ItemColumns) -> list[Item]:
    items = []
    for place, id in enumerate(columns.ids):
        values = {key: numbers[place] for key, numbers in columns.values.items() if place < len(numbers)}
        known = {key: value for key, value in values.items() if value is not None}
        group = columns.groups[place] if place < len(columns.groups) else {}
        cluster = columns.clusters[place] if columns.clusters and place < len(columns.clusters) else ""
        items.append(Item(id, known, group, cluster=cluster))
    return items


def same_settings(first: TaskResult, second: TaskResult) -> bool:
    """Whether a task asked two models the same."""
    return (first.kind, first.settings, first.limit) == (second.kind, second.settings, second.limit)
