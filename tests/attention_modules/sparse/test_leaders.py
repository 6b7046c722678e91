"""Tokens that choose for those behind them: what they choose, how often, and what is counted of it."""

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.counting import counting
from attnconv.convert.writing.executed import computes_dense

GEOMETRY = Geometry(4, 2, 16, 24)
LENGTH = 60
RECYCLED = ("recycled", {"interval": 7, "budget": 9})
# Queries of which about a third are like the one that chose last.
VOTES = ("token_select", {"similarity": 0.1, "interval": 7, "budget": 9, "sink_blocks": 1, "local_blocks": 2})
SNAP = ("snap", {"interval": 7, "window": 4, "budget": 9, "kernel": 3})
LSERVE = ("lserve", {"block": 8, "part": 2, "interval": 4, "budget": 16, "sink_blocks": 0})


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 16), (2, 16), (2, 24)]
    query, key, value = (torch.randn(1, h, LENGTH, d, generator=generator, dtype=torch.float64) for h, d in shapes)
    return 3 * query, key, value


def test_tokens_recycle_what_the_last_that_saw_all_looked_at_most() -> None:
    name, options = RECYCLED
    query, key, _ = drawn()
    seen = create(name, GEOMETRY, **options).double().attention_weights(query, key, scaling=0.25) > 0
    for kv in range(2):
        for t in range(LENGTH):
            leader = t // 7 * 7
            weights = sum(
                (0.25 * key[0, kv, : leader + 1] @ query[0, head, leader]).softmax(0) for head in (2 * kv, 2 * kv + 1)
            )
            # The leader itself is one of those that it chooses.
            weights[leader] = torch.inf
            chosen = weights.topk(min(9, leader + 1)).indices.tolist()
            expected = set(range(t + 1)) if t == leader else {*chosen, *range(leader, t + 1)}
            assert set(seen[0, 2 * kv, t].nonzero().flatten().tolist()) == expected


