"""What a task scores one by one, and how scores become figures: sums over items, so that any subset has its figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Group = Mapping[str, str | int | float]
Scale = Literal["linear", "exp"]
Better = Literal["lower", "higher"]
Style = Literal["number", "percent"]
Compare = Literal["ratio", "difference"]


@dataclass(frozen=True)
class Item:
    """One thing that was scored: a question, a prompt, a block of text, an attention head.

    Attributes:
        id: the same for every model that is measured, so that scores can be paired.
        values: the numbers that metrics add up, such as `{"nll": 310.2, "tokens": 128}`.
        group: what it belongs to, such as `{"length": 2048, "depth": 0.5}`.
        note: what a reader may want to see of it, such as the model's answer.
        cluster: items of one cluster, such as the heads of a layer on one text, are resampled together, for they are
            not independent; empty for one that stands alone.
    """

    id: str
    values: Mapping[str, float]
    group: Group = field(default_factory=dict)
    note: str = ""
    cluster: str = ""


@dataclass(frozen=True)
class Metric:
    """How the values of items become one number: `total` over `per`, summed over items first.

    Attributes:
        name: what tables call it.
        total: key of the numerator in an item's values; items without it do not count.
        per: key of the denominator; empty means the number of items.
        scale: `exp` takes the exponential of the quotient.
        better: which way is better.
        compare: whether two models are compared by their ratio or their difference.
        style: `percent` prints 0.25 as 25 %.
        meaning: one clause for people who do not know it.
    """

    name: str
    total: str
    per: str = ""
    scale: Scale = "linear"
    better: Better = "lower"
    compare: Compare = "difference"
    style: Style = "number"
    meaning: str = ""

    def value(self, total: NDArray[np.float64], per: NDArray[np.float64], *, axis: int = -1) -> NDArray[np.float64]:
        """The number for items along `axis`."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            quotient = np.sum(total, axis=axis) / np.sum(per, axis=axis)
            return np.asarray(np.exp(quotient) if self.scale == "exp" else quotient)

    def change(self, model: Any, base: Any) -> Any:
        """How a model's number differs from the base's."""
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return np.divide(model, base) if self.compare == "ratio" else np.subtract(model, base)


@dataclass(frozen=True)
class Figure:
    """One number of a task, for one model or two, with its interval.

    Attributes:
        metric: name of the metric.
        group: which items it is over; empty means all of them.
        count: how many items those are.
        model: the number of the model.
        interval: 95 % interval of it; None if there are too few items to tell.
        base: the number of the base, if one was measured.
        base_interval: 95 % interval of that.
        change: ratio or difference of the two, see `compare`.
        change_interval: 95 % interval of that; from the same resamples of both if their items are `paired`.
        paired: whether both models were scored on the same items.
        at_least_as_good: share of those items on which the model is as good as the base or better (wins and ties); None
            where the metric is no mean over items.
        better: which way is better.
        compare: `ratio` or `difference`.
        style: how to print it.
    """

    metric: str
    group: Group
    count: int
    model: float | None
    interval: tuple[float, float] | None = None
    base: float | None = None
    base_interval: tuple[float, float] | None = None
    change: float | None = None
    change_interval: tuple[float, float] | None = None
    paired: bool = False
    at_least_as_good: float | None = None
    better: Better = "lower"
    compare: Compare = "difference"
    style: Style = "number"


def counting(items: Sequence[Item], metric: Metric) -> list[Item]:
    """The items that count for a metric."""
    return [item for item in items if metric.total in item.values and (not metric.per or metric.per in item.values)]


def columns(items: Sequence[Item], metric: Metric) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Numerators and denominators of items that count, summed over each cluster."""
    place: dict[str, int] = {}
    places = [place.setdefault(item.cluster or f"item {item.id}", len(place)) for item in items]
    total, per = np.zeros(len(place)), np.zeros(len(place))
    np.add.at(total, places, np.array([item.values[metric.total] for item in items], dtype=np.float64))
    np.add.at(per, places, np.array([item.values[metric.per] if metric.per else 1.0 for item in items]))
    return total, per


def finite(value: Any) -> float | None:
    """A plain number; None for what JSON has no number for."""
    number = float(value)
    return number if math.isfinite(number) else None
