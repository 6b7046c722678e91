"""Patterns that look at no key attend what their papers say."""

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import Geometry, create
from attnconv.attention_modules.sparse.slots.patterns import Powers, Scattered, Spans, Strided
from attnconv.attention_modules.sparse.slots.selectors import Forced

NUMBER = torch.arange(40)[None]


def kept(selector, heads: int = 2, sinks: int = 0) -> Tensor:
    """`[heads, 40, 40]` bool."""
    forced = Forced(sinks, 0).of(NUMBER, 40)
    return selector.keep(torch.zeros(1, heads, 40, 40), NUMBER, forced)[0]


def test_powers_of_two_and_the_own_block() -> None:
    row = kept(Powers())[1, 37]
    assert row.nonzero().flatten().tolist() == [5, 21, 29, 33, 35, 36, 37]
    reach = kept(Powers())[0].double()
    # Any block is reached in as many steps as its distance has ones.
    assert bool((torch.linalg.matrix_power(reach, 6) > 0).tril()[39].all())


def test_heads_together_see_all_at_their_strides() -> None:
    both = kept(Strided(3, offset_by_head=True), heads=3)
    assert both[0, 20].nonzero().flatten().tolist() == [2, 5, 8, 11, 14, 17, 20]
    assert torch.equal(both.any(0), torch.ones(40, 40, dtype=torch.bool).tril())
    alike = kept(Strided(3), heads=3)
    assert torch.equal(alike[0], alike[2])


def test_chance_is_the_same_each_time_and_never_ahead() -> None:
    first, second = kept(Scattered(3, seed=1)), kept(Scattered(3, seed=1))
    assert torch.equal(first, second)
    assert not torch.equal(first, kept(Scattered(3, seed=2)))
    assert not torch.equal(first[0], first[1])
    assert not first.triu(1).any()
    spread = kept(Scattered(3), heads=8)[:, 39].double().mean(0)
    assert float(spread[:20].sum()) > 0.2 * float(spread.sum()) < float(spread[20:39].sum()) + 2


def test_spans_grow_with_the_text_and_differ_by_head() -> None:
    spans = Spans(base=(8.0, 4.0), growth=(0.0, 0.5), block=4)
    seen = kept(spans, sinks=1)
    assert seen[0, 20].nonzero().flatten().tolist() == [0, 19, 20]
    assert seen[1, 20].nonzero().flatten().tolist() == [0, *range(10, 21)]
    assert spans.share_at(160) == pytest.approx(float(kept(spans).sum()) / (2 * 40 * 41 / 2))


def test_neighbours_stand_at_their_distances_and_are_counted() -> None:
    drawn = {heads: torch.randn(1, heads, 60, 16, dtype=torch.float64) for heads in (4, 2)}
    rank = torch.arange(1, 61)[None]
    for causal, last in ((True, 40), (False, 52)):
        module = create("neighborhood", Geometry(4, 2, 16, 16, causal=causal), window=5, dilation=3).double()
        seen = module.attention_weights(drawn[4], drawn[2], scaling=0.25)[0, 0] > 0
        assert seen[40].nonzero().flatten().tolist() == list(range(28, last + 1, 3))
        assert torch.equal(module.tokens_attended(rank, rank[:, -1:])[0], seen.sum(-1))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("spans", {"base": [1.0, 2.0, 3.0]}, "base has 3 numbers, but the layer has 2 KV heads"),
        ("spans", {"growth": -0.5}, "growth has a number below zero: -0.5"),
        ("sparse", {"blocks": 3, "mass": 0.5}, "give blocks, mass or density, not two of them"),
        ("sparse", {"summary": "antidiagonals", "query": "token"}, "query: token cannot choose by them"),
        ("sparse", {"query": "block"}, "needs decode: dense"),
    ],
)
def test_impossible_options_are_one_sentence(method: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(method, Geometry(4, 2, 16, 16), **options)
