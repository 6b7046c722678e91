"""The page of a comparison: the table, quality against speed, quality with intervals, differences, and where from."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ... import __version__
from ...errors import OutputError
from ...formats import MISSING, amount, change, change_span, count, duration, number, size, span
from .blocks import Block, Cell, Chart, Charts, Page, Section, Table, Text, Tiles, Tone, section, texts
from .cells import count_cell
from .charts import Axis, Dot, dot_chart
from .comparing import CACHE, DECODE, PREFILL, ConversionComparison
from .differences import Column, ComparedModel, Difference, Value, best_of
from .html import render_html
from .markdown import render_markdown
from .pareto import Point, front, pareto_chart
from .writing import remove_old_pictures, write_page


def write_comparison(comparison: ConversionComparison, path: Path, *, metric: str | None) -> ConversionComparison:
    """Write the page and its Markdown twin; returns the comparison with their paths.

    Args:
        comparison: what was found.
        path: the page.
        metric: key of the column of quality in pictures against speed; None means the first.

    Raises:
        OutputError: they cannot be written.
    """
    page = _page(comparison, metric)
    markdown_path = path.with_suffix(".md")
    html, (markdown, pictures) = render_html(page), render_markdown(page)
    try:
        remove_old_pictures(markdown_path, set(pictures))
        write_page(path, html, markdown_path, markdown, pictures)
    except OSError as error:
        raise OutputError(f"{error.filename or path} cannot be written: {error.strerror or error}.") from error
    return replace(comparison, files=(path, markdown_path))


def printed(column: Column, value: float | None) -> str:
    """A number of a column as text."""
    if column.style == "bytes":
        return size(value)
    if column.style == "seconds":
        return duration(value)
    return number(value) if column.style == "ms" else amount(value, column.style)


def _page(comparison: ConversionComparison, metric: str | None) -> Page:
    judged = next((c for c in comparison.quality if metric in (None, c.key)), None)
    parts = (
        section("table", "Side by side", [_table(comparison), *(Text(r, small=True) for r in comparison.remarks)]),
        _pareto_section(comparison, judged),
        _quality_section(comparison),
        _difference_section(comparison),
        section("folders", "Where the numbers are from", [_folders(comparison)]),
    )
    conversions = [row for row in comparison.rows if row.folder is not None]
    return Page(
        title=f"{len(conversions)} conversions of {comparison.base}",
        subtitle="Comparison",
        summary=tuple(_summary(comparison, judged)),
        tiles=Tiles(()),
        sections=tuple(part for part in parts if part is not None),
        footer=f"Made by attnconv {__version__} from the measurements of {', '.join(r.name for r in conversions)}.",
    )


def _summary(comparison: ConversionComparison, judged: Column | None) -> list[str]:
    said = []
    best = best_of(comparison.rows, judged) if judged is not None else None
    if judged is not None and best is not None:
        base = next((row.values.get(judged.key) for row in comparison.rows if row.folder is None), None)
        beside = f" (base: {printed(judged, base.value)})" if base is not None else ""
        value = printed(judged, best.values[judged.key].value)
        close = [d.name for d in comparison.differences if d.column == judged.key and d.differs is False]
        told = f"; within chance of it: {', '.join(close)}" if close else ""
        level = [row for row in comparison.rows if judged.key in row.values and _leads(comparison, row, judged)]
        if len(level) == 1:
            said.append(f"{best.name} has the best {judged.metric} on {judged.task}, {value}{beside}{told}.")
        else:
            names = " and ".join(row.name for row in level) or "All"
            said.append(f"{names} are level in {judged.metric} on {judged.task}, {value}{beside}.")
    parts = []
    for column, words in zip(comparison.speed, map(_superlative, comparison.speed), strict=True):
        fastest = best_of(comparison.rows, column)
        first = [row for row in comparison.rows if column.key in row.values and _leads(comparison, row, column)]
        # Where several are level, none is first.
        if fastest is not None and len(first) == 1:
            unit = " ms per token" if column.style == "ms" else ""
            parts.append(f"{fastest.name} {words}, {printed(column, fastest.values[column.key].value)}{unit}")
    if parts and comparison.context is not None:
        said.append(f"At {count(comparison.context)} tokens, {'; '.join(parts)}.")
    return said


def _superlative(column: Column) -> str:
    return {
        DECODE: "generates fastest",
        PREFILL: "reads a prompt fastest",
        CACHE: "has the smallest cache",
    }[column.key]


def _table(comparison: ConversionComparison) -> Table:
    rows = []
    for row in comparison.rows:
        methods = ", ".join(f"{times} of {method}" for method, times in row.methods.items())
        cells = [Cell(row.name), Cell(methods or "softmax, as it was"), count_cell(row.parameters)]
        rows.append((*cells, *(_cell(comparison, row, column) for column in comparison.columns)))
    columns = ("model", "methods", "new parameters", *(column.label for column in comparison.columns))
    return Table("Every model, every headline figure; the best conversion in green", columns, tuple(rows))


def _cell(comparison: ConversionComparison, row: ComparedModel, column: Column) -> Cell:
    found = row.values.get(column.key)
    if found is None:
        return Cell(MISSING)
    tone: Tone = "good" if _leads(comparison, row, column) else ""
    return Cell(printed(column, found.value), found.value, tone, note=_ends(column, found))


def _leads(comparison: ConversionComparison, row: ComparedModel, column: Column) -> bool:
    """Whether a conversion is best in a column, alone or with others, and not level with all of them."""
    best = best_of(comparison.rows, column)
    if best is None or row.folder is None:
        return False
    shown = [
        printed(column, other.values[column.key].value)
        for other in comparison.rows
        if other.folder is not None and column.key in other.values
    ]
    own = printed(column, row.values[column.key].value)
    return own == printed(column, best.values[column.key].value) and (len(shown) == 1 or len(set(shown)) > 1)


def _ends(column: Column, value: Value) -> str:
    if value.interval is None:
        return ""
    if column.style in ("number", "percent"):
        return span(value.interval, column.style)
    return " to ".join(printed(column, end) for end in value.interval)


def _pareto_section(comparison: ConversionComparison, judged: Column | None) -> Section | None:
    """A picture for each cost; where no speed was measured, the remarks have said how to measure it."""
    if judged is None:
        return None
    charts, rows = [], []
    for column in comparison.speed:
        points = _points(comparison.rows, column, judged)
        if len(points) < 2:
            continue
        best = front(points, better=judged.better)
        names = ", ".join(point.name for point in best)
        percent = 100 if judged.style == "percent" else 1
        drawn = [
            replace(
                point,
                quality=percent * point.quality,
                interval=point.interval and (percent * point.interval[0], percent * point.interval[1]),
            )
            for point in points
        ]
        axes = {
            "x": Axis(column.label, log=True, bytes=column.style == "bytes"),
            "y": Axis(judged.label + (", %" if percent == 100 else ""), log=judged.style == "number"),
        }
        charts.append(
            Chart(
                f"compare-pareto-{column.key}",
                f"{judged.label} against {column.key}",
                f"No model beats those on the line in both: {names}.",
                partial(pareto_chart, drawn, better=judged.better, **axes),
            )
        )
        for point in points:
            cells = (Cell(column.label), Cell(point.name), Cell(printed(column, point.cost), point.cost))
            on = "on the front" if point in best else "behind it"
            rows.append((*cells, Cell(printed(judged, point.quality), point.quality), Cell(on)))
    if not charts:
        return None
    side = "lower" if judged.better == "lower" else "upper"
    words = f"Better is towards the {side} left. Filled points are on the front: no other model beats them in both."
    table = Table("The points", ("cost", "model", "cost of it", judged.label, "front"), tuple(rows), collapsed=True)
    return section("pareto", "Quality against speed", [Text(words, small=True), Charts(tuple(charts)), table])


def _points(rows: Sequence[ComparedModel], cost: Column, quality: Column) -> list[Point]:
    return [
        Point(
            row.name,
            row.values[cost.key].value,
            row.values[quality.key].value,
            row.values[quality.key].interval,
            row.folder is None,
        )
        for row in rows
        if cost.key in row.values and quality.key in row.values
    ]


def _quality_section(comparison: ConversionComparison) -> Section | None:
    charts = []
    for place, column in enumerate(comparison.quality):
        measured = [row for row in comparison.rows if column.key in row.values]
        factor = 100 if column.style == "percent" else 1
        dots, base = [], None
        for row in measured:
            found = row.values[column.key]
            ends = None if found.interval is None else (factor * found.interval[0], factor * found.interval[1])
            dots.append(Dot(row.name, factor * found.value, ends, printed(column, found.value)))
            base = factor * found.value if row.folder is None else base
        description = "; ".join(f"{dot.label} {dot.text}" for dot in dots)
        unit = f"{column.label}{', %' if factor == 100 else ''}"
        drawer = partial(dot_chart, dots, middle=base, label=unit, log=False)
        charts.append(Chart(f"compare-quality-{place}", column.label, f"{description}.", drawer))
    words = "Dots with 95 % intervals; the dotted line is the base."
    blocks: list[Block | None] = [Text(words, small=True), Charts(tuple(charts))]
    return section("quality", "Quality", blocks if charts else [])


def _difference_section(comparison: ConversionComparison) -> Section | None:
    tables = []
    for place, column in enumerate(comparison.quality):
        rows = [_difference_cells(row) for row in comparison.differences if row.column == column.key]
        best = best_of(comparison.rows, column)
        if rows and best is not None:
            columns = ("model", f"change from {best.name}", "verdict", "same items")
            tables.append(Table(f"{column.label}, against {best.name}", columns, tuple(rows), collapsed=place > 0))
    words = "Each conversion against the best one, with 95 % bootstrap intervals over the items that both answered."
    return section("differences", "Is the difference real?", [Text(words, small=True), *tables] if tables else [])


def _difference_cells(row: Difference) -> tuple[Cell, ...]:
    verdict = {None: "one item", True: "differs", False: "within chance"}[row.differs]
    between = change_span(row.interval, row.compare, row.style)
    shown = Cell(change(row.change, row.compare, row.style), row.change, note=between)
    return Cell(row.name), shown, Cell(verdict), Cell("yes" if row.paired else "no")


def _folders(comparison: ConversionComparison) -> Table:
    rows = tuple(texts(row.name, row.folder) for row in comparison.rows if row.folder is not None)
    return Table("Folders", ("model", "folder"), rows)
