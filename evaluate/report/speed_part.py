"""Speed and memory against the context, with the spread of the repeats and the crossover."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ...files.documents import Number
from ...formats import count, duration, number
from ..bench.cases import Case
from ..bench.crossover import Crossover
from ..bench.schema import BenchmarkFile
from .blocks import Block, Cell, Chart, Charts, Section, Table, Text, section
from .cells import amount_cell, count_cell, size_cell
from .charts import Axis, Mark, Series, line_chart
from .drawing import BASE, MODEL
from .gathering import Report

CROSSED = {"prefill": "reading a prompt", "decode": "generating", "memory": "cache"}
# Stands for whichever cases carry the size of the cache.
CACHE = "cache"
ROLES = (("base", "base", BASE), ("model", "converted", MODEL))


@dataclass(frozen=True)
class Quantity:
    """One curve of the section.

    Attributes:
        id: for the chart.
        title: its heading.
        measure: the cases that it is of.
        axis: what its numbers are.
        value: the number of a case.
        spread: lower and upper quartile over the repeats.
        crossover: key of the crossover that belongs to it.
        better: which way is better.
    """

    id: str
    title: str
    measure: str
    axis: Axis
    value: Callable[[Case], Number]
    spread: Callable[[Case], tuple[Number, Number]] = lambda case: (None, None)
    crossover: str = ""
    better: str = "lower"


def _per_token(case: Case) -> tuple[Number, Number]:
    """The quartiles of a decoding case, in milliseconds per token."""
    if not case.median or case.ms_per_token is None or case.low is None or case.high is None:
        return None, None
    factor = case.ms_per_token / case.median
    return factor * case.low, factor * case.high


def _per_second(case: Case) -> tuple[Number, Number]:
    if not case.median or case.tokens_per_second is None or not case.low or not case.high:
        return None, None
    tokens = case.tokens_per_second * case.median
    return tokens / case.high, tokens / case.low


QUANTITIES = (
    Quantity(
        "prefill",
        "Reading a prompt",
        "prefill",
        Axis("seconds", log=True),
        lambda case: case.median,
        lambda case: (case.low, case.high),
        "prefill",
    ),
    Quantity(
        "decode",
        "Generating a token",
        "decode",
        Axis("ms per token", log=True),
        lambda case: case.ms_per_token,
        _per_token,
        "decode",
    ),
    Quantity(
        "cache",
        "Memory of the cache",
        CACHE,
        Axis("cache", log=True, bytes=True),
        lambda case: case.cache_bytes,
        crossover="memory",
    ),
    Quantity(
        "peak",
        "Peak memory while reading",
        "prefill",
        Axis("peak memory", log=True, bytes=True),
        lambda case: case.peak_bytes,
    ),
    Quantity(
        "training",
        "Training: attention transfer",
        "transfer",
        Axis("tokens per second", log=True),
        lambda case: case.tokens_per_second,
        _per_second,
        better="higher",
    ),
    Quantity(
        "training-peak",
        "Peak memory while training",
        "transfer",
        Axis("peak memory", log=True, bytes=True),
        lambda case: case.peak_bytes,
    ),
)


def speed_section(report: Report) -> Section | None:
    """Curves, crossovers and all cases."""
    bench = report.benchmark
    if bench is None or not bench.cases:
        return None
    charts = []
    for batch in sorted({case.batch for case in bench.cases}):
        for quantity in QUANTITIES:
            chart = _curve(bench, quantity, batch)
            if chart is not None:
                charts.append(chart)
    blocks: list[Block | None] = [
        Text(_how_measured(bench), small=True),
        Charts(tuple(charts)) if charts else None,
        _crossovers(bench),
        _case_table(bench),
    ]
    return section("speed", "Speed and memory", blocks)


def _cases(bench: BenchmarkFile, measure: str) -> list[Case]:
    """The cases of a measure; for the cache, one for each model, batch and context."""
    if measure != CACHE:
        return [case for case in bench.cases if case.measure == measure]
    held = [case for case in bench.cases if case.cache_bytes is not None]
    return list({(case.role, case.batch, case.context): case for case in reversed(held)}.values())


@dataclass(frozen=True)
class Pair:
    """Base and model under the same conditions, and how many times the model's seconds (or bytes) the base needs."""

    base: Case
    model: Case
    factor: float


