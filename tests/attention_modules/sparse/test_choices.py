"""What sparse methods choose, beside what their papers say, written out; and what is counted of it."""

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import Geometry, create
from attnconv.attention_modules.counting import counting
from attnconv.attention_modules.softmax import decode_dense
from attnconv.attention_modules.sparse.slots.canvas import Canvas
from attnconv.attention_modules.sparse.slots.selectors import Forced, TopBlocks, TopMass, indices_of
from attnconv.attention_modules.tokens import Call, Tokens
from attnconv.convert.writing.executed import computes_dense

GEOMETRY = Geometry(4, 2, 16, 24)
LENGTH = 90


def drawn(length: int = LENGTH, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 16), (2, 16), (2, 24)]
    query, key, value = (
        torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64) for heads, dim in shapes
    )
    return 3 * query, key, value


def attended(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`[B, H, T, S]` bool: pairs with a weight."""
    weights = module.attention_weights(query, key, scaling=0.25)
    return weights > 0


def test_antidiagonal_sums_choose_the_blocks_that_hold_the_mass() -> None:
    """XAttention written out: strided products, reversed queries, softmax, sums of blocks, then as few as needed."""
    block, stride, mass = 8, 4, 0.6
    query, key, value = drawn(64)
    module = create("xattention", GEOMETRY, block=block, stride=stride, mass=mass).double()
    seen = attended(module, query, key, value)
    for head in range(4):
        kv = head // 2
        for own in range(1, 8):
            shares = torch.zeros(own, dtype=torch.float64)
            for other in range(2 * kv, 2 * kv + 2):
                for row in range((own - 1) * 2, own * 2):
                    logits = torch.stack(
                        [
                            sum(
                                query[0, other, row * stride + stride - 1 - s] @ key[0, kv, column * stride + s]
                                for s in range(stride)
                            )
                            for column in range(row + 1)
                        ]
                    )
                    weights = (logits * 0.25 / stride).softmax(0)
                    for column, weight in enumerate(weights):
                        shares[column * stride // block] += weight / 4
            order = shares.argsort(descending=True)
            before = shares[order].cumsum(0) - shares[order]
            chosen = set(order[before < mass].tolist()) | {0, own}
            rows = seen[0, head, own * block : (own + 1) * block]
            found = {int(column) // block for column in rows.any(0).nonzero()}
            assert found == chosen, (head, own)


def test_products_of_the_block_before_are_its_attention() -> None:
    """By exact attention the choice is as good as one can be: the mass of each block, summed over queries and heads."""
    block = 8
    query, key, value = drawn(64)
    module = create("sparse", GEOMETRY, block=block, summary="products", blocks=3, sink_blocks=0).double()
    seen = attended(module, query, key, value)
    weights = create("softmax", GEOMETRY).double().attention_weights(query, key, scaling=0.25)
    mass = weights.unflatten(-1, (8, block)).sum(-1).unflatten(2, (8, block)).sum(3).unflatten(1, (2, 2)).sum(2)
    for kv in range(2):
        for own in range(3, 8):
            chosen = {own, *mass[0, kv, own - 1, :own].topk(2).indices.tolist()}
            rows = seen[0, 2 * kv, own * block : (own + 1) * block]
            assert {int(column) // block for column in rows.any(0).nonzero()} == chosen


def test_boxes_are_bounds_and_each_token_chooses_for_itself() -> None:
    block, budget = 4, 16
    query, key, value = drawn(40)
    module = create("quest", GEOMETRY, block=block, budget=budget, sink_blocks=0).double()
    seen = attended(module, query, key, value)
    for kv in range(2):
        for t in (15, 22, 39):
            own = t // block
            shares = torch.zeros(own + 1, dtype=torch.float64)
            for head in range(2 * kv, 2 * kv + 2):
                bounds = []
                for number in range(own + 1):
                    keys = key[0, kv, number * block : min((number + 1) * block, t + 1)]
                    high, low = keys.amax(0), keys.amin(0)
                    q = query[0, head, t]
                    bounds.append(torch.maximum(q * high, q * low).sum())
                    assert bounds[-1] >= (keys @ q).max() - 1e-12
                shares += (torch.stack(bounds) * 0.25).softmax(0)
            shares[own] = torch.inf
            chosen = set(shares.topk(min(budget // block, own + 1)).indices.tolist())
            found = {int(column) // block for column in seen[0, 2 * kv, t].nonzero()}
            assert found == chosen


def test_chunks_are_known_by_keys_that_attention_inside_them_weighs() -> None:
    """LongHeads written out; one query head, whose softmax does not change the order."""
    block, blocks = 8, 4
    query, key, _ = (t[:, :1] for t in drawn())
    module = create("longheads", Geometry(1, 1, 16, 24), block=block, blocks=blocks).double()
    seen = module.attention_weights(query, key, scaling=0.1) > 0
    pooled = []
    for own in key[0, 0, : LENGTH // block * block].split(block):
        mixed = torch.stack([((own @ token) / 4).softmax(0) @ own for token in own]).mean(0)
        pooled.append(((own @ mixed) / 4).softmax(0) @ own)
    for t in range(LENGTH):
        own = t // block
        scores = torch.stack(
            [query[0, 0, t] @ pooled[n] if n < own - 1 else key.new_tensor(torch.inf) for n in range(own + 1)]
        )
        scores[0] = torch.inf
        found = {int(column) // block for column in seen[0, 0, t].nonzero()}
        assert found == set(scores.topk(min(blocks, own + 1)).indices.tolist())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("xattention", {"block": 8, "stride": 4, "mass": 0.5}),
        ("xattention", {"block": 8, "stride": 4, "density": 0.3, "local_blocks": 1}),
        ("quest", {"block": 4, "budget": 16}),
        ("quest", {"block": 4, "mass": 0.5, "dense_len": 16}),
        ("sparse", {"block": 8, "summary": "products", "query": "first", "blocks": 4}),
        ("sparse", {"block": 8, "summary": "products", "query": "previous", "mass": 0.5}),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_counted_are_the_pairs_with_a_weight(method: str, options: dict, padded: bool) -> None:
    query, key, value = drawn(batch=2)
    mask = torch.arange(LENGTH) >= torch.tensor([[0], [31]]) if padded else None
    module = create(method, GEOMETRY, **options).double()
    weights = module.attention_weights(query, key, scaling=0.25, padding_mask=mask)
    pairs = round(float((weights > 0).double().mean(1).sum()))
    with torch.no_grad(), counting(module) as counter:
        module(query, key, value, scaling=0.25, padding_mask=mask)
    whole = counter.total
    assert whole.exact_pairs == pairs < whole.dense_pairs
    with torch.no_grad(), counting(module) as counter:
        state = module.new_state()
        for start, stop in zip((0, 40, *range(41, LENGTH)), (40, *range(41, LENGTH + 1)), strict=True):
            part = (t[:, :, start:stop] for t in (query, key, value))
            module(*part, scaling=0.25, state=state, padding_mask=None if mask is None else mask[:, start:stop])
    # Each call is rounded to whole pairs.
    assert abs(counter.total.exact_pairs - pairs) <= counter.total.calls


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_calls_that_are_dense_by_choice_are_counted_so(part: str) -> None:
    query, key, value = drawn()
    module = create("quest", GEOMETRY, block=4, budget=16, **{part: "dense"}).double()
    found = {}
    with torch.no_grad():
        state = module.new_state()
        for name, cut in (("prefill", slice(0, -1)), ("decode", slice(-1, None))):
            with counting(module) as counter:
                module(*(t[:, :, cut] for t in (query, key, value)), scaling=0.25, state=state)
            found[name] = counter.total.density
    assert found.pop(part) == 1.0
    assert all(0 < density < 0.5 for density in found.values())


@pytest.mark.parametrize("method", [("sparse", {"query": "first"}), ("xattention", {"stride": 4})])
def test_a_choice_is_made_anew_where_tokens_were_taken_back(method: tuple[str, dict]) -> None:
    """Drafts that were decoded one by one, or came together, are taken back to where their block begins."""
    name, options = method
    module = create(name, GEOMETRY, block=8, mass=0.4, **options).double()
    query, key, value = drawn()
    drafts = [t.flip(2) for t in (query, key, value)]
    with torch.no_grad():
        whole = module(query, key, value, scaling=0.25)
        for one_by_one in (True, False):
            state = module.new_state()
            state.record_past = True
            module(*(t[:, :, :56] for t in (query, key, value)), scaling=0.25, state=state)
            state.crop(0)
            for cut in [(n, n + 1) for n in range(4)] if one_by_one else [(0, 4)]:
                module(*(t[:, :, slice(*cut)] for t in drafts), scaling=0.25, state=state)
            state.crop(4)
            state.record_past = False
            outs = [
                module(*(t[:, :, n : n + 1] for t in (query, key, value)), scaling=0.25, state=state)
                for n in range(56, 70)
            ]
            torch.testing.assert_close(torch.cat(outs, 2), whole[:, :, 56:70])


def test_a_density_is_that_of_all_pairs_so_far() -> None:
    number = torch.arange(50)[None]
    for density in (0.1, 0.25, 0.5, 1.0):
        chosen = TopBlocks(density=density).number_at(number)[0]
        assert bool((chosen >= 1).all())
        for blocks in (20, 50):
            pairs = float(chosen[:blocks].sum()) - blocks / 2
            assert abs(pairs / (blocks**2 / 2) - density) < 2.5 / blocks


def test_forced_blocks_and_indices() -> None:
    number = torch.tensor([[0, 1, 5]])
    forced = Forced(sinks=2, local=1).of(number, 6)
    assert forced[0, 0].long().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1]]
    assert Forced(sinks=2, local=1).number_of(number).tolist() == forced[:, 0].sum(-1).tolist()
    keep = TopMass(0.5).keep(torch.zeros(1, 1, 3, 6), number, forced)
    assert torch.equal(keep, forced)
    assert indices_of(keep, number, 4)[0, 0].tolist() == [[0, -1, -1, -1], [1, 0, -1, -1], [5, 0, 1, 4]]


def test_queries_begin_where_blocks_of_their_row_begin() -> None:
    """Two rows of unlike padding, of which the newest seven tokens are a call's."""
    valid = torch.arange(20) >= torch.tensor([[0], [9]])
    keys = torch.arange(20.0).expand(2, 20)[:, None, :, None]
    query = keys[:, :, 13:].expand(-1, 2, -1, -1)
    canvas = Canvas.of(Call(query, Tokens(keys, keys, valid), 1.0), 4)
    assert canvas.number.tolist() == [[3, 4, 4], [1, 2, 3]]
    assert canvas.keys[1, 0, :3, :, 0].tolist() == [[9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 0]]
    blocks = canvas.query_blocks(query)
    assert blocks[0, 0, 1, 0, :, 0].tolist() == [16, 17, 18, 19]
    assert blocks[1, 0, 0, 0, :, 0].tolist() == [13, 14, 15, 16]
    assert torch.equal(canvas.unblock(blocks, 7), query)


def test_own_queries_choose_as_published_in_prompts_alone() -> None:
    options = {"block": 8, "stride": 4, "mass": 0.5, "query": "block"}
    with pytest.raises(ValueError, match="query: block .* needs decode: dense"):
        create("xattention", GEOMETRY, **options)
    module = create("xattention", GEOMETRY, **options, decode="dense").double()
    query, key, value = drawn()
    out = module(query, key, value, scaling=0.25)
    naive = create("xattention", GEOMETRY, **options, decode="dense", implementation="naive").double()
    torch.testing.assert_close(out, naive(query, key, value, scaling=0.25))
    state = module.new_state()
    module(*(t[:, :, :-1] for t in (query, key, value)), scaling=0.25, state=state)
    last = module(*(t[:, :, -1:] for t in (query, key, value)), scaling=0.25, state=state)
    dense = create("softmax", GEOMETRY).double()(query, key, value, scaling=0.25)
    torch.testing.assert_close(last, dense[:, :, -1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 8, "stride": 3}, "stride=3 does not divide block=8"),
        ({"mass": 0.5, "density": 0.5}, "give mass or density, not both"),
    ],
)
def test_impossible_options_are_one_sentence(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("xattention", GEOMETRY, **options)


@pytest.mark.parametrize("options", [{"mass": 0.9}, {"density": 0.25}, {"query": "block", "decode": "dense"}])
def test_sparse_attention_that_was_made_dense_is_noticed(options: dict) -> None:
    module = create("xattention", Geometry(2, 1, 16, 16), **options)
    assert not computes_dense(module)
    module._keep_by = lambda shares, number, blocks: torch.arange(blocks) <= number[:, None, :, None]
    assert computes_dense(module)
    quest = create("quest", Geometry(2, 1, 16, 16), budget=64, prefill="dense")
    assert not computes_dense(quest)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("quest", {"budget": 1024}),
        ("delta", {"role": "reuse", "budget": 1024}),
        ("delta", {"role": "reuse", "budget": 64}),
    ],
)
def test_decoding_that_was_made_dense_is_noticed_where_prompts_are_by_choice(method: str, options: dict) -> None:
    module = create(method, Geometry(2, 1, 16, 16), prefill="dense", **options)
    assert not computes_dense(module)
    module.decode_torch = lambda call, state: decode_dense(call.over(call.query, state.append(call.tokens)))
    assert computes_dense(module)


