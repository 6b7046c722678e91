"""`attnconv compare`: several conversions of one base side by side, from the measurements in their folders."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...formats import count
from ..bench.cases import Case
from ..engine.results import FOLDER
from ..engine.schema import TaskResult
from ..tasks.base import task_classes
from .attention_part import evaluated_counts
from .differences import Column, ComparedModel, Difference, Value, find_differences, same_settings
from .gathering import Report, gather
from .page import commands

logger = logging.getLogger(__name__)

DECODE, PREFILL, CACHE = "decode", "prefill", "cache"
DENSITY = "density"
BASE = "base"


@dataclass(frozen=True)
class ConversionComparison:
    """The answer of `compare_conversions`.

    Attributes:
        base: name of the base.
        rows: the base, if it was measured, then the conversions as they were given.
        columns: what they are compared by: quality first, then speed and memory.
        context: the longest context at which all that were timed were timed; None without speed.
        differences: between each conversion and the best, by column.
        remarks: what makes the numbers less comparable, a sentence each.
        files: the page, its Markdown twin.
    """

    base: str
    rows: tuple[ComparedModel, ...]
    columns: tuple[Column, ...]
    context: int | None
    differences: tuple[Difference, ...]
    remarks: tuple[str, ...]
    files: tuple[Path, ...] = ()

    @property
    def quality(self) -> tuple[Column, ...]:
        """The columns of tasks."""
        return tuple(column for column in self.columns if column.task)

    @property
    def speed(self) -> tuple[Column, ...]:
        """The columns of the benchmark."""
        return tuple(column for column in self.columns if column.key in (DECODE, PREFILL, CACHE))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "files": [str(path) for path in self.files]}


def compare_conversions(
    folders: Sequence[Path], *, output: Path | None = None, metric: str | None = None
) -> ConversionComparison:
    """Put conversions of one base side by side, and write a page about it.

    Args:
        folders: two or more outputs of `attnconv convert` that were measured.
        output: the page, or a folder for it; None means `results/compare.html`. Its Markdown twin goes beside it.
        metric: key of the column that quality is judged by in the picture of quality against speed, such as
            `piqa: accuracy`; None means the first, which is perplexity if that was measured.

    Raises:
        DataError: there are fewer than two, they have different bases, one has no measurements, a file is damaged, or
            there is no such metric.
        OutputError: the page cannot be written.
    """
    from .comparing_page import write_comparison

    reports = [gather(Path(folder)) for folder in folders]
    _check(reports)
    names = _names(reports)
    quality = _quality_columns(reports)
    context, speed = _speed_columns(reports)
    counted = _counted_columns(reports)
    models = [_row(name, report, quality, speed, context) for name, report in zip(names, reports, strict=True)]
    base_values = _base_values(reports, quality, speed, context)
    base = next((report.base for report in reports if report.base), BASE)
    rows = [ComparedModel(base, None, {}, 0, base_values)] if base_values else []
    comparison = ConversionComparison(
        base=base,
        rows=(*rows, *models),
        columns=(*quality, *speed, *counted),
        context=context,
        differences=tuple(find_differences(dict(zip(names, reports, strict=True)), models, quality)),
        remarks=tuple(_remarks(reports)),
    )
    if metric is not None and metric not in [column.key for column in comparison.quality]:
        known = ", ".join(column.key for column in comparison.quality) or "none, for no quality was measured"
        raise DataError(f"There is no metric {metric!r} to compare by; there are: {known}.")
    page = Path(output).expanduser() if output is not None else Path(FOLDER) / "compare.html"
    page = page if page.suffix == ".html" else page / "compare.html"
    return write_comparison(comparison, page, metric=metric)


def _check(reports: Sequence[Report]) -> None:
    if len(reports) < 2:
        raise DataError("Give two folders or more: a comparison needs conversions to compare.")
    places = [report.folder.resolve() for report in reports]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise DataError(f"{twice} is given twice: name each conversion once.")
    for report in reports:
        if report.evaluation is None and report.benchmark is None:
            evaluate, bench = commands(report)
            raise DataError(f"{report.folder} has no measurements: run `{evaluate}`, and `{bench}` for speed.")
    for how in (_converted_from, _measured_against):
        known = [(report, digests) for report in reports if (digests := how(report))]
        other = next((report for report, digests in known if digests != known[0][1]), None)
        if other is not None:
            first = known[0][0]
            said = f"{first.folder} is of {first.base or 'one base'}, {other.folder} of {other.base or 'another'}"
            raise DataError(f"These are not of one base, as the digests of its weights say: {said}; compare others.")


def _converted_from(report: Report) -> list[str]:
    """Digests of the weights that a conversion was made from."""
    return sorted(report.receipt.inputs.values()) if report.receipt is not None else []


def _measured_against(report: Report) -> list[str]:
    """Digests of the weights that a conversion was compared with."""
    bases = [measured.base for measured in (report.evaluation, report.benchmark) if measured is not None]
    return next((sorted(base.digests.values()) for base in bases if base is not None and base.digests), [])


def _names(reports: Sequence[Report]) -> list[str]:
    """Names of the folders, or as much of their paths as tells them apart."""
    paths = [report.folder.resolve() for report in reports]
    depth = 1
    while depth < 8 and len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _headlines() -> list[str]:
    """Kinds of tasks whose first metric stands for them, in order."""
    return [kind for kind, task in task_classes().items() if task.headline is not None]


def _quality_columns(reports: Sequence[Report]) -> list[Column]:
    """The first metric of each task that stands for itself, in the order of their classes."""
    found: dict[str, tuple[int, Column]] = {}
    for report in reports:
        for name, task in report.tasks(*_headlines()).items():
            overall = [figure for figure in task.figures if not figure.group and figure.model is not None]
            if overall:
                first = overall[0]
                key = f"{name}: {first.metric}"
                column = Column(key, key, first.better, first.style, name)
                found.setdefault(key, (_headlines().index(task.kind), column))
    return [column for _, column in sorted(found.values(), key=lambda row: row[0])]


def _speed_columns(reports: Sequence[Report]) -> tuple[int | None, list[Column]]:
    """Decoding, reading and cache at the longest context at which all that were timed were timed."""
    timed = [report.benchmark for report in reports if report.benchmark is not None]
    contexts = [{case.context for case in bench.cases if _is_timed(case)} for bench in timed]
    shared = set.intersection(*contexts) if contexts else set()
    if not shared:
        return None, []
    at = f"at {count(max(shared))} tokens"
    columns = [
        Column(DECODE, f"decoding {at}, ms per token", "lower", "ms"),
        Column(PREFILL, f"reading {at}, seconds", "lower", "seconds"),
        Column(CACHE, f"cache {at}", "lower", "bytes"),
    ]
    cases = [case for bench in timed for case in bench.cases if case.context == max(shared) and case.batch == 1]
    return max(shared), [c for c in columns if any(_speed(cases, role, c) for role in ("model", BASE))]


def _counted_columns(reports: Sequence[Report]) -> list[Column]:
    """Tokens attended one by one, where evaluations counted them over equally many."""
    lengths = {counts.tokens for report in reports if (counts := evaluated_counts(report.evaluation)) is not None}
    if len(lengths) != 1:
        return []
    return [Column(DENSITY, f"tokens attended one by one, at {lengths.pop():,}", "lower", "percent")]


def _is_timed(case: Case) -> bool:
    return case.role == "model" and case.batch == 1 and case.median is not None and case.measure in (DECODE, PREFILL)


def _speed(cases: Sequence[Case], role: str, column: Column) -> Value | None:
    """A model's number in a column of speed, with the quartiles of the repeats for an interval."""
    for case in cases:
        if case.role != role or (column.key != CACHE and case.measure != column.key):
            continue
        if column.key == CACHE and case.cache_bytes is not None:
            return Value(float(case.cache_bytes))
        number = case.ms_per_token if column.key == DECODE else case.median
        if column.key != CACHE and number is not None:
            factor = number / case.median if case.median else 0.0
            ends = None if case.low is None or case.high is None else (factor * case.low, factor * case.high)
            return Value(number, ends)
    return None


