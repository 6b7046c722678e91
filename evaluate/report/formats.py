"""How reports print numbers."""

import math
from collections.abc import Mapping
from typing import Any

from ..engine.items import Figure
from .blocks import Cell, Tone

MISSING = "-"


def number(value: float | None) -> str:
    """Four digits, without an exponent as long as possible."""
    if value is None or not math.isfinite(value):
        return MISSING
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("-", "−", 1) if value < 0 else f"{value:.4g}"


def amount(value: float | None, style: str) -> str:
    """A number in its style: `0.25` as percent is `25.0%`."""
    return number(value) if style != "percent" or value is None else f"{100 * value:.1f}%"


def span(interval: tuple[float, float] | None, style: str) -> str:
    """`1.2 to 1.4`."""
    return MISSING if interval is None else " to ".join(amount(end, style) for end in interval)


def change(value: float | None, compare: str, style: str) -> str:
    """A ratio as `×1.25`, a difference with its sign; of percentages, in points."""
    if value is None:
        return MISSING
    if compare == "ratio":
        return f"×{number(value)}"
    sign = "+" if value > 0 else "−" if value < 0 else "±"
    return f"{sign}{abs(100 * value):.1f} points" if style == "percent" else f"{sign}{number(abs(value))}"


def change_span(interval: tuple[float, float] | None, compare: str, style: str) -> str:
    """The interval of a change."""
    if interval is None:
        return MISSING
    unit = " points" if compare != "ratio" and style == "percent" else ""
    return " to ".join(change(end, compare, style).removesuffix(unit) for end in interval) + unit


def neutral(compare: str) -> float:
    """The change that is none."""
    return 1.0 if compare == "ratio" else 0.0


def verdict(figure: Figure) -> tuple[str, Tone]:
    """Whether the change is beyond chance, and in which direction."""
    if figure.change is None:
        return MISSING, ""
    if figure.change_interval is None:
        return "one item", ""
    low, high = figure.change_interval
    middle = neutral(figure.compare)
    if low <= middle <= high:
        return "within chance", ""
    improved = (low > middle) == (figure.better == "higher")
    return ("better", "good") if improved else ("worse", "bad")


def amount_cell(value: float | None, style: str = "number") -> Cell:
    """A cell with a number."""
    return Cell(amount(value, style), value)


def count_cell(value: float | None) -> Cell:
    """A cell with a whole number in full."""
    return Cell(MISSING if value is None else f"{value:,.0f}", value)


def size(value: float | None) -> str:
    """`1536` as `1.5 KiB`."""
    if value is None:
        return MISSING
    left, units = float(value), ["B", "KiB", "MiB", "GiB", "TiB"]
    while left >= 1024 and len(units) > 1:
        left /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{left:.1f} {units[0]}"


def size_cell(value: float | None) -> Cell:
    """A cell with a number of bytes."""
    return Cell(size(value), value)


def duration(seconds: float | None) -> str:
    """`0.0123` as `12.3 ms`."""
    if seconds is None:
        return MISSING
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.4g} s"


def group_label(group: Mapping[str, Any]) -> str:
    """`position 0-512, depth 0.5`."""
    return ", ".join(f"{key} {_plain(value)}" for key, value in group.items())


def _plain(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def options(values: Mapping[str, Any]) -> str:
    """`window=64, mixing=0.1`."""
    return ", ".join(f"{key}={value}" for key, value in values.items() if value is not None) or "none"


def ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    runs: list[list[int]] = []
    for item in sorted(numbers):
        if runs and item == runs[-1][-1] + 1:
            runs[-1].append(item)
        else:
            runs.append([item])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
