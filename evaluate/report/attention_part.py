"""What the converted attention did, counted while it ran: by layer, and at each context of the benchmark."""

from collections.abc import Mapping

from ...attention_modules.counts import AttentionCounts, Counts
from ...formats import amount, number
from ..engine.schema import EvaluationFile
from .blocks import Block, Cell, Section, Table, Text, section
from .cells import count_cell, size_cell
from .gathering import Report

COLUMNS = ("tokens one by one", "of them per query", "through a state", "heads", "state", "multiply-adds against dense")


def attention_section(report: Report) -> Section | None:
    """The sentence, the layers of one pass, and the contexts."""
    counts = counts_of(report)
    blocks: list[Block | None] = []
    if counts is not None:
        said = counts.sentence
        words = "Counted in one pass over a text. Shares are of the tokens that each query could attend."
        blocks += [Text(f"{said[:1].upper()}{said[1:]}."), Text(words, small=True), _layers(counts)]
    blocks.append(_contexts(report))
    return section("attention", "What the attention did", blocks)


def counts_of(report: Report) -> AttentionCounts | None:
    """Of the evaluation, else of the conversion itself."""
    return evaluated_counts(report.evaluation) or receipt_counts(report)


def receipt_counts(report: Report) -> AttentionCounts | None:
    """What the conversion counted when it was done."""
    found = report.receipt.attention if report.receipt is not None else {}
    return AttentionCounts.from_dict(found) if "layers" in found else None


def evaluated_counts(evaluation: EvaluationFile | None) -> AttentionCounts | None:
    """What the evaluation counted of the model."""
    found = evaluation.attention.get("model") if evaluation is not None else None
    return None if found is None else AttentionCounts.from_dict(found)


def _layers(counts: AttentionCounts) -> Table:
    rows: Mapping[str, Counts] = {**counts.layers, "all layers": counts.total}
    cells = tuple((Cell(name), *_cells(found)) for name, found in rows.items())
    return Table(f"Every converted layer, at {counts.tokens:,} tokens", ("layer", *COLUMNS), cells, collapsed=True)


def _contexts(report: Report) -> Table | None:
    rows = []
    for case in report.benchmark.cases if report.benchmark is not None else ():
        if case.role == "model" and case.attention is not None:
            total = AttentionCounts.from_dict(case.attention).total
            rows.append((Cell(case.measure), count_cell(case.context), count_cell(case.batch), *_cells(total)))
    columns = ("measure", "context", "batch", *COLUMNS)
    return Table("All converted layers, in the benchmark", columns, tuple(rows)) if rows else None


def _cells(counts: Counts) -> tuple[Cell, ...]:
    return (
        Cell(amount(counts.density, "percent"), counts.density),
        Cell(number(counts.tokens_per_query), counts.tokens_per_query),
        Cell(amount(counts.summarized, "percent"), counts.summarized),
        Cell(number(counts.heads), counts.heads),
        size_cell(counts.state_bytes),
        Cell(amount(counts.work, "percent"), counts.work),
    )
