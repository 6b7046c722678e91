"""Quality before and after: every figure with its interval, by position, and by length and depth."""

from collections.abc import Mapping, Sequence
from functools import partial

from ...formats import amount, change, change_span, count, span
from ..engine.items import Figure
from ..engine.schema import TaskResult
from ..tasks.base import task_classes
from .blocks import Block, Cell, Chart, Charts, Section, Table, Text, section
from .cells import amount_cell, count_cell, group_label, neutral, verdict
from .charts import Axis, Dot, Series, dot_chart, line_chart
from .drawing import BASE, MODEL
from .gathering import Report
from .heatmaps import heat_chart

# What a group's keys are called where a chart splits by them.
POSITION, DEPTH = "position", "depth"
LENGTHS = {"length": "length, tokens", "chars": "length, characters"}


def quality_section(report: Report) -> Section | None:
    """Overall figures, the chart of changes, and the figures of every group."""
    elsewhere = [kind for kind, task in task_classes().items() if task.own_section]
    tasks = {name: task for name, task in report.tasks().items() if task.kind not in elsewhere}
    overall = [(name, figure) for name, task in tasks.items() for figure in task.figures if not figure.group]
    blocks: list[Block | None] = []
    if overall:
        remarks = report.evaluation.remarks if report.evaluation is not None else []
        blocks += [*map(Text, remarks), _explained(tasks), *change_charts(overall)]
        blocks.append(figure_table("All figures", overall))
    for name, task in tasks.items():
        split = [(group_label(figure.group), figure) for figure in task.figures if figure.group]
        if split:
            blocks.append(figure_table(f"{name}, by group", split, first="group", collapsed=True))
    return section("quality", "Quality before and after", blocks)


def position_section(report: Report) -> Section | None:
    """Perplexity by how far into its context a token is."""
    charts: list[Chart] = []
    tables: list[tuple[str, list[Figure]]] = []
    for name, task in report.tasks().items():
        for metric in task.metrics:
            found = [f for f in task.figures if f.metric == metric.name and set(f.group) == {POSITION}]
            if len(found) > 1:
                charts.append(_position_chart(f"position-{len(charts)}", name, metric.name, found))
                tables.append((name, found))
    rows = [(f"{name}: {figure.group[POSITION]}", figure) for name, found in tables for figure in found]
    blocks: list[Block | None] = [Charts(tuple(charts)), figure_table("By position", rows, first="tokens before it")]
    return section("position", "Along the context", blocks if charts else [])


def retrieval_section(report: Report) -> Section | None:
    """Recall by length and depth, the base's grid beside the model's."""
    blocks: list[Block | None] = []
    for name, task in report.tasks().items():
        for label, figures in _grids(task).items():
            title = f"{name}, {label}" if label else name
            blocks += [_retrieval_charts(f"retrieval-{len(blocks)}", title, figures), _retrieval_table(title, figures)]
    remark = "Depth is where in the text the answer lies: 0 is its beginning, 1 its end."
    return section("retrieval", "Retrieval by length and depth", [Text(remark, small=True), *blocks] if blocks else [])


def change_charts(figures: Sequence[tuple[str, Figure]]) -> list[Charts]:
    """A chart of changes for each unit that they come in."""
    kinds: dict[tuple[str, str], list[tuple[str, Figure]]] = {}
    for name, figure in figures:
        if figure.change is not None:
            kinds.setdefault((figure.compare, figure.style), []).append((name, figure))
    charts: list[Chart] = []
    for (compare, style), rows in kinds.items():
        unit = "ratio to the base" if compare == "ratio" else "change in points" if style == "percent" else "change"
        dots = [_dot(name, figure) for name, figure in rows]
        title = {"ratio to the base": "Ratio to the base", "change in points": "Change, percentage points"}.get(unit)
        described = "; ".join(f"{dot.label} {dot.text}" for dot in dots)
        charts.append(
            Chart(
                f"changes-{len(charts)}",
                title or "Change against the base",
                f"Dots with 95 % intervals. {described}.",
                partial(dot_chart, dots, middle=neutral(compare), label=unit, log=compare == "ratio"),
            )
        )
    return [Charts(tuple(charts))] if charts else []


def figure_table(
    caption: str, figures: Sequence[tuple[str, Figure]], *, first: str = "task", collapsed: bool = False
) -> Table:
    """Figures with everything that is known of them; columns that none of them fills are left out."""
    compared = any(figure.base is not None for _, figure in figures)
    tied = any(figure.at_least_as_good is not None for _, figure in figures)
    between = ["base", "converted", "change", "verdict", *(["wins or ties"] if tied else [])]
    columns = [first, "metric", *(between if compared else ["converted"]), "items"]
    rows = tuple((Cell(name), *_figure_cells(figure, compared=compared, tied=tied)) for name, figure in figures)
    return Table(caption, tuple(columns), rows, collapsed=collapsed)


def _figure_cells(figure: Figure, *, compared: bool, tied: bool) -> list[Cell]:
    style, cells = figure.style, [Cell(figure.metric)]
    own = Cell(amount(figure.model, style), figure.model, note=span(figure.interval, style))
    if not compared:
        return [*cells, own, count_cell(figure.count)]
    words, tone = verdict(figure)
    shown = change(figure.change, figure.compare, style)
    between = change_span(figure.change_interval, figure.compare, style)
    cells.append(Cell(amount(figure.base, style), figure.base, note=span(figure.base_interval, style)))
    cells += [own, Cell(shown, figure.change, tone, note=between), Cell(words, tone=tone)]
    if tied:
        cells.append(amount_cell(figure.at_least_as_good, "percent"))
    return [*cells, count_cell(figure.count)]


