"""One way to print numbers, and no other anywhere in the package."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnconv import formats


@pytest.mark.parametrize(
    ("printed", "wanted"),
    [
        (formats.number(14.3684), "14.37"),
        (formats.number(2186.6), "2,187"),
        (formats.number(-0.5), "-0.5"),
        (formats.number(math.nan), "-"),
        (formats.number(None), "-"),
        (formats.significant(1.0), "1.000"),
        (formats.significant(17.84, 3), "17.8"),
        (formats.significant(0.0), "0.000"),
        (formats.significant(0.00001234, 3), "1.23e-05"),
        (formats.count(12345), "12,345"),
        (formats.counted(1, "run"), "1 run"),
        (formats.counted(2000, "run"), "2,000 runs"),
        (formats.size(12), "12 B"),
        (formats.size(1536), "1.5 KiB"),
        (formats.size(377_487_360), "360.0 MiB"),
        (formats.size(3 * 2**30), "3.0 GiB"),
        (formats.duration(0.0123), "12.3 ms"),
        (formats.duration(75.31), "75.3 s"),
        (formats.duration(80.0), "80 s"),
        (formats.duration(999.7), "1,000 s"),
        (formats.duration(117_482), "32.63 h"),
        (formats.rate(0.53), "0.5"),
        (formats.rate(1234.4), "1,234"),
        (formats.ratio(1.25), "1.250 x"),
        (formats.ratio(3.2589, 3), "3.26 x"),
        (formats.ratio(None), "-"),
        (formats.percent(0.25), "25.0%"),
        (formats.percent(0.254, 0), "25%"),
        (formats.perplexity(36.2163), "36.22"),
        (formats.perplexity(2186.6), "2,187"),
        (formats.amount(0.25, "percent"), "25.0%"),
        (formats.span((0.1, 0.25), "percent"), "10.0% to 25.0%"),
        (formats.change(1.25, "ratio", "number"), "1.250 x"),
        (formats.change(-0.015, "difference", "percent"), "-1.5 points"),
        (formats.change(0.0012, "difference", "number"), "+0.0012"),
        (formats.change_span((-0.015, 0.005), "difference", "percent"), "-1.5 to +0.5 points"),
        (formats.change_span((0.9, 1.25), "ratio", "number"), "0.9000 to 1.250 x"),
        (formats.short(1_500_000), "1.5M"),
        (formats.short(4096), "4k"),
        (formats.options({"window": 64, "scale": None}), "window=64"),
        (formats.options({}), "none"),
        (
            formats.options({"parts": [{"groups": [0, 1], "method": "a"}, {"method": "b", "options": {"window": 4}}]}),
            "KV heads 0-1: a; all other KV heads: b (window=4)",
        ),
        (formats.ranges([5, 0, 1, 2]), "0-2, 5"),
    ],
)
def test_what_is_printed(printed: str, wanted: str) -> None:
    assert printed == wanted


@given(st.floats())
def test_every_number_can_be_printed(value: float) -> None:
    for print_it in (formats.number, formats.significant, formats.count, formats.duration, formats.ratio):
        assert print_it(value)
    assert (formats.number(value) == formats.MISSING) == (not math.isfinite(value))


# Texts in which a number would be printed in another way: other units, other factors, other bytes.
OTHERWISE = re.compile(r"×|\d\}? [KMG]B\b|:\.\d[f]\} x\b|2\*\*[123]0:")


def test_nothing_is_printed_otherwise(repository: Path) -> None:
    found = [
        f"{path.relative_to(repository)}:{number}"
        for folder in ("evaluate", "commands", "convert", "distill", "runs", "benchmarks", "files", "attention_modules")
        for path in (repository / folder).rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if OTHERWISE.search(line)
    ]
    assert not found, f"numbers are printed by `formats` alone: {', '.join(found)}"
