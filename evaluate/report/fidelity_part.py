"""Inside the layers: how close attention maps and outputs are to the base's, and what methods say of themselves."""

from collections.abc import Mapping, Sequence
from functools import partial

from ...files.documents import Number
from ...formats import number, ratio
from ..engine.items import Figure
from ..engine.schema import TaskResult
from ..tasks.fidelity import FidelityExtra, HeadMap, LayerStatistic
from .blocks import Block, Cell, Chart, Charts, Section, Table, Text, section
from .cells import amount_cell
from .charts import Axis, Dot, Series, dot_chart, line_chart
from .drawing import BASE, COLORS, MODEL
from .gathering import Report
from .heatmaps import heat_chart
from .quality_part import figure_table

# Heads whose attention is drawn, the teacher's beside the student's.
MAPS = 12


def fidelity_section(report: Report) -> Section | None:
    """KL by layer and head, errors by layer, and maps of single heads."""
    blocks: list[Block | None] = []
    for name, task in report.tasks("fidelity").items():
        overall = [(name, figure) for figure in task.figures if not figure.group]
        blocks.append(figure_table("Over all layers", overall) if overall else None)
        grids = _by_place(task, {"layer", "head"})
        lines = _by_place(task, {"layer"})
        charts = [
            _grid_chart(f"{_slug(name)}-grid-{n}", metric, rows) for n, (metric, rows) in enumerate(grids.items())
        ]
        charts += [
            _line_chart(f"{_slug(name)}-line-{n}", metric, rows)
            for n, (metric, rows) in enumerate(lines.items())
            # One layer makes no line; the table has it.
            if sum(figure.model is not None for figure in rows) > 1
        ]
        blocks.append(Charts(tuple(charts)) if charts else None)
        for rows in (*grids.values(), *lines.values()):
            labelled = [(_place(figure), figure) for figure in rows]
            caption = f"{rows[0].metric}, every {'head' if 'head' in rows[0].group else 'layer'}"
            blocks.append(figure_table(caption, labelled, first="place", collapsed=True))
        blocks += _maps(name, report.fidelity.get(name, []))
    return section("fidelity", "Attention maps against the base", blocks)


def statistics_section(report: Report) -> Section | None:
    """What the methods say of themselves, whatever that is, and what is lost without a part of them."""
    blocks: list[Block | None] = []
    for name, extras in report.fidelity.items():
        blocks += _statistics(name, extras)
    for name, task in report.tasks("path_use").items():
        rows = [(", ".join(map(str, figure.group.values())), figure) for figure in task.figures if figure.group]
        if rows:
            meaning = "; ".join(metric.meaning for metric in task.metrics if metric.meaning)
            said = "Path use: what a text costs the model when one path of its attention is left out."
            blocks.append(Text(f"{said} {meaning[:1].upper()}{meaning[1:]}." if meaning else said, small=True))
            blocks += [_path_chart(f"{_slug(name)}-paths", rows), figure_table(name, rows, first="left out")]
    return section("statistics", "What the method does, layer by layer", blocks)


def _path_chart(id: str, rows: Sequence[tuple[str, Figure]]) -> Charts:
    dots = [
        Dot(f"without {path}", figure.model, figure.interval, ratio(figure.model))
        for path, figure in rows
        if figure.model is not None
    ]
    label = rows[0][1].metric
    description = f"{label}: {'; '.join(f'{dot.label} {dot.text}' for dot in dots)}."
    drawer = partial(dot_chart, dots, middle=1.0, label=label, log=True)
    return Charts((Chart(id, "Without one path", description, drawer),) if dots else ())


def _slug(name: str) -> str:
    return "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in name.lower())


def _by_place(task: TaskResult, keys: set[str]) -> dict[str, list[Figure]]:
    found: dict[str, list[Figure]] = {}
    for figure in task.figures:
        if set(figure.group) == keys:
            found.setdefault(figure.metric, []).append(figure)
    return found


