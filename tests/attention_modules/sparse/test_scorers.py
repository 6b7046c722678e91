"""What stands for parts of blocks: a token chooses by what its own block holds up to it."""

import pytest
import torch

from attnconv.attention_modules import Geometry, create
from attnconv.attention_modules.sparse.slots.scorers import Antidiagonals, Boxes, Means, PrefixScorer, Products

GEOMETRY = Geometry(4, 2, 16, 16)


def test_only_scorers_without_an_order_know_what_stands_for_a_part() -> None:
    assert all(isinstance(scorer, PrefixScorer) for scorer in (Means(), Boxes()))
    assert not any(isinstance(scorer, PrefixScorer) for scorer in (Products(8), Antidiagonals(8, 4)))


@pytest.mark.parametrize("query", ["token", "first"])
@pytest.mark.parametrize("kernel", [4, 8])
def test_means_wider_than_what_is_there_of_a_block_are_means_of_that(query: str, kernel: int) -> None:
    options = {"block": 8, "kernel": kernel, "stride": 4, "dense_len": 0, "blocks": 2, "local_blocks": 0}
    module = create("infllm2", GEOMETRY, query=query, **options).double()
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, n, 60, 16, generator=generator, dtype=torch.float64) for n in (4, 2, 2)]
    with torch.no_grad():
        whole, state = module(*drawn, scaling=0.25), module.new_state()
        outs = [module(*(t[:, :, n : n + 1] for t in drawn), scaling=0.25, state=state) for n in range(60)]
    torch.testing.assert_close(torch.cat(outs, 2), whole)
