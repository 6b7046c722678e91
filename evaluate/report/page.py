"""A report put together: title, summary in plain words, headline figures, sections, and what was not measured."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ... import __version__
from ...formats import amount, change, count, duration, number, percent, ratio, significant, size, span
from ..bench.schema import BenchmarkFile
from ..engine.items import Figure
from ..tasks.base import task_classes
from .attention_part import attention_section
from .blocks import Cell, Page, Section, Table, Text, Tile, Tiles, Tone, section
from .cells import verdict
from .conversion_part import conversion_section, kv_heads_of, layers_of
from .fidelity_part import fidelity_section, statistics_section
from .gathering import UNCHANGED, Report
from .healing_part import healing_section
from .quality_part import headline, position_section, quality_section, retrieval_section
from .receipt_part import receipt_section
from .speed_part import CACHE, Pair, paired_cases, speed_section

SUITE = "standard"


def make_page(report: Report) -> Page:
    """Everything there is to show, in order."""
    parts = (
        conversion_section(report),
        quality_section(report),
        position_section(report),
        retrieval_section(report),
        healing_section(report),
        fidelity_section(report),
        statistics_section(report),
        attention_section(report),
        speed_section(report),
        missing_section(report),
        receipt_section(report),
    )
    measured = report.evaluation or report.benchmark
    when = f", measured {measured.setup.time}" if measured is not None and measured.setup.time else ""
    return Page(
        title=report.name,
        subtitle="Conversion report" if report.modules else "Measurements",
        summary=summarize(report),
        tiles=Tiles(tuple(make_tiles(report))),
        sections=tuple(part for part in parts if part is not None),
        footer=f"Made by attnconv {__version__} from the files of {report.name}{when}.",
    )


def summarize(report: Report) -> tuple[str, ...]:
    """In plain words, a paragraph each: what was done to which model, what it costs, and what it gains."""
    said = (_what(report), _quality(report), _speed(report))
    return tuple(part for part in said if part)


def _what(report: Report) -> str:
    if not report.modules:
        return f"Measurements of {report.name}" + (f" beside {report.base}." if report.base else ".")
    layers = layers_of(report)
    kept = layers.count(UNCHANGED)
    which = f"{len(layers) - kept} of the {len(layers)}" if kept else f"all {len(layers)}"
    methods = " and ".join(report.methods)
    added = f", which adds {count(report.parameters)} parameters" if report.parameters else ""
    heads = Counter(method for own in kv_heads_of(report) for method in own)
    if heads:
        full = heads.pop(UNCHANGED, 0)
        others = " and ".join(f"{count(number)} by {method}" for method, number in heads.items())
        whose = f"the {count(full + heads.total())} KV heads of {report.base or 'its base'}"
        return f"{count(full)} of {whose} keep their attention; that of the others was replaced, {others}{added}."
    return f"In {which} attention layers of {report.base or 'its base'}, attention was replaced by {methods}{added}."


def _quality(report: Report) -> str:
    parts = []
    for kind, words in (("perplexity", "perplexity"), ("retrieval", "recall"), ("multiple_choice", "accuracy")):
        for name, figure in _headlines(report, kind):
            if figure.base is None or figure.change is None:
                continue
            shown = change(figure.change, figure.compare, figure.style)
            chance = ", within chance" if verdict(figure)[0] == "within chance" else ""
            ends = f"from {amount(figure.base, figure.style)} to {amount(figure.model, figure.style)}"
            parts.append(f"{words} on {name} goes {ends} ({shown}{chance})")
    if not parts:
        return ""
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _headlines(report: Report, kind: str) -> list[tuple[str, Figure]]:
    """The first overall figure of each task of a kind."""
    found = []
    for name, task in report.tasks(kind).items():
        overall = [figure for figure in task.figures if not figure.group and figure.model is not None]
        found += [(name, overall[0])] if overall else []
    return found


def _speed(report: Report) -> str:
    bench = report.benchmark
    if bench is None:
        return ""
    parts = []
    for measure, words in (("prefill", "reading a prompt"), ("decode", "generating after a prompt")):
        pair = paired_cases(bench, measure)
        if pair is not None:
            parts.append(f"{words} of {count(pair.model.context)} tokens is {_times(pair)}")
    held = paired_cases(bench, CACHE)
    if held is not None:
        parts.append(f"the cache takes {size(held.model.cache_bytes)} instead of {size(held.base.cache_bytes)}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _times(pair: Pair) -> str:
    """`2.10 times faster`, as the medians say."""
    if _tone(pair.factor) == "":
        return "as fast as before"
    return (
        f"{significant(pair.factor, 3)} times faster"
        if pair.factor > 1
        else f"{significant(1 / pair.factor, 3)} times slower"
    )


def _tone(factor: float) -> Tone:
    """Whether a gain is one: what is printed as 1 is neither good nor bad."""
    return "" if significant(factor, 3) == "1.00" else "good" if factor > 1 else "bad"


def make_tiles(report: Report) -> list[Tile]:
    """The headline figures that were measured, six at most."""
    tiles = []
    found = headline(report, "perplexity")
    if found:
        tiles.append(_figure_tile(f"Perplexity, {found[0]}", found[1]))
    found = headline(report, "retrieval")
    if found:
        tiles.append(_figure_tile(f"Recall, {found[0]}", found[1]))
    found = headline(report, "multiple_choice")
    if found:
        tiles.append(_figure_tile(f"Accuracy, {found[0]}", found[1]))
    if not tiles:
        tiles += _receipt_tile(report)
    return [*tiles, *(_speed_tiles(report.benchmark) if report.benchmark is not None else [])][:6]


def _figure_tile(label: str, figure: Figure) -> Tile:
    if figure.change is None:
        interval = "" if figure.interval is None else f"95 %: {span(figure.interval, figure.style)}"
        return Tile(label, amount(figure.model, figure.style), interval)
    ends = f"{amount(figure.base, figure.style)} → {amount(figure.model, figure.style)}"
    shown = change(figure.change, figure.compare, figure.style).replace(" points", " pts")
    return Tile(label, shown, ends, verdict(figure)[1])


def _receipt_tile(report: Report) -> list[Tile]:
    """Perplexity as the conversion itself measured it, where no evaluation was run."""
    rows = [row for row in (report.receipt.metrics if report.receipt else []) if row.get("perplexity")]
    if len(rows) < 2:
        return []
    before, after = rows[0]["perplexity"], rows[-1]["perplexity"]
    ends = f"{number(before)} → {number(after)}"
    return [Tile("Perplexity, while converting", ratio(after / before), ends, _tone(before / after))]


def _speed_tiles(bench: BenchmarkFile) -> list[Tile]:
    tiles = []
    for measure, words in (("prefill", "Prompt speed"), ("decode", "Decoding speed")):
        pair = paired_cases(bench, measure)
        if pair is not None:
            base, model = pair.base, pair.model
            ends = f"{duration(base.median)} → {duration(model.median)}"
            if measure == "decode" and base.ms_per_token is not None and model.ms_per_token is not None:
                ends = f"{number(base.ms_per_token)} → {number(model.ms_per_token)} ms/token"
            label = f"{words}, {count(model.context)} tokens"
            tiles.append(Tile(label, ratio(pair.factor, 3), ends, _tone(pair.factor)))
    held = paired_cases(bench, CACHE)
    if held is not None:
        ends = f"{size(held.base.cache_bytes)} → {size(held.model.cache_bytes)}"
        share = 1 / held.factor
        less = f"-{percent(1 - share)}" if share < 0.995 else ratio(share)
        label = f"Cache, {count(held.model.context)} tokens"
        tiles.append(Tile(label, less, ends, _tone(held.factor)))
    return tiles


def missing_section(report: Report) -> Section | None:
    """What a full report would have besides, with the commands that fill it."""
    rows = [(Cell(what), Cell(command, code=True)) for what, command in missing(report)]
    if not rows:
        return None
    return section(
        "missing",
        "Not measured",
        [
            Text(
                "These parts are empty because nothing measured them yet; run the command, then the report again. "
                + (f"BASE stands for the place of {report.base or 'the base'}." if not _base_source(report) else "")
            ),
            Table("What is missing", ("what", "command"), tuple(rows)),
        ],
    )


def missing(report: Report) -> list[tuple[str, str]]:
    """What was not measured, each with the command for it."""
    evaluate, bench = commands(report)
    found: list[tuple[str, str]] = []
    if report.evaluation is None:
        found.append(("quality before and after", evaluate))
    else:
        if report.evaluation.base is None:
            found.append(("quality of the base, to compare with", evaluate))
        found += [(words, evaluate) for words in _lacking(report)]
    if report.benchmark is None:
        found.append(("speed and memory", bench))
    elif report.benchmark.base is None:
        found.append(("speed and memory of the base, to compare with", bench))
    return found


def commands(report: Report) -> tuple[str, str]:
    """The commands that measure quality and speed of a model against its base."""
    measured = report.evaluation or report.benchmark
    folder = shlex.quote(str(report.folder) if report.is_conversion or measured is None else measured.model.source)
    source = _base_source(report)
    against = f"--against {shlex.quote(source) if source else 'BASE'}"
    return f"attnconv eval {folder} {against} --suite {SUITE}", f"attnconv bench {folder} {against}"


def _base_source(report: Report) -> str:
    """What the base can be opened by from here; empty if nothing that is known of it can.

    A receipt has the name alone of a base that was a folder, for receipts are published; what was measured has the
    path, which may have led somewhere on another machine.
    """
    if report.receipt is not None and report.receipt.repo_id:
        return report.receipt.repo_id
    bases = [measured.base.source for measured in (report.evaluation, report.benchmark) if measured and measured.base]
    named = [*bases, *([report.receipt.source] if report.receipt is not None else [])]
    return next((name for name in named if Path(name).expanduser().exists()), "")


def _lacking(report: Report) -> list[str]:
    """What a full report would have of tasks that were not run, in words."""
    return [
        task.report_words
        for kind, task in task_classes().items()
        if task.report_words and not report.tasks(kind) and (report.modules or not task.of_conversions)
    ]


def card_lines(report: Report) -> Sequence[tuple[str, str, str, str]]:
    """Overall figures for the model card: name, base, model, change."""
    rows = []
    for name, task in report.tasks().items():
        for figure in task.figures:
            if not figure.group:
                shown = change(figure.change, figure.compare, figure.style)
                ends = amount(figure.base, figure.style), amount(figure.model, figure.style)
                rows.append((f"{name}: {figure.metric}", *ends, shown))
    bench = report.benchmark
    for measure, words in (("prefill", "reading a prompt"), ("decode", "decoding")) if bench is not None else ():
        pair = paired_cases(bench, measure) if bench is not None else None
        if pair is not None:
            label = f"{words}, {count(pair.model.context)} tokens"
            rows.append((label, duration(pair.base.median), duration(pair.model.median), _times(pair)))
    held = paired_cases(bench, CACHE) if bench is not None else None
    if held is not None:
        label = f"cache, {count(held.model.context)} tokens"
        share = change(1 / held.factor, "ratio", "number")
        rows.append((label, size(held.base.cache_bytes), size(held.model.cache_bytes), share))
    return rows
