"""How numbers are printed, everywhere: on the terminal, in reports, cards and messages.

A number has four significant digits, thousands are parted by commas, bytes are counted in powers of 1024, and a factor
is `1.250 x`. What is missing, or no number, is `-`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

MISSING = "-"
# What a figure of perplexity by position is called; the stretch of positions follows, such as `512-1024`.
POSITIONS = "novel_perplexity_at_"


def number(value: float | None) -> str:
    """Four digits, without an exponent as long as possible: `14.37`, `2,187`."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def significant(value: float | None, digits: int = 4) -> str:
    """As many digits as asked for, zeros at the end among them: `1.000`, `1,234`."""
    if value is None or not math.isfinite(value):
        return MISSING
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    # Far below one there would be nothing but zeros.
    return f"{value:.{digits - 1}e}" if before < -3 else f"{value:,.{max(0, digits - before)}f}"


def count(value: float | None) -> str:
    """A whole number in full: `12,345`."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def counted(value: int, name: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count(value)} {name}{'' if value == 1 else 's'}"


def size(value: float | None) -> str:
    """Bytes: `1536` as `1.5 KiB`."""
    if value is None:
        return MISSING
    left, units = float(value), ["B", "KiB", "MiB", "GiB", "TiB"]
    while left >= 1024 and len(units) > 1:
        left /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{left:.1f} {units[0]}"


def duration(seconds: float | None) -> str:
    """`0.0123` as `12.3 ms`, `75.31` as `75.3 s`, from two hours on `32.63 h`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds >= 7200:
        return f"{number(seconds / 3600)} h"
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def rate(per_second: float) -> str:
    """Something per second: `1,234`, and below ten `0.5`."""
    return f"{per_second:,.1f}" if per_second < 10 else f"{per_second:,.0f}"


def ratio(value: float | None, digits: int = 4) -> str:
    """A factor, `1.250 x`; of what is timed, three digits are enough."""
    text = significant(value, digits)
    return text if text == MISSING else f"{text} x"


def percent(value: float | None, digits: int = 1) -> str:
    """`0.25` as `25.0%`."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}%"


def perplexity(value: float | None) -> str:
    """Two digits after the point of what is small, none of what is large."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.{2 if value < 100 else 0}f}"


def amount(value: float | None, style: str) -> str:
    """A number in its style: `0.25` as percent is `25.0%`."""
    return percent(value) if style == "percent" else number(value)


def span(interval: tuple[float, float] | None, style: str) -> str:
    """`1.2 to 1.4`."""
    return MISSING if interval is None else " to ".join(amount(end, style) for end in interval)


def change(value: float | None, compare: str, style: str) -> str:
    """A ratio, or a difference with its sign; that of percentages is in points."""
    if value is None:
        return MISSING
    if compare == "ratio":
        return ratio(value)
    sign = "+" if value > 0 else "-" if value < 0 else "±"
    return f"{sign}{abs(100 * value):.1f} points" if style == "percent" else f"{sign}{number(abs(value))}"


def change_span(interval: tuple[float, float] | None, compare: str, style: str) -> str:
    """The interval of a change, its unit once: `-1.5 to +0.5 points`."""
    if interval is None:
        return MISSING
    unit = " x" if compare == "ratio" else " points" if style == "percent" else ""
    return " to ".join(change(end, compare, style).removesuffix(unit) for end in interval) + unit


def short(value: float) -> str:
    """For axes: `1500000` as `1.5M`; whole powers of two of a thousand and more as `4k`."""
    if value >= 1024 and value == int(value) and (int(value) & (int(value) - 1)) == 0 and value < 2**20:
        return f"{value / 1024:g}k"
    for unit, sign in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{sign}"
    return f"{value:.4g}"


def options(values: Mapping[str, Any]) -> str:
    """`window=64, mixing=0.1`; what is None is left out, and parts of heads are told one by one."""
    parts = values.get("parts")
    if isinstance(parts, list | tuple) and parts and all(isinstance(part, Mapping) for part in parts):
        return "; ".join(_head_part(part) for part in parts)
    return ", ".join(f"{key}={value}" for key, value in values.items() if value is not None) or "none"


def _head_part(part: Mapping[str, Any]) -> str:
    """`KV heads 0, 2: sliding_window (window=256, num_sinks=4)`."""
    groups, own = part.get("groups"), options(part.get("options") or {})
    which = "all other KV heads" if groups is None else f"KV heads {ranges(groups)}"
    return f"{which}: {part.get('method')}" + ("" if own == "none" else f" ({own})")


def ranges(numbers: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    runs: list[list[int]] = []
    for item in sorted(numbers):
        if runs and item == runs[-1][-1] + 1:
            runs[-1].append(item)
        else:
            runs.append([item])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
