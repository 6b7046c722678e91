import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnconv.evaluate.engine.bootstrap import make_figures
from attnconv.evaluate.engine.items import Item, Metric

PERPLEXITY = Metric("perplexity", "nll", "tokens", scale="exp", compare="ratio")
ACCURACY = Metric("accuracy", "correct", better="higher", style="percent")


def scored(values: list[float], **group: str) -> list[Item]:
    return [Item(str(index), {"correct": value}, group) for index, value in enumerate(values)]


def test_a_mean_and_its_interval_are_those_of_theory() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    (figure,) = make_figures(scored(list(values)), None, [ACCURACY], [()])
    assert figure.model == pytest.approx(values.mean())
    assert figure.interval is not None
    half = 1.96 * values.std() / math.sqrt(400)
    assert figure.interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert (figure.base, figure.change, figure.count) == (None, None, 400)


def test_perplexity_adds_before_it_divides() -> None:
    items = [Item("a", {"nll": 10.0, "tokens": 2}), Item("b", {"nll": 2.0, "tokens": 8}), Item("c", {"other": 1.0})]
    (figure,) = make_figures(items, None, [PERPLEXITY], [()])
    assert figure.model == pytest.approx(math.exp(12 / 10))
    assert figure.count == 2


def test_paired_items_give_a_narrow_change() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(10.0, 3.0, 200)
    model = base + 0.5 + rng.normal(0.0, 0.01, 200)
    shuffled = scored(list(base))[::-1]
    (paired,) = make_figures(scored(list(model)), shuffled, [ACCURACY], [()])
    (apart,) = make_figures(scored(list(model)), shuffled, [ACCURACY], [()], pair=False)
    assert paired.paired
    assert not apart.paired
    assert paired.change == apart.change == pytest.approx(0.5, abs=0.01)
    assert paired.change_interval is not None
    assert apart.change_interval is not None
    assert paired.change_interval[1] - paired.change_interval[0] < 0.01
    assert apart.change_interval[1] - apart.change_interval[0] > 0.5


def test_different_items_are_not_paired() -> None:
    other = [Item(f"other {index}", {"correct": 1.0}) for index in range(5)]
    (figure,) = make_figures(scored([0.0, 1.0, 1.0]), other, [ACCURACY], [()])
    assert not figure.paired
    assert figure.change == pytest.approx(2 / 3 - 1)


def test_models_are_compared_on_what_both_were_scored_on() -> None:
    more = [*scored([1.0] * 6), Item("too long for the base", {"correct": 0.0})]
    (figure,) = make_figures(more, scored([0.0] * 6), [ACCURACY], [()])
    assert (figure.count, figure.model, figure.change) == (6, 1.0, 1.0)
    assert figure.paired


def test_a_cluster_counts_once() -> None:
    rng = np.random.default_rng(1)
    # Ten texts with thirty heads each: the heads say the same about a text.
    values = rng.normal(0.0, 1.0, 10)
    heads = [
        Item(f"{text}, {head}", {"correct": values[text] + rng.normal(0.0, 0.01)}, cluster=f"text {text}")
        for text in range(10)
        for head in range(30)
    ]
    (together,) = make_figures(heads, heads[::-1], [ACCURACY], [()])
    (texts,) = make_figures(scored(list(values)), None, [ACCURACY], [()])
    assert together.interval == pytest.approx(texts.interval, abs=0.02)
    assert (together.count, together.paired, together.change) == (300, True, 0)
    few = [Item(item.id, item.values, cluster=f"half {index % 2}") for index, item in enumerate(heads)]
    assert make_figures(few, None, [ACCURACY], [()])[0].interval is None


def test_slices() -> None:
    items = [
        *scored([1, 1, 0], length="long"),
        Item("x", {"correct": 0.0}, {"length": "short"}),
        Item("y", {"correct": 1.0}),
    ]
    figures = make_figures(items, items, [ACCURACY], [(), ("length",)])
    assert [(dict(figure.group), figure.count, figure.model) for figure in figures] == [
        ({}, 5, pytest.approx(0.6)),
        ({"length": "long"}, 3, pytest.approx(2 / 3)),
        ({"length": "short"}, 1, 0.0),
    ]
    # One item says nothing about its spread.
    assert figures[2].interval is None
    assert figures[0].change == 0
    assert figures[0].change_interval == (0, 0)


def test_what_is_not_finite_is_no_number() -> None:
    items = [Item("a", {"nll": 5000.0, "tokens": 1}), Item("b", {"nll": math.nan, "tokens": 1})]
    (figure,) = make_figures(items, items, [PERPLEXITY], [()])
    assert (figure.model, figure.interval, figure.change, figure.change_interval) == (None, None, None, None)
    assert make_figures([], None, [PERPLEXITY], [()]) == ()


@given(st.lists(st.floats(-100, 100), min_size=5, max_size=30))
def test_the_interval_holds_the_figure_and_stays_within_the_scores(values: list[float]) -> None:
    (figure,) = make_figures(scored(values), None, [ACCURACY], [()])
    assert figure.interval is not None
    low, high = figure.interval
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_models_that_are_not_paired_are_resampled_apart() -> None:
    values = scored(list(np.random.default_rng(1).normal(0.0, 1.0, 300)))
    (figure,) = make_figures(values, values, [ACCURACY], [()], pair=False)
    assert figure.change == 0
    assert figure.change_interval is not None
    # The difference of two independent means, not zero as it is for the same items.
    assert figure.change_interval == pytest.approx((-1.96 * math.sqrt(2 / 300), 1.96 * math.sqrt(2 / 300)), abs=0.04)


def test_wins_and_ties_are_those_on_the_same_items() -> None:
    model, base = [1.0, 0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0]
    (figure,) = make_figures(scored(model), scored(base), [ACCURACY], [()])
    assert figure.at_least_as_good == 0.8
    worse = replace(ACCURACY, better="lower")
    assert make_figures(scored(model), scored(base), [worse], [()])[0].at_least_as_good == 0.8
    assert make_figures(scored([1.0] * 5), scored([0.0] * 5), [worse], [()])[0].at_least_as_good == 0.0
    apart = make_figures(scored(model), scored(base), [ACCURACY], [()], pair=False)
    assert [figure.at_least_as_good for figure in apart] == [None]
    (perplexity,) = make_figures(*[[Item("a", {"nll": 5.0, "tokens": 1})]] * 2, [PERPLEXITY], [()])
    assert perplexity.at_least_as_good is None
