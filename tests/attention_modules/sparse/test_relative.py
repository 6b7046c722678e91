"""Scores of four-bit products, and the blocks that stand out by them, written out."""

import pytest
import torch

from attnconv.attention_modules import Geometry, create
from attnconv.attention_modules.sparse.slots.relative import Above, relative_scores, rounded
from attnconv.attention_modules.sparse.slots.selectors import Forced

BLOCK, BLOCKS, SCALING = 4, 5, 0.25


def test_vectors_are_rounded_to_four_bits_by_their_largest_entry() -> None:
    vector = torch.tensor([[7.0, -7.0, 3.4, 0.6, -0.4], [0.0] * 5])
    assert rounded(vector).tolist() == [[7.0, -7.0, 3.0, 1.0, 0.0], [0.0] * 5]
    assert torch.equal(rounded(vector / 8), rounded(vector) / 8)


def test_scores_are_those_written_out() -> None:
    torch.manual_seed(0)
    queries = torch.randn(1, 1, 1, 2, BLOCK, 16, dtype=torch.float64)
    keys = torch.randn(1, 1, BLOCKS, BLOCK, 16, dtype=torch.float64)
    last, sinks = 3, Forced(1, 1)
    number = torch.tensor([[last]])
    scores = relative_scores(queries, keys, number, sinks.of(number, BLOCKS), scaling=SCALING)[0, 0, 0]
    expected = [0.0] * BLOCKS
    for query, place in ((queries[0, 0, 0, head, row], row) for head in range(2) for row in range(BLOCK)):
        seen = [(b, c) for b in range(last + 1) for c in range(BLOCK) if b < last or c <= place]
        weight = {at: float((SCALING * rounded(query) @ rounded(keys[0, 0][at])).exp()) for at in seen}
        near = sum(value for (block, _), value in weight.items() if block in (0, 2, 3))
        for (block, _), value in weight.items():
            expected[block] = max(expected[block], value / near)
    torch.testing.assert_close(scores.tolist(), expected)
    kept = Above(0.1).keep(scores[None, None, None], number, sinks.of(number, BLOCKS))[0, 0, 0]
    assert kept.tolist() == [True, expected[1] >= 0.1, True, True, False]


def test_a_key_that_is_sought_far_back_is_found_and_others_are_not() -> None:
    torch.manual_seed(0)
    query, key, value = (0.1 * torch.randn(1, 2, 64, 16, dtype=torch.float64) for _ in range(3))
    # The block before the last one asks for what stands in the third block.
    query[:, :, 52, 0], key[:, :, 18, 0] = 20.0, 20.0
    module = create("sale", Geometry(2, 2, 16, 16), block=8, local_blocks=0, dense_len=0, threshold=0.5).double()
    seen = (module.attention_weights(query, key, value=value, scaling=SCALING)[0, 0] > 0)[60]
    assert seen.nonzero().flatten().tolist() == [*range(8), *range(16, 24), *range(56, 61)]


def test_the_published_form_is_for_prompts() -> None:
    with pytest.raises(ValueError, match="needs decode: dense"):
        create("sale", Geometry(4, 2, 16, 16), query="block")
