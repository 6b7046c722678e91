"""What is better not begun: cases that do not fit the model, the time or the memory."""

import math
from collections.abc import Sequence

from ...formats import count, duration, size
from .cases import DECODE, PREFILL, Case, Piece


def refusal(
    piece: Piece,
    role: str,
    earlier: Sequence[Case],
    *,
    positions: float,
    limit: float,
    available: int | None,
) -> str | None:
    """Why a case is left out before it is begun; None if it is not.

    Args:
        piece: what is to be measured.
        role: of which model.
        earlier: finished cases.
        positions: longest sequence that the model was made for, in tokens.
        limit: seconds that one repeat may take.
        available: bytes of memory that can be had; None if unknown.
    """
    if piece.context > positions:
        return f"the model was made for {count(positions)} positions"
    own = [case for case in earlier if case.role == role and case.batch == piece.batch]
    if piece.measure == DECODE:
        for case in own:
            if case.measure == PREFILL and case.context == piece.context and case.skipped is not None:
                return case.skipped
    shorter = [case for case in own if case.measure == piece.measure and case.context < piece.context]
    for case in shorter:
        if case.skipped is not None:
            return f"not tried, since {count(case.context)} tokens were left out: {_root(case.skipped)}"
    return None if piece.measure == DECODE else _estimate(piece, shorter, limit, available)


def _root(reason: str) -> str:
    """The first cause of a chain of cases not tried."""
    return reason.rsplit("were left out: ", 1)[-1]


def _estimate(piece: Piece, shorter: Sequence[Case], limit: float, available: int | None) -> str | None:
    """What the shorter lengths foretell: time by their trend, memory at least in proportion."""
    if not shorter:
        return None
    last = max(shorter, key=lambda case: case.context)
    ratio = piece.context / last.context
    seconds = (last.median or 0.0) * ratio ** _growth(shorter)
    if seconds > limit:
        return f"one repeat may take {duration(seconds)}, more than the {duration(limit)} allowed"
    needed = (last.peak_bytes or 0) * ratio
    if needed > (math.inf if available is None else available):
        return f"it needs at least {size(needed)} more memory, and {size(available or 0)} are free"
    return None


def _growth(shorter: Sequence[Case]) -> float:
    """The power of the length by which time grows, from the two longest; 2, which is softmax, if there is only one."""
    times = sorted((case.context, case.median) for case in shorter if case.median)[-2:]
    if len(times) < 2:
        return 2.0
    (short, before), (long, after) = times
    return min(2.0, max(1.0, math.log(after / before) / math.log(long / short)))
