"""What a benchmark measures, and the form in which a finished case is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ...errors import DataError
from ...formats import count
from ..engine.models import DTYPES

PREFILL, DECODE, TRANSFER = "prefill", "decode", "transfer"
Role = Literal["model", "base"]
MODEL: Role = "model"
BASE: Role = "base"
MAX_SECONDS = 120.0


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often.

    Attributes:
        contexts: lengths in tokens, ascending, for prefill and decoding.
        batches: sequences at once.
        repeats: how often each prefill and training step is timed, after one that is not.
        decode_tokens: how many steps of decoding are timed, after some that are not.
        dtype: one of `engine.models.DTYPES`.
        training_contexts: lengths in tokens, ascending, for training steps of one sequence.
        max_seconds: what one repeat may take, in seconds; longer ones are left out.
    """

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    repeats: int
    decode_tokens: int
    dtype: str
    training_contexts: tuple[int, ...] = ()
    max_seconds: float = MAX_SECONDS

    @classmethod
    def checked(
        cls,
        *,
        contexts: Sequence[int],
        batches: Sequence[int],
        repeats: int,
        decode_tokens: int,
        dtype: str,
        training_contexts: Sequence[int],
        max_seconds: float,
    ) -> "BenchSettings":
        """Settings with their lists in order and each number once.

        Raises:
            DataError: a setting is none of those allowed.
        """
        numbers = {"contexts": contexts, "batches": batches, "training_contexts": training_contexts}
        for name, values in numbers.items():
            if any(value < 1 for value in values) or not (values or name == "training_contexts"):
                raise DataError(f"{name} is {_listed(values)}; it must be one or more whole numbers from 1.")
        for name, value in {"repeats": repeats, "decode_tokens": decode_tokens}.items():
            if value < 1:
                raise DataError(f"{name} is {value}; it must be at least 1.")
        if not max_seconds > 0:
            raise DataError(f"max_seconds is {max_seconds:g}; it must be more than 0.")
        if dtype not in DTYPES:
            raise DataError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}.")
        ordered = {name: tuple(sorted(set(values))) for name, values in numbers.items()}
        return cls(repeats=repeats, decode_tokens=decode_tokens, dtype=dtype, max_seconds=max_seconds, **ordered)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "empty"


@dataclass(frozen=True)
class Piece:
    """Cases that are measured together, in turns: all roles of one measure at one length and batch size."""

    measure: str
    context: int
    batch: int

    def __str__(self) -> str:
        """For people."""
        what = {PREFILL: "prefill of", DECODE: "decoding after", TRANSFER: "attention transfer on"}[self.measure]
        return f"{what} {count(self.context)} tokens, batch {self.batch}"


def pieces_of(settings: BenchSettings, *, training: bool) -> list[Piece]:
    """All pieces in the order in which they are measured; lengths ascend."""
    pieces = [
        Piece(measure, context, batch)
        for batch in settings.batches
        for context in settings.contexts
        for measure in (PREFILL, DECODE)
    ]
    return pieces + [Piece(TRANSFER, context, 1) for context in settings.training_contexts if training]


@dataclass(frozen=True)
class Case:
    """One role's side of a piece.

    Attributes:
        measure: `"prefill"`, `"decode"` or `"transfer"`.
        role: `"model"` or `"base"`.
        context: tokens of each sequence.
        batch: sequences at once.
        seconds: every repeat; for decoding every step, which gives each sequence one token.
        median: of `seconds`.
        low: first quartile of `seconds`.
        high: third quartile of `seconds`.
        tokens_per_second: tokens of all sequences over the median.
        ms_per_token: milliseconds of a decoding step; None for the others.
        peak_bytes: highest memory above weights and what was held before, the cache included.
        cache_bytes: what the cache holds after the prefill; None for training.
        attention: what the converted layers did in one turn that is not timed, as `AttentionCounts.to_dict` has it;
            None for a model without any, and for training.
        skipped: why there are no figures; None if there are.
        note: what else is to be known.
    """

    measure: str
    role: Role
    context: int
    batch: int
    seconds: tuple[float, ...] = ()
    median: float | None = None
    low: float | None = None
    high: float | None = None
    tokens_per_second: float | None = None
    ms_per_token: float | None = None
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    attention: dict[str, Any] | None = None
    skipped: str | None = None
    note: str | None = None

    @classmethod
    def measured(
        cls,
        piece: Piece,
        role: Role,
        seconds: Sequence[float],
        *,
        peak_bytes: int | None,
        cache_bytes: int | None,
        attention: dict[str, Any] | None = None,
    ) -> "Case":
        """A case from what was timed."""
        low, median, high = quartiles(seconds)
        tokens = piece.batch * (1 if piece.measure == DECODE else piece.context)
        return cls(
            piece.measure,
            role,
            piece.context,
            piece.batch,
            seconds=tuple(seconds),
            median=median,
            low=low,
            high=high,
            tokens_per_second=tokens / median if median > 0 else None,
            ms_per_token=1000 * median if piece.measure == DECODE else None,
            peak_bytes=peak_bytes,
            cache_bytes=cache_bytes,
            attention=attention,
            note=None if peak_bytes is not None else "peak memory cannot be measured on this system",
        )

    @classmethod
    def left_out(cls, piece: Piece, role: Role, reason: str) -> "Case":
        """A case without figures."""
        return cls(piece.measure, role, piece.context, piece.batch, skipped=reason)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Case":
        """What `to_dict` gave."""
        return cls(**{**values, "seconds": tuple(values["seconds"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "seconds": list(self.seconds)}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of at least one value, interpolated linearly."""
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
    return float(low), float(median), float(high)
