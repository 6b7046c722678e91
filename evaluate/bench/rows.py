"""A benchmark's document as rows and sentences, for whoever prints it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .cases import BASE, MODEL


@dataclass(frozen=True)
class BenchRow:
    """One measure at one length and batch size.

    Attributes:
        measure: `"prefill"`, `"decode"` or `"transfer"`.
        context: Tokens of each sequence.
        batch: Sequences at once.
        model: The model's case, as in the document.
        base: The base's case; None without a base.
    """

    measure: str
    context: int
    batch: int
    model: Mapping[str, Any]
    base: Mapping[str, Any] | None

    @property
    def speedup(self) -> float | None:
        """How many times as fast as its base the model is, by the medians; None without both."""
        return self._times("median")

    @property
    def cache_ratio(self) -> float | None:
        """How many times as much as the model's the base's cache holds; None without both."""
        return self._times("cache_bytes")

    @property
    def peak_ratio(self) -> float | None:
        """How many times as much peak memory as the model the base needs; None without both."""
        return self._times("peak_bytes")

    def _times(self, name: str) -> float | None:
        """Base over model."""
        above, below = (self.base or {}).get(name), self.model.get(name)
        return above / below if above and below else None


def bench_rows(document: Mapping[str, Any]) -> tuple[BenchRow, ...]:
    """The cases of a document (see `evaluate.results`), model and base side by side, in the order of measuring."""
    sides: dict[tuple[str, int, int], dict[str, Mapping[str, Any]]] = {}
    for case in document["cases"]:
        sides.setdefault((case["measure"], case["context"], case["batch"]), {})[case["role"]] = case
    return tuple(BenchRow(*key, roles[MODEL], roles.get(BASE)) for key, roles in sides.items())


def crossover_sentences(document: Mapping[str, Any]) -> tuple[str, ...]:
    """One sentence for each measure and batch size about where the model overtakes its base; empty without a base."""
    names = {"prefill": "prefill", "decode": "decoding", "memory": "cache"}
    sentences = []
    for measure, found in document["crossover"].items():
        for entry in found:
            subject = f"{names[measure]}, batch {entry['batch']}"
            sentences.append(f"{subject}: {_place(entry)}{entry['note']}")
    return tuple(sentences)


def _place(entry: Mapping[str, Any]) -> str:
    if entry["context"] is None:
        return ""
    ends = [f"{end:,}" for end in (entry["low"], entry["high"]) if end is not None]
    spread = f" (by the quartiles {' to '.join(ends)})" if len(ends) == 2 and ends[0] != ends[1] else ""
    return f"{entry['context']:,} tokens{spread}, "


def setup_sentence(document: Mapping[str, Any]) -> str:
    """What the figures of a document were measured on and how, in one line."""
    setup, settings = document["setup"], document["settings"]
    place = setup["gpu"] or f"{setup['cpu']}, {setup['threads']} of {setup['cores']} cores"
    runs, steps = _count(settings["repeats"], "run"), _count(settings["decode_tokens"], "decoding step")
    return (
        f"{place}; torch {setup['versions']['torch']}; {document['model']['dtype']}; "
        f"medians of {runs} and {steps}, quartiles in brackets; peak memory is above the weights"
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
