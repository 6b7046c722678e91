"""Lines over a context or over training, and dots with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...formats import short, size
from .drawing import COLORS, INK, MUTED, SURFACE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beside this many points a mark for each would hide the line.
MARKED_POINTS = 40
DOTTED = (0, (2, 2))
# Letters of all names together, with room for their marks, that fit into one line above a chart.
LEGEND_WIDTH = 50


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: its name.
        xs: where.
        ys: how much.
        lows: lower ends of the intervals, if there are any; one with None has none.
        highs: upper ends.
        color: its colour.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: str
    lows: Sequence[float | None] = ()
    highs: Sequence[float | None] = ()


@dataclass(frozen=True)
class Axis:
    """One axis: its label, whether equal factors are equally far, and names for its places.

    Attributes:
        label: what it counts, with the unit.
        log: whether it may be logarithmic; it is where its values span a factor of two.
        names: names of the places 0, 1, 2, ... if they are no numbers.
        bytes: whether its numbers are bytes.
        whole: whether only whole numbers make sense.
    """

    label: str
    log: bool = False
    names: Sequence[str] = ()
    bytes: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Mark:
    """A dotted line across, with its meaning."""

    at: float
    label: str
    vertical: bool = False


@dataclass(frozen=True)
class Dot:
    """One row of a dot chart.

    Attributes:
        label: what changed.
        value: by how much.
        interval: 95 % interval of that, if there is one.
        text: both in words.
        tone: whether it is good or bad.
    """

    label: str
    value: float
    interval: tuple[float, float] | None
    text: str
    tone: str = ""


def line_chart(
    series: Sequence[Series], x: Axis, y: Axis, *, marks: Sequence[Mark] = (), height: float = 2.9
) -> "Figure":
    """Lines with bands or bars for their intervals, named above the chart."""
    figure, panel = new_figure(height)
    for line in series:
        few = len(line.xs) <= MARKED_POINTS
        panel.plot(
            line.xs,
            line.ys,
            color=line.color,
            linewidth=1.8,
            marker="o" if few else None,
            markersize=4,
            label=line.label,
        )
        _intervals(panel, line, bars=few)
    scale(panel, "x", x, [value for line in series for value in line.xs])
    ends = [end for line in series for end in (*line.lows, *line.highs) if end is not None]
    scale(panel, "y", y, [*(value for line in series for value in line.ys), *ends])
    panel.grid(visible=True, axis="y")
    panel.tick_params(length=0)
    for mark in marks:
        across = panel.axvline if mark.vertical else panel.axhline
        across(mark.at, color=MUTED, linewidth=1, linestyle=DOTTED, zorder=1, label=mark.label)
    labels = [line.label for line in series] + [mark.label for mark in marks]
    if len(labels) > 1:
        columns = len(labels) if sum(len(label) + 5 for label in labels) < LEGEND_WIDTH else 2
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, handlelength=1.2, columnspacing=1.2)
    return figure


def dot_chart(dots: Sequence[Dot], *, middle: float | None, label: str, log: bool) -> "Figure":
    """A row for each change: its name and number above, dot and interval below; a line where nothing changed."""
    figure, panel = new_figure(0.75 + 0.46 * len(dots))
    colors = {"good": COLORS[2], "bad": COLORS[4]}
    for row, dot in enumerate(dots):
        color = colors.get(dot.tone, MUTED)
        if dot.interval is not None:
            panel.plot(dot.interval, (row, row), color=color, linewidth=2.4, solid_capstyle="round")
        panel.plot([dot.value], [row], "o", color=color, markersize=6.5)
        _caption(panel, dot.label, row, at=0, color=INK)
        _caption(panel, dot.text, row, at=1, color=color if dot.tone else MUTED)
    if middle is not None:
        panel.axvline(middle, color=MUTED, linewidth=1, linestyle=DOTTED, zorder=0)
    values = [
        *([] if middle is None else [middle]),
        *(dot.value for dot in dots),
        *(end for dot in dots for end in dot.interval or ()),
    ]
    scale(panel, "x", Axis(label, log=log), values)
    panel.margins(x=0.06)
    panel.set_ylim(len(dots) - 0.65, -0.75)
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.tick_params(length=0)
    return figure


def _intervals(panel: "Axes", line: Series, *, bars: bool) -> None:
    rows = [
        (x, y, low, high)
        for x, y, low, high in zip(line.xs, line.ys, line.lows, line.highs, strict=False)
        if low is not None and high is not None
    ]
    if not rows:
        return
    xs, ys, lows, highs = zip(*rows, strict=True)
    if not bars:
        panel.fill_between(xs, lows, highs, color=line.color, alpha=0.2, linewidth=0)
        return
    spread = [
        [max(0.0, y - low) for y, low in zip(ys, lows, strict=True)],
        [max(0.0, high - y) for y, high in zip(ys, highs, strict=True)],
    ]
    panel.errorbar(xs, ys, yerr=spread, fmt="none", color=line.color, ecolor=line.color, elinewidth=1.4, capsize=3)


def scale(panel: "Axes", name: str, axis: Axis, values: Sequence[float], *, from_zero: bool = True) -> None:
    """Plain numbers on an axis, logarithmic where asked for and worth it; else a y axis may begin at zero."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    side = panel.xaxis if name == "x" else panel.yaxis
    side.set_label_text(axis.label)
    if axis.names:
        side.set_major_locator(FixedLocator(range(len(axis.names))))
        side.set_major_formatter(FuncFormatter(lambda value, _: _name(axis.names, value)))
        panel.set_xlim(-0.4, len(axis.names) - 0.6)
        return
    low, high = min(values), max(values)
    linear = not axis.log or low <= 0 or high < 2 * low
    if not linear:
        (panel.set_xscale if name == "x" else panel.set_yscale)("log")
    # After the scale, which brings a formatter of its own.
    side.set_major_formatter(FuncFormatter(lambda value, _: size(value) if axis.bytes else short(value)))
    if linear:
        side.set_major_locator(MaxNLocator(5, integer=axis.whole))
        if name == "y" and from_zero and not axis.log and low >= 0:
            panel.set_ylim(bottom=0)
        return
    # Names of bytes are wide.
    most = 4 if axis.bytes and name == "x" else 6
    ticks = _log_ticks(low, high, most, binary=axis.bytes or axis.whole)
    side.set_major_locator(FixedLocator(ticks if len(ticks) > 2 else MaxNLocator(4).tick_values(low, high)))
    side.set_minor_locator(NullLocator())


def _log_ticks(low: float, high: float, most: int, *, binary: bool) -> list[float]:
    """Round numbers between the ends of a logarithmic axis, `most` of them."""
    if binary:
        exponents = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
        ticks = [2.0**exponent for exponent in exponents]
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
        whole = [10.0**decade for decade in decades if low <= 10.0**decade <= high]
        ticks = whole if len(whole) > 2 else ticks
    inside = [tick for tick in ticks if low * 0.9 <= tick <= high * 1.1]
    stride = -(-len(inside) // most) or 1
    return inside[::-1][::stride][::-1]


def _caption(panel: "Axes", text: str, row: int, *, at: int, color: str) -> None:
    """A name above a row of a dot chart, at its left or right end, on a ground that hides the line of no change."""
    panel.annotate(
        shortened(text, 44),
        (at, row),
        (0, 7),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right" if at else "left",
        va="bottom",
        color=color,
        bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 1.5},
    )


def shortened(text: str, most: int) -> str:
    """A text of `most` letters at most, its middle left out where it is longer."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def _name(names: Sequence[str], value: float) -> str:
    place = round(value)
    return names[place] if 0 <= place < len(names) and abs(value - place) < 1e-6 else ""
