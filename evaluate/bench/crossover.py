"""From which length on a model is faster, or holds less, than its base."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...formats import count
from .cases import BASE, DECODE, MODEL, PREFILL, Case

# Words for a model that is below its base, above it, and level with it.
_FASTER = ("faster", "slower", "as fast")
_SMALLER = ("smaller", "larger", "as large")

Quantity = Callable[[Case], float | None]


@dataclass(frozen=True)
class Crossover:
    """The length from which a model is below its base.

    Attributes:
        batch: sequences at once.
        context: tokens, by interpolation of the medians; None if there is no such length among those measured.
        low: the same from the model's first and the base's third quartiles, which favour the model.
        high: the same the other way round.
        note: what was found, in words.
    """

    batch: int
    context: int | None
    low: int | None
    high: int | None
    note: str


def crossovers(cases: Sequence[Case]) -> dict[str, list[Crossover]]:
    """The crossover of each measure and batch size; empty lists without a base.

    Returns:
        `{"prefill": [...], "decode": [...], "memory": [...]}`, each with one entry per batch size. Memory is that of
        the caches.
    """
    measures = {"prefill": (PREFILL, _FASTER), "decode": (DECODE, _FASTER), "memory": (PREFILL, _SMALLER)}
    found: dict[str, list[Crossover]] = {}
    for name, (measure, words) in measures.items():
        own = [case for case in cases if case.measure == measure]
        batches = sorted({case.batch for case in own if case.role == BASE})
        found[name] = [
            _crossover([case for case in own if case.batch == batch], batch, words, name == "memory")
            for batch in batches
        ]
    return found


def _crossover(cases: Sequence[Case], batch: int, words: tuple[str, str, str], memory: bool) -> Crossover:
    if memory:
        points = _ratios(cases, lambda case: case.cache_bytes, lambda case: case.cache_bytes)
        return _judged(points, points, points, batch, words)
    medians = _ratios(cases, lambda case: case.median, lambda case: case.median)
    favourable = _ratios(cases, lambda case: case.low, lambda case: case.high)
    unfavourable = _ratios(cases, lambda case: case.high, lambda case: case.low)
    return _judged(medians, favourable, unfavourable, batch, words)


def _ratios(cases: Sequence[Case], model: Quantity, base: Quantity) -> dict[int, float]:
    """Model over base by context, where both were measured."""
    sides = {
        role: {case.context: value(case) for case in cases if case.role == role and case.skipped is None}
        for role, value in ((MODEL, model), (BASE, base))
    }
    ratios = {}
    for context in sorted(sides[MODEL].keys() & sides[BASE].keys()):
        above, below = sides[MODEL][context], sides[BASE][context]
        if above and below:
            ratios[context] = above / below
    return ratios


def _judged(
    medians: Mapping[int, float],
    favourable: Mapping[int, float],
    unfavourable: Mapping[int, float],
    batch: int,
    words: tuple[str, str, str],
) -> Crossover:
    if not medians:
        return Crossover(batch, None, None, None, "no length was measured for both models")
    below, above, level = words
    contexts = list(medians)
    where = (
        f"at every measured length up to {count(contexts[-1])}"
        if len(contexts) > 1
        else f"at {count(contexts[0])} tokens"
    )
    crossing = interpolate(medians)
    if crossing is None:
        if all(ratio < 1 for ratio in medians.values()):
            return Crossover(batch, None, None, None, f"{below} {where}")
        if all(ratio == 1 for ratio in medians.values()):
            return Crossover(batch, None, None, None, f"{level} {where}")
        if all(ratio >= 1 for ratio in medians.values()):
            return Crossover(batch, None, None, None, f"{above} {where}")
        best = [context for context, ratio in medians.items() if ratio < 1]
        last = f"at {count(contexts[-1])} tokens, the longest measured"
        return Crossover(batch, None, None, None, f"{below} at {_listed(best)} tokens, but not {last}")
    left = max(context for context in contexts if medians[context] >= 1)
    right = min(context for context in contexts if context > left)
    low, high = interpolate(favourable), interpolate(unfavourable)
    note = f"{below} from about here on; {above} at {count(left)} tokens, {below} at {count(right)}"
    if any(ratio < 1 for context, ratio in medians.items() if context < left):
        note += "; it changes more than once"
    return Crossover(batch, round(crossing), _rounded(low), _rounded(high), note)


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def _listed(contexts: Sequence[int]) -> str:
    return ", ".join(f"{count(context)}" for context in contexts)


def interpolate(ratios: Mapping[int, float]) -> float | None:
    """The context from which ratios stay below 1, straight lines between points in logarithms of both; None if none.

    Args:
        ratios: positive ratios by context, contexts ascending.
    """
    contexts = list(ratios)
    at_least = [index for index, context in enumerate(contexts) if ratios[context] >= 1]
    if not at_least or at_least[-1] == len(contexts) - 1:
        return None
    left, right = contexts[at_least[-1]], contexts[at_least[-1] + 1]
    above, below = math.log(ratios[left]), math.log(ratios[right])
    share = above / (above - below)
    return math.exp(math.log(left) + share * (math.log(right) - math.log(left)))
