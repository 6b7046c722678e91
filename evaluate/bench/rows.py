"""A benchmark as rows and sentences, for whoever prints it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...attention_modules.counts import AttentionCounts
from ...formats import count, counted
from .cases import BASE, MODEL, Case
from .crossover import Crossover
from .schema import BenchmarkFile


@dataclass(frozen=True)
class BenchRow:
    """One measure at one length and batch size.

    Attributes:
        measure: `"prefill"`, `"decode"` or `"transfer"`.
        context: tokens of each sequence.
        batch: sequences at once.
        model: the model's case.
        base: the base's case; None without a base.
    """

    measure: str
    context: int
    batch: int
    model: Case
    base: Case | None

    @property
    def speedup(self) -> float | None:
        """How many times as fast as its base the model is, by the medians; None without both."""
        return _times(None if self.base is None else self.base.median, self.model.median)

    @property
    def cache_ratio(self) -> float | None:
        """How many times as much as the model's the base's cache holds; None without both."""
        return _times(None if self.base is None else self.base.cache_bytes, self.model.cache_bytes)

    @property
    def peak_ratio(self) -> float | None:
        """How many times as much peak memory as the model the base needs; None without both."""
        return _times(None if self.base is None else self.base.peak_bytes, self.model.peak_bytes)


def _times(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def bench_rows(bench: BenchmarkFile) -> tuple[BenchRow, ...]:
    """The cases of a benchmark, model and base side by side, in the order of measuring."""
    sides: dict[tuple[str, int, int], dict[str, Case]] = {}
    for case in bench.cases:
        sides.setdefault((case.measure, case.context, case.batch), {})[case.role] = case
    return tuple(BenchRow(*key, roles[MODEL], roles.get(BASE)) for key, roles in sides.items())


def attention_of(rows: Sequence[BenchRow]) -> dict[str, AttentionCounts]:
    """What the model's converted layers did, by measure, at the longest context of its smallest batch."""
    found: dict[str, AttentionCounts] = {}
    for row in sorted(rows, key=lambda row: (-row.batch, row.context)):
        if row.model.attention is not None:
            found[row.measure] = AttentionCounts.from_dict(row.model.attention)
    return found


def crossover_sentences(crossover: Mapping[str, Sequence[Crossover]]) -> tuple[str, ...]:
    """One sentence for each measure and batch size about where the model overtakes its base; empty without a base."""
    names = {"prefill": "prefill", "decode": "decoding", "memory": "cache"}
    sentences = []
    for measure, found in crossover.items():
        for entry in found:
            evaluated = f"{names[measure]}, batch {entry.batch}"
            sentences.append(f"{evaluated}: {_place(entry)}{entry.note}")
    return tuple(sentences)


def _place(entry: Crossover) -> str:
    if entry.context is None:
        return ""
    ends = [count(end) for end in (entry.low, entry.high) if end is not None]
    spread = f" (by the quartiles {' to '.join(ends)})" if len(ends) == 2 and ends[0] != ends[1] else ""
    return f"{count(entry.context)} tokens{spread}, "


def setup_sentence(bench: BenchmarkFile) -> str:
    """What the figures of a benchmark were measured on and how, in one line."""
    setup, settings = bench.setup, bench.settings
    place = setup.gpu or f"{setup.cpu}, {setup.threads} of {setup.cores} cores"
    medians = "medians"
    if settings is not None:
        medians += f" of {counted(settings.repeats, 'run')} and {counted(settings.decode_tokens, 'decoding step')}"
    return (
        f"{place}; torch {setup.versions.get('torch', 'unknown')}; {bench.model.dtype}; "
        f"{medians}, quartiles in brackets; peak memory is above the weights"
    )