def _place(figure: Figure) -> str:
    return ", ".join(f"{key} {value}" for key, value in figure.group.items())


def _layer(figure: Figure) -> int:
    """The layer's number, which a module's name holds too."""
    value = figure.group["layer"]
    if isinstance(value, str):
        digits = [part for part in value.split(".") if part.isdecimal()]
        return int(digits[0]) if digits else 0
    return int(value)


def _grid_chart(id: str, metric: str, figures: Sequence[Figure]) -> Chart:
    layers = sorted({_layer(figure) for figure in figures})
    heads = sorted({int(figure.group["head"]) for figure in figures})
    found = {(int(figure.group["head"]), _layer(figure)): figure.model for figure in figures}
    grid = [[found.get((head, layer)) for layer in layers] for head in heads]
    known = [value for value in found.values() if value is not None]
    description = f"{metric} of {len(heads)} heads in {len(layers)} layers, at most {number(max(known, default=None))}."
    names = _names(layers)
    drawer = partial(heat_chart, grid, x="layer", y="head", columns=names)
    return Chart(id, f"{metric} by layer and head", description, drawer)


def _names(layers: Sequence[int]) -> list[str]:
    """Names of the columns; every one only where they fit, and none where they just count from 0."""
    if list(layers) == list(range(len(layers))):
        return []
    step = -(-len(layers) // 10)
    return [str(layer) if place % step == 0 else "" for place, layer in enumerate(layers)]


def _line_chart(id: str, metric: str, figures: Sequence[Figure]) -> Chart:
    known = [(_layer(figure), figure.model, figure.interval) for figure in figures if figure.model is not None]
    rows = sorted(known, key=lambda row: row[0])
    lows = [None if interval is None else interval[0] for _, _, interval in rows]
    highs = [None if interval is None else interval[1] for _, _, interval in rows]
    values = [value for _, value, _ in rows]
    series = [Series(metric, [layer for layer, _, _ in rows], values, MODEL, lows, highs)]
    worst = max(values, default=None)
    description = f"{metric} of {len(rows)} layers; the largest is {number(worst)}."
    return Chart(
        id, f"{metric} by layer", description, partial(line_chart, series, Axis("layer", whole=True), Axis(metric))
    )


def _maps(name: str, extras: Sequence[FidelityExtra]) -> list[Block]:
    """Attention of single heads, of the first window that has any."""
    chosen = next((extra for extra in extras if extra.maps), None)
    if chosen is None:
        return []
    charts: list[Chart] = []
    tables: list[Block] = []
    for place, row in enumerate(chosen.maps[:MAPS]):
        head = f"Layer {row.layer_index}, head {row.head}"
        for role, grid, color in (("base", row.teacher, BASE), ("converted", row.student, MODEL)):
            description = (
                f"Attention of the {role} model, layer {row.layer_index}, head {row.head}; KL {number(row.kl)}."
            )
            # The first token takes most of many heads' attention; the others would all be white beside it.
            top = _robust_top(row.teacher)
            drawer = partial(heat_chart, grid, x="key token", y="query token", color=color, square=True, top=top)
            title = f"{head}: {role}" + (f", KL {number(row.kl)}" if row.kl is not None and role == "converted" else "")
            charts.append(Chart(f"{_slug(name)}-map-{place}-{role}", title, description, drawer))
        tables.append(_map_table(head, row, chosen.tokens))
    size = chosen.size or len(chosen.maps[0].teacher)
    what = (
        f"of the first {size} tokens" if chosen.tokens is not None else f"in {size} patches a side, the largest of each"
    )
    remark = f"Attention weights {what}; each row is a query, dark is much. Both models are drawn on one scale."
    return [Text(remark, small=True), Charts(tuple(charts), paired=True), *tables]


def _robust_top(grid: Sequence[Sequence[Number]]) -> float:
    values = sorted(value for row in grid for value in row if value)
    return max(values[int(0.97 * (len(values) - 1))], 1e-6) if values else 1.0


def _map_table(head: str, row: HeadMap, tokens: Sequence[str] | None) -> Table:
    def weights(line: Sequence[Number], place: int) -> Cell:
        return Cell(
            " ".join("-" if value is None else f"{value:.2f}".lstrip("0") or "0" for value in line[: place + 1])
        )

    rows = tuple(
        (
            Cell(str(place), float(place)),
            Cell(repr(tokens[place])[1:-1] if tokens is not None and place < len(tokens) else ""),
            weights(teacher, place),
            weights(student, place),
        )
        for place, (teacher, student) in enumerate(zip(row.teacher, row.student, strict=False))
    )
    columns = ("query", "token", "base: weights of keys 0 to query", "converted")
    return Table(f"{head}: all weights", columns, rows, collapsed=True)


def _statistics(name: str, extras: Sequence[FidelityExtra]) -> list[Block]:
    """Each statistic over the layers, the mean over windows; a line for one number per layer, else a grid."""
    found: dict[str, dict[int, list[LayerStatistic]]] = {}
    for extra in extras:
        for row in extra.statistics:
            found.setdefault(row.name, {}).setdefault(row.layer_index, []).append(row)
    blocks: list[Block] = []
    charts: list[Chart] = []
    for place, (label, by_layer) in enumerate(found.items()):
        means = {layer: _means(rows) for layer, rows in sorted(by_layer.items())}
        first = next(iter(by_layer.values()))[0]
        if first.meaning:
            blocks.append(Text(f"{label[:1].upper()}{label[1:]}: {first.meaning}.", small=True))
        if len(means) > 1 or max(map(len, means.values())) > 1:
            charts.append(_statistic_chart(f"{_slug(name)}-statistic-{place}", first, means))
        blocks.append(_statistic_table(first, means))
    return [*([Charts(tuple(charts))] if charts else []), *blocks]


def _means(rows: Sequence[LayerStatistic]) -> list[Number]:
    width = max(len(row.values) for row in rows)
    means: list[Number] = []
    for place in range(width):
        known = [row.values[place] for row in rows if place < len(row.values)]
        present = [value for value in known if value is not None]
        means.append(sum(present) / len(present) if present else None)
    return means


def _statistic_chart(id: str, first: LayerStatistic, means: Mapping[int, Sequence[Number]]) -> Chart:
    percent = first.style == "percent"
    unit = f"{first.name}, %" if percent else first.name
    factor = 100 if percent else 1
    width = max(len(values) for values in means.values())
    description = f"{first.name} by layer" + (f" and {first.per}" if width > 1 else "") + "; the table has the numbers."
    if width > 1:
        grid = [
            [factor * value if (value := _at(values, place)) is not None else None for values in means.values()]
            for place in range(width)
        ]
        drawer = partial(
            heat_chart,
            grid,
            x="layer",
            y=first.per,
            columns=_names(list(means)),
            color=COLORS[2],
            top=100.0 if percent else None,
        )
        return Chart(id, f"{unit}, by layer and {first.per}", description, drawer)
    rows = [(layer, factor * values[0]) for layer, values in means.items() if values and values[0] is not None]
    series = [Series(first.name, [row[0] for row in rows], [row[1] for row in rows], COLORS[2])]
    return Chart(
        id, f"{unit}, by layer", description, partial(line_chart, series, Axis("layer", whole=True), Axis(unit))
    )


def _at(values: Sequence[Number], place: int) -> Number:
    return values[place] if place < len(values) else None


def _statistic_table(first: LayerStatistic, means: Mapping[int, Sequence[Number]]) -> Table:
    width = max(len(values) for values in means.values())
    columns = ("layer", *(f"{first.per} {place}" for place in range(width))) if width > 1 else ("layer", first.name)
    rows = tuple(
        (Cell(str(layer), float(layer)), *(amount_cell(_at(values, place), first.style) for place in range(width)))
        for layer, values in means.items()
    )
    return Table(f"{first.name} of every layer", columns, rows, collapsed=True)
