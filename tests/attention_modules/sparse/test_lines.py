"""Lines of an attention map are found where they are, and what a few queries saw is attended by those behind them."""

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import Geometry, create
from attnconv.attention_modules.sparse.slots.lines import (
    Lines,
    StrongestLines,
    covering_lines,
    on_lines,
    square_root_divergence,
)
from attnconv.convert.writing.executed import computes_dense

GEOMETRY = Geometry(4, 2, 16, 24)
BLOCK, REFRESH, LENGTH = 4, 16, 48


def drawn(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 16), (2, 16)]
    query, key = (torch.randn(1, h, length, d, generator=generator, dtype=torch.float64) for h, d in shapes)
    return 3 * query, key


def blocks_seen(weights: Tensor, head: int, own: int) -> set[int]:
    rows = weights[0, head, own * BLOCK : (own + 1) * BLOCK] > 0
    return {int(column) // BLOCK for column in rows.any(0).nonzero()}


def seen_by(query: Tensor, key: Tensor, kv: int, end: int) -> Tensor:
    """`[BLOCK, end]` weights of the queries before `end`, mean over the heads that share keys, written out."""
    weights = torch.zeros(BLOCK, end, dtype=torch.float64)
    for head in range(2 * kv, 2 * kv + 2):
        for row, t in enumerate(range(end - BLOCK, end)):
            logits = torch.stack([query[0, head, t] @ key[0, kv, s] for s in range(t + 1)])
            weights[row, : t + 1] += (0.25 * logits).softmax(0) / 2
    return weights


@pytest.mark.parametrize("published", [False, True])
def test_the_strongest_columns_and_diagonals_that_the_last_queries_before_saw(published: bool) -> None:
    query, key = drawn()
    options = {"query": "prompt", "decode": "dense"} if published else {}
    module = create(
        "vertical_slash", GEOMETRY, block=BLOCK, refresh=REFRESH, columns=2, diagonals=1, local_blocks=0, **options
    ).double()
    found = module.attention_weights(query, key, scaling=0.25)
    for kv in range(2):
        for own in range(0 if published else REFRESH // BLOCK, LENGTH // BLOCK):
            end = LENGTH if published else own * BLOCK // REFRESH * REFRESH
            weights = seen_by(query, key, kv, end)
            columns = weights.sum(0)
            diagonals = torch.zeros(end, dtype=torch.float64)
            for row in range(BLOCK):
                for s in range(end - BLOCK + row + 1):
                    diagonals[end - BLOCK + row - s] += weights[row, s]
            strongest = columns.view(-1, BLOCK).amax(1).topk(2).indices.tolist()
            (back,) = diagonals.view(-1, BLOCK).amax(1).topk(1).indices.tolist()
            chosen = {own, 0, *strongest, own - back, own - back - 1}
            assert blocks_seen(found, 2 * kv, own) == {n for n in chosen if 0 <= n <= own}
    if not published:
        first = found[0, :, :REFRESH, :REFRESH]
        assert torch.equal(first > 0, torch.ones_like(first, dtype=torch.bool).tril())


def test_heads_that_block_means_tell_choose_by_them_and_others_by_lines() -> None:
    """With the divergence at 1 all heads choose by means, at 0 all follow lines; in between each does what it is."""
    query, key = drawn()
    given = {"block": BLOCK, "refresh": REFRESH, "mass": 0.5}
    by_means = create("sparse", GEOMETRY, block=BLOCK, mass=0.5, dense_len=REFRESH).double()
    weights = {"means": by_means.attention_weights(query, key, scaling=0.25)}
    for name, divergence in (("all", 1.0), ("lines", 0.0)):
        module = create("flexprefill", GEOMETRY, **given, divergence=divergence).double()
        weights[name] = module.attention_weights(query, key, scaling=0.25)
    torch.testing.assert_close(weights["all"], weights["means"])
    for kv in range(2):
        own = 9
        seen = seen_by(query, key, kv, 32)
        of_blocks = seen.sum(0).view(-1, BLOCK).sum(1) / BLOCK
        order = of_blocks.argsort(descending=True)
        needed = order[: int((of_blocks[order].cumsum(0) < 0.5).sum()) + 1]
        assert set(needed.tolist()) <= blocks_seen(weights["lines"], 2 * kv, own)
    assert blocks_seen(weights["lines"], 0, 9) < set(range(10))


def test_whether_means_tell_is_judged_by_the_queries_before() -> None:
    query, key = drawn()
    divergences = []
    for kv in range(2):
        seen = seen_by(query, key, kv, 16).sum(0).view(-1, BLOCK).sum(1) / BLOCK
        means = key[0, kv, :16].view(-1, BLOCK, 16).mean(1)
        guessed = sum((0.25 * means @ query[0, head, 12:16].mean(0)).softmax(0) / 2 for head in (2 * kv, 2 * kv + 1))
        middle = (seen + guessed) / 2
        divergence = 0.5 * ((seen * (seen / middle).log()).sum() + (guessed * (guessed / middle).log()).sum())
        divergences.append(float(divergence.sqrt()))
    limit = sum(divergences) / 2
    given = {"block": BLOCK, "refresh": REFRESH, "mass": 0.5}
    found, means, lines = (
        create("flexprefill", GEOMETRY, **given, divergence=d).double().attention_weights(query, key, scaling=0.25)
        for d in (limit, 1.0, 0.0)
    )
    for kv, divergence in enumerate(divergences):
        expected = means if divergence < limit else lines
        assert torch.equal(found[0, 2 * kv, 16:32], expected[0, 2 * kv, 16:32])
    assert not torch.equal(means[0, :, 16:32], lines[0, :, 16:32])


def test_lines_by_hand() -> None:
    lines = Lines(torch.tensor([[[0.6, 0, 0, 0, 0.3, 0.1]]]), torch.tensor([[[0.1, 0, 0, 0, 0, 0.9]]]))
    columns, diagonals = StrongestLines(1, 1).choose(lines, 2)
    assert columns.tolist() == [[[True, False, False]]]
    assert diagonals.tolist() == [[[False, False, True]]]
    assert covering_lines(lines, 2, 0.7)[0].tolist() == [[[True, False, True]]]
    # Distances of 4 and 5 lie two blocks back and three.
    kept = on_lines(columns, diagonals, torch.tensor([[0, 1, 2]]))
    assert kept[0, 0].tolist() == [[True, False, False], [True, False, False], [True, False, False]]
    one = torch.tensor([1.0, 0.0])
    assert float(square_root_divergence(one, one)) == 0.0
    assert float(square_root_divergence(one, one.flip(0))) == pytest.approx(0.6931**0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("vertical_slash", {"refresh": 100}, "block=64 does not divide refresh=100"),
        ("flexprefill", {"query": "prompt"}, "needs decode: dense"),
    ],
)
def test_impossible_options_are_one_sentence(method: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(method, GEOMETRY, **options)


@pytest.mark.parametrize("method", ["vertical_slash", "flexprefill"])
def test_lines_that_became_all_are_noticed(method: str) -> None:
    module = create(method, Geometry(2, 1, 16, 16), block=16, refresh=64)
    assert not computes_dense(module)
    module._keep = lambda call, canvas, columns: torch.ones(1, 1, canvas.num_rows, canvas.num_blocks).bool().tril()
    assert computes_dense(module)