def _explained(tasks: Mapping[str, TaskResult]) -> Text:
    """What the metrics mean, once each."""
    meanings = {metric.name: metric.meaning for task in tasks.values() for metric in task.metrics if metric.meaning}
    said = "; ".join(f"{name}: {meaning}" for name, meaning in meanings.items())
    unpaired = any(f.change is not None and not f.paired for task in tasks.values() for f in task.figures)
    words = "Intervals are 95 % bootstrap intervals over items"
    words += "." if unpaired else ", those of changes over the same items for both models."
    return Text(f"{words} {said}." if said else words, small=True)


def _dot(name: str, figure: Figure) -> Dot:
    value = figure.change or 0.0
    factor = 100 if figure.compare != "ratio" and figure.style == "percent" else 1
    interval = figure.change_interval
    scaled = None if interval is None else (factor * interval[0], factor * interval[1])
    shown = change(figure.change, figure.compare, figure.style).removesuffix(" points")
    label = name if figure.metric in name else f"{name}: {figure.metric}"
    return Dot(label, factor * value, scaled, shown, verdict(figure)[1])


def _position_chart(id: str, name: str, metric: str, figures: Sequence[Figure]) -> Chart:
    factor = 100 if figures[0].style == "percent" else 1
    series = []
    for label, color, role in (("base", BASE, "base"), ("converted", MODEL, "model")):
        rows = [
            (place, factor * value, interval)
            for place, figure in enumerate(figures)
            for value, interval in [
                (figure.base, figure.base_interval) if role == "base" else (figure.model, figure.interval)
            ]
            if value is not None
        ]
        if rows:
            places, values, intervals = zip(*rows, strict=True)
            lows = [None if found is None else factor * found[0] for found in intervals]
            highs = [None if found is None else factor * found[1] for found in intervals]
            series.append(Series(label, places, values, color, lows, highs))
    names = [str(figure.group[POSITION]) for figure in figures]
    description = f"{metric} of {', '.join(line.label for line in series)} by position: {', '.join(names)}."
    axes = Axis("position in the context, tokens", names=names), Axis(metric)
    return Chart(id, f"{name}: {metric}", description, partial(line_chart, series, *axes))


def _grids(task: TaskResult) -> dict[str, list[Figure]]:
    """Figures by length and depth, a grid for each value of whatever else they are split by, if there is more."""
    full = [figure for figure in task.figures if DEPTH in figure.group and _length_key(figure)]
    grids: dict[str, list[Figure]] = {}
    for figure in full:
        rest = {key: value for key, value in figure.group.items() if key not in (*LENGTHS, DEPTH)}
        label = ", ".join(str(value) for value in rest.values())
        grids.setdefault(label if len(task.metrics) == 1 else f"{label} {figure.metric}".strip(), []).append(figure)
    if len(grids) > 1 and "" in grids:
        grids.pop("")
    return grids


def _length_key(figure: Figure) -> str:
    """What the length of this figure's texts is counted in; empty if it is not split by length."""
    return next((key for key in LENGTHS if key in figure.group), "")


def _retrieval_charts(id: str, title: str, figures: Sequence[Figure]) -> Charts:
    key = _length_key(figures[0])
    lengths = sorted({float(figure.group[key]) for figure in figures})
    depths = sorted({float(figure.group[DEPTH]) for figure in figures})
    charts = []
    for role, label in (("base", "base"), ("model", "converted")):
        found = {
            (float(figure.group[DEPTH]), float(figure.group[key])): figure.base if role == "base" else figure.model
            for figure in figures
        }
        if all(value is None for value in found.values()):
            continue
        grid = [[found.get((depth, length)) for length in lengths] for depth in depths]
        description = f"{figures[0].metric} of the {label} model by length and depth; the table has the numbers."
        printed = [["" if value is None else f"{100 * value:.0f}" for value in row] for row in grid]
        drawer = partial(
            heat_chart,
            grid,
            x=LENGTHS[key],
            y="depth",
            columns=[count(length) for length in lengths],
            rows=[f"{depth:g}" for depth in depths],
            top=1.0,
            texts=printed,
        )
        charts.append(Chart(f"{id}-{label}", f"{title}: {label}", description, drawer))
    return Charts(tuple(charts), paired=True)


def _retrieval_table(title: str, figures: Sequence[Figure]) -> Table:
    keys = (_length_key(figures[0]), DEPTH)
    rows = [(group_label({key: figure.group[key] for key in keys}), figure) for figure in figures]
    return figure_table(f"{title}, all cells", rows, first="cell", collapsed=True)


def headline(report: Report, *kinds: str, metric: str | None = None) -> tuple[str, Figure] | None:
    """The first overall figure of the first task of some kinds, with the task's name."""
    for name, task in report.tasks(*kinds).items():
        for figure in task.figures:
            if not figure.group and figure.model is not None and metric in (None, figure.metric):
                return name, figure
    return None