def test_queries_of_earlier_tokens_must_be_known() -> None:
    query, key, value = drawn()
    with pytest.raises(ValueError, match="reads the queries of earlier tokens"):
        create("xattention", GEOMETRY).double()(query[:, :, -5:], key, value, scaling=0.25)


def test_heads_of_a_layer_may_choose_in_unlike_ways() -> None:
    """Each part of the heads keeps queries and choices of its own."""
    parts = [
        {"groups": [0], "method": "xattention", "options": {"block": 8, "stride": 4, "mass": 0.5}},
        {"method": "quest", "options": {"block": 4, "budget": 16}},
    ]
    module = create("by_head", GEOMETRY, parts=parts).double()
    query, key, value = drawn()
    with torch.no_grad():
        whole, state = module(query, key, value, scaling=0.25), module.new_state()
        outs = [
            module(*(t[:, :, start:stop] for t in (query, key, value)), scaling=0.25, state=state)
            for start, stop in zip((0, 40, *range(41, LENGTH)), (40, *range(41, LENGTH + 1)), strict=True)
        ]
        torch.testing.assert_close(torch.cat(outs, 2), whole)
        with counting(module) as counter:
            module(query, key, value, scaling=0.25)
    alone = create("quest", Geometry(2, 1, 16, 24), block=4, budget=16).double()
    torch.testing.assert_close(whole[:, 2:], alone(query[:, 2:], key[:, 1:], value[:, 1:], scaling=0.25))
    assert 0.2 < counter.total.density < 0.8
    assert module.earlier_queries == 15
    with pytest.raises(ValueError, match="can be taken back exactly"):
        state.crop(40)


def test_of_a_strip_of_queries_the_tokens_that_one_of_them_sees_are_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    read, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, *args: object, **kwargs: object) -> Tensor:
        read.append(key.shape[-2])
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    query, key, value = drawn(600)
    # All tokens look to one side, so that they choose like blocks.
    query, key = query * 0.01 + 1, key + torch.linspace(0, 1, 600, dtype=torch.float64)[:, None]
    create("moba", GEOMETRY, block=20, top_k=2).double()(query, key, value, scaling=0.25)
    # Two KV heads, strips of 256 queries: from the block before that of the first query on.
    assert read == [256, 256, 292, 292, 120, 120]
