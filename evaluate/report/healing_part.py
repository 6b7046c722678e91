"""Healing: losses of the stages, errors of the layers, and what the receipt says was measured on the way."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from ...distill.metrics import Record
from ...formats import count, number, percent
from .blocks import Block, Cell, Chart, Charts, Section, Table, Text, section
from .cells import amount_cell, count_cell
from .charts import Axis, Mark, Series, line_chart
from .drawing import BASE, COLORS, MODEL
from .gathering import Report
from .heatmaps import heat_chart

LOSSES = {
    "attention_transfer": "attention transfer loss",
    "lora": "next-token loss, nats",
    "logits": "KL from the teacher, nats",
    "balance": "next-token, balance and z loss",
}
ZEROS = "as far off as zeros"


def healing_section(report: Report) -> Section | None:
    """How the model became what it is."""
    stages = [list(lines) for _, lines in groupby(report.records, key=lambda record: record.index)]
    # One step makes no curve.
    charts = [
        _loss_chart(lines) for lines in stages if len({line.tokens for line in lines if math.isfinite(line.loss)}) > 1
    ]
    layers = _layer_errors(report.records)
    blocks: list[Block | None] = [_moments(report)]
    if any(sum(map(math.isfinite, errors.values())) > 1 for errors in layers.values()):
        charts.append(_layer_chart(layers))
    charts += _load_charts(report.records)
    if charts:
        blocks.append(Charts(tuple(charts)))
    blocks += [_record_table(report.records), _layer_table(layers)]
    if report.receipt is not None and report.receipt.start_distance:
        said = "; ".join(
            f"{key.replace('_', ' ')} {number(value)}" for key, value in report.receipt.start_distance.items()
        )
        blocks.append(Text(f"Distance from the base right after the swap, before any healing: {said}.", small=True))
    return section("healing", "Healing, stage by stage", blocks)


def _moments(report: Report) -> Table | None:
    """The receipt's own measurements: the teacher, right after the swap, after each stage."""
    rows = report.receipt.metrics if report.receipt else []
    if not rows:
        return None
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "stage"))
    names = {"bits_per_character": "bits/char"}
    for unit in ("tokens", "images"):
        names |= {unit: f"trained {unit}", f"{unit}_per_second": f"{unit}/s"}
    cells = tuple(
        (Cell(str(row.get("stage", "")).replace("_", " ")), *(_value(row, key) for key in keys)) for row in rows
    )
    columns = ("after", *(names.get(key, key.replace("_", " ")) for key in keys))
    return Table("Measured during the conversion", columns, cells)


def _value(row: Mapping[str, Any], key: str) -> Cell:
    value = row.get(key)
    if isinstance(value, list):
        return Cell(", ".join(count(part) if isinstance(part, int) else str(part) for part in value))
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        return Cell(str(value))
    return count_cell(value) if isinstance(value, int) else amount_cell(value)


def _loss_chart(lines: Sequence[Record]) -> Chart:
    known = [(line.tokens, line.loss) for line in lines if math.isfinite(line.loss)]
    tokens, losses = [row[0] for row in known], [row[1] for row in known]
    first = lines[0]
    series = [Series(first.stage, tokens, losses, COLORS[first.index % len(COLORS)])]
    kind = LOSSES.get(first.stage, "loss")
    description = f"{kind} from {number(losses[0])} to {number(losses[-1])} over {count(tokens[-1])} {first.unit}."
    axes = Axis(f"training {first.unit}"), Axis(kind, log=True)
    name = f"Stage {first.index + 1}: {first.stage.replace('_', ' ')}"
    return Chart(f"loss-{first.index}", name, description, partial(line_chart, series, *axes))


def _layer_errors(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Errors of the layers in the first and in the last record that have them, by moment."""
    having = [record for record in records if any(map(math.isfinite, record.layers.values()))]
    chosen = [having[0], having[-1]] if len(having) > 1 else having
    return {f"after {count(record.tokens)} {record.unit}": record.layers for record in chosen}


def _layer_chart(moments: Mapping[str, Mapping[str, float]]) -> Chart:
    series = []
    for (label, layers), color in zip(moments.items(), (BASE, MODEL), strict=False):
        rows = [(place, value) for place, value in enumerate(layers.values()) if math.isfinite(value)]
        series.append(Series(label, [row[0] for row in rows], [row[1] for row in rows], color))
    axes = Axis("converted layer", whole=True), Axis("relative squared error", log=True)
    marks = [Mark(1.0, ZEROS)] if any(value > 0.5 for line in series for value in line.ys) else []
    worst = max(series[-1].ys)
    description = f"Relative squared error of each layer's attention output; the largest is {number(worst)} at the end."
    drawer = partial(line_chart, series, *axes, marks=marks)
    return Chart("layer-errors", "Output error of each converted layer", description, drawer)


def _load_charts(records: Sequence[Record]) -> list[Chart]:
    """Which experts tokens went to, layer by layer, in the first and in the last record that know it."""
    having = [record for record in records if record.experts]
    chosen = dict(zip(("at the beginning", "at the end"), [having[0], having[-1]] if having else [], strict=False))
    charts = []
    for moment, record in chosen.items():
        loads = list(record.experts.values())
        count_of_experts = max(len(load.shares) for load in loads)
        grid = [
            [
                load.shares[expert] if expert < len(load.shares) and math.isfinite(load.shares[expert]) else None
                for load in loads
            ]
            for expert in range(count_of_experts)
        ]
        worst = min(load.entropy for load in loads)
        description = (
            f"Share of the tokens' choices that fell on each of {count_of_experts} experts in {len(loads)} layers; the "
            f"least even layer has {percent(worst)} of the entropy of an even load."
        )
        drawer = partial(heat_chart, grid, x="layer with experts, in the model's order", y="expert")
        name = f"Load of the experts {moment} of the healing"
        charts.append(Chart(f"expert-load-{moment.rpartition(' ')[2]}", name, description, drawer))
    return charts


def _record_table(records: Sequence[Record]) -> Table | None:
    if not records:
        return None
    rows = tuple(
        (
            Cell(f"{record.index + 1}: {record.stage.replace('_', ' ')}"),
            count_cell(record.step),
            count_cell(record.tokens),
            amount_cell(record.loss),
            amount_cell(record.learning_rate),
            amount_cell(record.grad_norm),
            amount_cell(record.tokens_per_second),
        )
        for record in records
    )
    unit = " or ".join(dict.fromkeys(record.unit for record in records))
    columns = ("stage", "step", unit, "loss", "learning rate", "gradient norm", f"{unit} per second")
    return Table("Every line of metrics.jsonl", columns, rows, collapsed=True)


def _layer_table(moments: Mapping[str, Mapping[str, float]]) -> Table | None:
    if not moments:
        return None
    names = list(dict.fromkeys(name for layers in moments.values() for name in layers))
    rows = tuple((Cell(name), *(amount_cell(layers.get(name)) for layers in moments.values())) for name in names)
    return Table("Output error of each layer", ("module", *moments), rows, collapsed=True)
