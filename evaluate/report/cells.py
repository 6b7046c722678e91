"""Cells of reports: numbers as `formats` prints them, with what they are sorted by, and verdicts."""

from collections.abc import Mapping
from typing import Any

from ...formats import MISSING, amount, count, number, size
from ..engine.items import Figure
from .blocks import Cell, Tone


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
    return Cell(count(value), value)


def size_cell(value: float | None) -> Cell:
    """A cell with a number of bytes."""
    return Cell(size(value), value)


def group_label(group: Mapping[str, Any]) -> str:
    """`position 0-512, depth 0.5`."""
    return ", ".join(f"{key} {_plain(value)}" for key, value in group.items())


def _plain(value: Any) -> str:
    # Bounds of a range stand in texts such as 512-1024, so that small ones have no comma either.
    if isinstance(value, int) and abs(value) >= 10_000:
        return count(value)
    return number(value) if isinstance(value, float) else str(value)