def _row(
    name: str, report: Report, quality: Sequence[Column], speed: Sequence[Column], context: int | None
) -> ComparedModel:
    methods = {method: len(modules) for method, modules in report.methods.items()}
    values = _values(report, quality, speed, context, role="model")
    counts = evaluated_counts(report.evaluation)
    if counts is not None:
        values[DENSITY] = Value(counts.total.density)
    return ComparedModel(name, str(report.folder), methods, report.parameters, values)


def _base_values(
    reports: Sequence[Report], quality: Sequence[Column], speed: Sequence[Column], context: int | None
) -> dict[str, Value]:
    """The base's numbers, each from the first folder that has it."""
    values: dict[str, Value] = {}
    for report in reports:
        values = {**_values(report, quality, speed, context, role=BASE), **values}
    return values


def _values(
    report: Report, quality: Sequence[Column], speed: Sequence[Column], context: int | None, *, role: str
) -> dict[str, Value]:
    values = {}
    for column in quality:
        task = report.tasks().get(column.task)
        for figure in task.figures if task is not None else ():
            number = figure.model if role == "model" else figure.base
            if not figure.group and f"{column.task}: {figure.metric}" == column.key and number is not None:
                values[column.key] = Value(number, figure.interval if role == "model" else figure.base_interval)
    cases = (
        [case for case in report.benchmark.cases if case.context == context and case.batch == 1]
        if (report.benchmark is not None)
        else []
    )
    for column in speed:
        found = _speed(cases, role, column)
        if found is not None:
            values[column.key] = found
    return values


def _remarks(reports: Sequence[Report]) -> list[str]:
    """Sentences about tasks with different settings, different machines, and speed that nobody measured."""
    remarks = []
    tasks: dict[str, list[TaskResult]] = {}
    for report in reports:
        for name, task in report.tasks(*_headlines()).items():
            tasks.setdefault(name, []).append(task)
    unlike = [name for name, found in tasks.items() if any(not same_settings(task, found[0]) for task in found)]
    if unlike:
        remarks.append(f"Measured with different settings, so not comparable: {', '.join(unlike)}.")
    timed = [report.benchmark for report in reports if report.benchmark is not None]
    places = {(b.setup.processor, b.setup.threads, b.model.dtype) for b in timed}
    if len(places) > 1:
        remarks.append("Speed was measured on different machines, threads or dtypes, so it is not comparable.")
    untimed = [report for report in reports if report.benchmark is None]
    if untimed:
        said = "; ".join(f"`{commands(report)[1]}`" for report in untimed)
        remarks.append(f"Speed was not measured for {', '.join(r.name for r in untimed)}: run {said}.")
    return remarks
