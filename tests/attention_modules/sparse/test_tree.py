"""Blocks that are found by halving are those that halving finds, written out."""

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import Geometry, create
from attnconv.attention_modules.sparse.slots.tree import tree_shares
from attnconv.convert.writing.executed import computes_dense

GEOMETRY = Geometry(4, 2, 16, 24)
BLOCK, KEPT = 4, 3


def halved(queries: Tensor, keys: Tensor, own: int) -> set[int]:
    """Blocks before the own one that are left: queries `[G, M, D]`, keys `[S, D]`."""
    stretches = [(own * n // KEPT, own * (n + 1) // KEPT) for n in range(KEPT)]

    def score(stretch: tuple[int, int]) -> float:
        token = keys[sum(stretch) * BLOCK // 2]
        return float((queries @ token).amax(1).mean())

    while any(last - first > 1 for first, last in stretches):
        halves = [
            half
            for first, last in stretches
            for half in ((first, (first + last + 1) // 2), ((first + last + 1) // 2, last))
            if half[0] < half[1]
        ]
        stretches = sorted(halves, key=score, reverse=True)[:KEPT]
    return {first for first, last in stretches if last > first}


@pytest.mark.parametrize("published", [False, True])
def test_the_best_halves_go_on_until_they_are_blocks(published: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 64, 16, generator=generator, dtype=torch.float64) for heads in (4, 2))
    options = {"query": "block", "decode": "dense"} if published else {}
    module = create("hip", GEOMETRY, block=BLOCK, blocks=KEPT, sink_blocks=0, **options).double()
    seen = module.attention_weights(query, key, scaling=0.25) > 0
    for kv in range(2):
        for own in range(1, 16):
            chosen_by = own if published else own - 1
            queries = query[0, 2 * kv : 2 * kv + 2, chosen_by * BLOCK : (chosen_by + 1) * BLOCK]
            rows = seen[0, 2 * kv, own * BLOCK : (own + 1) * BLOCK]
            found = {int(column) // BLOCK for column in rows.any(0).nonzero()} - {own}
            left = halved(queries, key[0, kv], own)
            # The own block is one of the three.
            assert found <= left
            assert len(found) == min(own, KEPT - 1)


def test_a_key_that_stands_out_with_its_neighbours_is_found() -> None:
    """Halving finds what lies among its like, for one token of a stretch stands for all of it."""
    keys = torch.zeros(1, 1, 64, BLOCK, 8)
    keys[:, :, 40:48, :, 0] = 1.0
    keys[:, :, 44, :, 0] = 2.0
    queries = torch.zeros(1, 1, 1, 2, BLOCK, 8)
    queries[..., 0] = 3.0
    shares = tree_shares(queries, keys, torch.tensor([[63]]), kept=8, scaling=1.0)
    assert int(shares.argmax()) == 44
    assert float(shares.sum()) == pytest.approx(1.0)
    assert int((shares > 0).sum()) == 8


def test_what_became_dense_is_noticed_and_impossible_options_are_one_sentence() -> None:
    module = create("hip", Geometry(2, 1, 16, 16), block=8, blocks=4)
    assert not computes_dense(module)
    module._keep_by = lambda shares, number, blocks: torch.arange(blocks) <= number[:, None, :, None]
    assert computes_dense(module)
    with pytest.raises(ValueError, match="needs decode: dense"):
        create("hip", GEOMETRY, query="block")