def paired_cases(bench: BenchmarkFile, measure: str) -> Pair | None:
    """Base and model at the longest context at which both were measured, in the smallest batch."""
    cases = {(case.batch, case.context, case.role): case for case in _cases(bench, measure)}
    pairs = []
    for (batch, context, role), model in cases.items():
        base = cases.get((batch, context, "base"))
        if role == "model" and base is not None:
            sides = (base.cache_bytes, model.cache_bytes) if measure == CACHE else (base.median, model.median)
            if sides[0] and sides[1]:
                pairs.append(Pair(base, model, sides[0] / sides[1]))
    return max(pairs, key=lambda pair: (-pair.model.batch, pair.model.context), default=None)


def _how_measured(bench: BenchmarkFile) -> str:
    repeats = bench.settings.repeats if bench.settings is not None else None
    said = "Points are medians, bars the middle half of the repeats"
    said += f" ({repeats} of each)." if repeats else "."
    return f"{said} Axes are logarithmic where the numbers span a factor of two."


def _curve(bench: BenchmarkFile, quantity: Quantity, batch: int) -> Chart | None:
    series = []
    for role, label, color in ROLES:
        cases = [case for case in _cases(bench, quantity.measure) if (case.role, case.batch) == (role, batch)]
        known = [(case, value) for case in cases if (value := quantity.value(case)) is not None]
        rows = [
            (case.context, value, *quantity.spread(case))
            for case, value in sorted(known, key=lambda found: found[0].context)
        ]
        if rows:
            contexts, values, lows, highs = zip(*rows, strict=True)
            series.append(Series(label, contexts, values, color, lows, highs))
    # One length makes no curve: the axes would be of our own invention, and the table has the figures.
    if len({x for line in series for x in line.xs}) < 2:
        return None
    several = len({case.batch for case in bench.cases}) > 1
    title = f"{quantity.title}, batch {batch}" if several else quantity.title
    xs = [x for line in series for x in line.xs]
    equal = next((row.context for row in bench.crossover.get(quantity.crossover, []) if row.batch == batch), None)
    marks = []
    if equal is not None and min(xs) <= equal <= max(xs):
        marks.append(Mark(equal, f"equal at {count(equal)}", vertical=True))
    ends = ", ".join(f"{line.label} {number(line.ys[-1])} at {count(line.xs[-1])}" for line in series)
    description = f"{quantity.axis.label} against the context in tokens: {ends}."
    drawer = partial(line_chart, series, Axis("context, tokens", log=True, whole=True), quantity.axis, marks=marks)
    return Chart(f"{quantity.id}-{batch}", title, description, drawer)


def _crossovers(bench: BenchmarkFile) -> Table | None:
    rows = tuple(
        (Cell(CROSSED.get(name, name)), count_cell(row.batch), _ahead(row), Cell(row.note))
        for name, found in bench.crossover.items()
        for row in found
    )
    columns = ("measure", "batch", "context", "what was found")
    return Table("From where on the converted model is ahead", columns, rows) if rows else None


def _ahead(row: Crossover) -> Cell:
    if row.context is None:
        return Cell("none")
    spread = "" if row.low is None or row.high is None else f"{count(row.low)} to {count(row.high)}"
    return Cell(f"{count(row.context)} tokens", row.context, note=spread)


def _case_table(bench: BenchmarkFile) -> Table:
    rows = []
    for case in bench.cases:
        spread = "-" if case.low is None or case.high is None else f"{duration(case.low)} to {duration(case.high)}"
        rows.append(
            (
                Cell(case.measure),
                Cell({role: label for role, label, _ in ROLES}[case.role]),
                count_cell(case.context),
                count_cell(case.batch),
                Cell(duration(case.median), case.median),
                Cell(spread),
                amount_cell(case.tokens_per_second),
                amount_cell(case.ms_per_token),
                size_cell(case.peak_bytes),
                size_cell(case.cache_bytes),
                count_cell(len(case.seconds) or None),
                Cell(case.skipped or ""),
            )
        )
    columns = ["measure", "model", "context", "batch", "median", "middle half", "tokens/s", "ms/token"]
    columns += ["peak memory", "cache", "repeats", "skipped because"]
    return Table("All measurements", tuple(columns), tuple(rows), collapsed=len(rows) > 8)