def test_pages_count_for_the_best_of_their_parts_and_serve_a_few_tokens() -> None:
    name, options = LSERVE
    query, key, _ = drawn()
    seen = create(name, GEOMETRY, **options).double().attention_weights(query, key, scaling=0.25) > 0
    for kv in range(2):
        for t in (17, 22, 43, 59):
            leader, own = t // 4 * 4, t // 8
            shares = torch.zeros(own, dtype=torch.float64)
            for head in (2 * kv, 2 * kv + 1):
                parts = torch.stack(
                    [key[0, kv, : own * 8].view(-1, 2, 16).amax(1), key[0, kv, : own * 8].view(-1, 2, 16).amin(1)]
                )
                bounds = torch.maximum(*(query[0, head, leader] * parts)).sum(-1) * 0.25
                held = key[0, kv, own * 8 : leader + 1]
                part = torch.maximum(query[0, head, leader] * held.amax(0), query[0, head, leader] * held.amin(0)).sum()
                weights = torch.cat([bounds, part[None] * 0.25]).softmax(0)[:-1]
                shares += weights.view(own, 4).amax(1)
            found = {int(column) // 8 for column in seen[0, 2 * kv, t].nonzero()}
            assert found == {own, int(shares.argmax())}


def leaders_by_likeness(query: Tensor) -> list[int]:
    """Who chooses for each token with the options of `VOTES`."""
    wide, leaders = query[0].transpose(0, 1).flatten(1), list[int]()
    for t in range(LENGTH):
        is_alike = t % 7 and float(torch.cosine_similarity(wide[leaders[-1]], wide[t], 0)) >= 0.1
        leaders.append(leaders[-1] if is_alike else t)
    return leaders


def test_all_heads_vote_for_tokens_and_like_queries_keep_what_was_chosen() -> None:
    name, options = VOTES
    query, key, _ = drawn()
    seen = create(name, GEOMETRY, **options).double().attention_weights(query, key, scaling=0.25) > 0
    leaders = leaders_by_likeness(query)
    assert 20 < len(set(leaders)) < 50
    for t, leader in enumerate(leaders):
        votes = sum((0.25 * key[0, head // 2, : leader + 1] @ query[0, head, leader]).softmax(0) for head in range(4))
        votes[0] = torch.inf
        votes[max(leader - 2, 0) :] = torch.inf
        expected = {*votes.topk(min(9, leader + 1)).indices.tolist(), *range(leader, t + 1)}
        assert all(set(seen[0, head, t].nonzero().flatten().tolist()) == expected for head in range(4))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_window_of_queries_chooses_what_it_looks_at_most_and_its_neighbours(pooling: str) -> None:
    name, options = SNAP
    query, key, _ = drawn()
    module = create(name, GEOMETRY, **options, pooling=pooling).double()
    seen = module.attention_weights(query, key, scaling=0.25) > 0
    weights = create("softmax", GEOMETRY).double().attention_weights(query, key, scaling=0.25)[0]
    for t in range(LENGTH):
        leader = t // 7 * 7
        first = max(leader - 3, 0)
        for kv in range(2):
            summed = weights[2 * kv : 2 * kv + 2, first : leader + 1, :first].sum((0, 1)).tolist()
            near = [[0.0, *summed, 0.0][n : n + 3] for n in range(first)]
            pooled = torch.tensor([max(part) if pooling == "max" else sum(part) for part in near])
            # Of equal ones, which neighbours of a strong one are, the first.
            chosen = pooled.argsort(descending=True, stable=True)[:5].tolist()
            assert set(seen[0, 2 * kv, t].nonzero().flatten().tolist()) == {*chosen, *range(first, t + 1)}


def leaders_in_decoding(module: AttentionModule) -> list[int]:
    """Which tokens choose while those from the 30th on come one by one."""
    tensors, choose, leaders = drawn(), module._choice_of_leader, []

    def noted(call, state, count, leader):
        leaders.append(int(leader))
        return choose(call, state, count, leader)

    module._choice_of_leader = noted
    with torch.no_grad():
        state = module.new_state()
        for start, stop in zip((0, *range(30, LENGTH)), (30, *range(31, LENGTH + 1)), strict=True):
            module(*(t[:, :, start:stop] for t in tensors), scaling=0.25, state=state)
    return leaders


def test_decoding_votes_only_where_queries_are_unlike() -> None:
    name, options = VOTES
    chosen = leaders_in_decoding(create(name, GEOMETRY, **options).double())
    assert chosen == sorted(set(leaders_by_likeness(drawn()[0])[30:]))


@pytest.mark.parametrize("method", [RECYCLED, SNAP, LSERVE], ids=lambda method: method[0])
def test_decoding_chooses_once_for_an_interval_and_counts_what_it_reads(method: tuple[str, dict]) -> None:
    name, options = method
    module = create(name, GEOMETRY, **options).double()
    query, key, _ = drawn()
    weights = module.attention_weights(query, key, scaling=0.25)
    with counting(module) as counter:
        leaders = leaders_in_decoding(module)
    interval = options["interval"]
    assert leaders == sorted({t // interval * interval for t in range(30, LENGTH)})
    pairs = float((weights > 0).double().mean(1).sum())
    assert abs(counter.total.exact_pairs - pairs) <= counter.total.calls


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("method", [RECYCLED, VOTES, SNAP, LSERVE], ids=lambda method: method[0])
def test_a_choice_is_made_anew_where_its_leader_was_taken_back(method: tuple[str, dict], recorded: bool) -> None:
    name, options = method
    module = create(name, GEOMETRY, **options).double()
    query, key, value = drawn()
    with torch.no_grad():
        whole, state = module(query, key, value, scaling=0.25), module.new_state()
        state.record_past = recorded
        module(*(t[:, :, :40] for t in (query, key, value)), scaling=0.25, state=state)
        state.crop(0)
        for n in range(3):
            module(*(t.flip(2)[:, :, n : n + 1] for t in (query, key, value)), scaling=0.25, state=state)
        state.crop(3)
        state.record_past = False
        outs = [
            module(*(t[:, :, n : n + 1] for t in (query, key, value)), scaling=0.25, state=state)
            for n in range(40, LENGTH)
        ]
    torch.testing.assert_close(torch.cat(outs, 2), whole[:, :, 40:])


@pytest.mark.parametrize("method", [("recycled", {"interval": 9, "budget": 16}), ("lserve", {"budget": 128})])
def test_what_became_dense_is_noticed(method: tuple[str, dict]) -> None:
    name, options = method
    module = create(name, Geometry(2, 1, 16, 16), **options)
    assert not computes_dense(module)
    module._with_since = lambda keep, position, leader: (
        torch.arange(keep.shape[-1]) <= (position // module.slots.block)[:, None, :, None]
    ).expand(keep.shape)
    assert computes_dense(module)


def test_impossible_options_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="part=24 does not divide block=64"):
        create("lserve", GEOMETRY, part=24)
    with pytest.raises(ValueError, match="interval=5 does not divide block=64"):
        create("lserve", GEOMETRY, interval=5)
    with pytest.raises(ValueError, match="budget=640 is less than the 641 tokens that are always attended"):
        create("token_select", GEOMETRY, budget=640)
    with pytest.raises(ValueError, match="budget=32 leaves nothing to choose beside window=32"):
        create("snap", GEOMETRY, budget=32)
    with pytest.raises(ValueError, match="kernel=4 must be odd"):
        create("snap", GEOMETRY, kernel=4)
