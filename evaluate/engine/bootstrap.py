"""Intervals around figures by resampling items, the same items for both models where they are paired.

Percentile bootstrap, Efron and Tibshirani, An Introduction to the Bootstrap, 1993, https://doi.org/10.1201/9780429246593.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .items import Figure, Group, Item, Metric, columns, counting, finite

RESAMPLES = 1_000
LEVEL = 0.95
# Clusters of items below which an interval would say more about the method than about the model.
FEWEST = 5
# Numbers held at once: resamples are drawn in batches of this many.
AT_ONCE = 2**22

Arrays = tuple[NDArray[np.float64], ...]


def make_figures(
    model: Sequence[Item],
    base: Sequence[Item] | None,
    metrics: Sequence[Metric],
    slices: Sequence[Sequence[str]],
    *,
    pair: bool = True,
) -> tuple[Figure, ...]:
    """Every metric over every slice.

    Args:
        model: the model's items.
        base: the base's, if it was measured too.
        metrics: what to compute.
        slices: keys of `group` that split the items; an empty one means no split.
        pair: whether equal ids mean the same thing for both models.
    """
    figures = []
    for keys in slices:
        for group in _groups(model, keys):
            own, other = _members(model, group), None if base is None else _members(base, group)
            for metric in metrics:
                found = _figure(metric, group, own, other, pair)
                if found is not None:
                    figures.append(found)
    return tuple(figures)


def _groups(items: Sequence[Item], keys: Sequence[str]) -> list[Group]:
    """The combinations of group values that occur, in the order of first appearance."""
    having = [item for item in items if all(key in item.group for key in keys)]
    return [dict(found) for found in dict.fromkeys(tuple((key, item.group[key]) for key in keys) for item in having)]


def _members(items: Sequence[Item], group: Group) -> list[Item]:
    return [item for item in items if all(item.group.get(key) == value for key, value in group.items())]


def _figure(
    metric: Metric, group: Group, own: Sequence[Item], other: Sequence[Item] | None, pair: bool
) -> Figure | None:
    own = counting(own, metric)
    other = None if other is None else counting(other, metric)
    if not own:
        return None
    shared = {item.id for item in own} & {item.id for item in other or ()} if pair else set()
    if shared:
        # Models are compared on what both were scored on.
        own = [item for item in own if item.id in shared]
        other = _in_order([item for item in other or () if item.id in shared], own)
    model = columns(own, metric)
    value, draws = metric.value(*model), _resample(metric, model)
    figure = Figure(
        metric.name,
        group,
        len(own),
        finite(value),
        _interval(draws),
        better=metric.better,
        compare=metric.compare,
        style=metric.style,
    )
    if not other:
        return figure
    base = columns(other, metric)
    # Its own draws: equal ones would pair items of the same place, which are not the same thing.
    base_value, base_draws = metric.value(*base), _resample(metric, base, seed=1)
    if shared:
        change_draws = _resample(metric, (*model, *base))
    else:
        change_draws = None if draws is None or base_draws is None else metric.change(draws, base_draws)
    return replace(
        figure,
        base=finite(base_value),
        base_interval=_interval(base_draws),
        change=finite(metric.change(value, base_value)),
        change_interval=_interval(change_draws),
        paired=bool(shared),
        at_least_as_good=_wins_and_ties(metric, own, other) if shared else None,
    )


def _wins_and_ties(metric: Metric, own: Sequence[Item], other: Sequence[Item]) -> float | None:
    """Share of the same items on which one model is at least as good as the other; see `Figure`."""
    if metric.per or metric.scale != "linear":
        return None
    sign = 1 if metric.better == "higher" else -1
    values = ((item.values[metric.total], base.values[metric.total]) for item, base in zip(own, other, strict=True))
    return sum(sign * value >= sign * base for value, base in values) / len(own)


def _in_order(items: Sequence[Item], like: Sequence[Item]) -> list[Item]:
    """Items in the order, and the clusters, that those of another model with the same ids have."""
    by_id = {item.id: item for item in items}
    return [replace(by_id[item.id], cluster=item.cluster) for item in like]


def _resample(metric: Metric, arrays: Arrays, *, seed: int = 0) -> NDArray[np.float64] | None:
    """The metric, or its change from one model to the other, over resampled items.

    None for fewer than `FEWEST` of them, or if one is no number.
    """
    if arrays[0].size < FEWEST or not all(np.isfinite(array).all() for array in arrays):
        return None
    statistic: Callable[..., Any] = metric.value
    if len(arrays) == 4:

        def statistic(total: Any, per: Any, base_total: Any, base_per: Any, *, axis: int = -1) -> Any:
            return metric.change(metric.value(total, per, axis=axis), metric.value(base_total, base_per, axis=axis))

    result = stats.bootstrap(
        arrays,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // arrays[0].size),
        method="percentile",
        confidence_level=LEVEL,
        rng=np.random.default_rng(seed),
    )
    return np.asarray(result.bootstrap_distribution)


def _interval(draws: NDArray[np.float64] | None) -> tuple[float, float] | None:
    if draws is None or not np.isfinite(draws).all():
        return None
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)
