"""What learned choices choose, beside their formulas written out; what they are trained by is in `tests/distill`."""

import math

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.counting import counting
from attnconv.attention_modules.tokens import Surroundings

GEOMETRY, LENGTH, BLOCK, SCALING = Geometry(4, 2, 16, 16), 60, 8, 0.25


def drawn(module: AttentionModule) -> tuple[list[Tensor], Surroundings]:
    """Query, key and value, and others as if a rotary embedding stood between."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    tensors = [torch.randn(1, n, LENGTH, 16, generator=generator, dtype=torch.float64) for n in (4, 2, 2, 4, 2)]
    return [2 * tensors[0], *tensors[1:3]], Surroundings(unrotated=(tensors[3], tensors[4]))


def attended(module: AttentionModule, tensors: list[Tensor], around: Surroundings) -> Tensor:
    """`[KV, T, S]` bool: pairs with a weight."""
    seen = module.attention_weights(*tensors[:2], scaling=SCALING, around=around)[0] > 0
    assert torch.equal(seen[0::2], seen[1::2])
    return seen[0::2]


def turned(vector: Tensor, place: float) -> Tensor:
    half = len(vector) // 2
    out = torch.empty_like(vector)
    for i in range(half):
        angle = place * 10_000 ** (-i / half)
        out[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
        out[i + half] = vector[i + half] * math.cos(angle) + vector[i] * math.sin(angle)
    return out


@pytest.mark.parametrize("query", ["previous", "token", "first", "block"])
def test_gates_choose_by_pooled_queries_and_keys(query: str) -> None:
    decode = "dense" if query == "block" else "sparse"
    module = create("seer", GEOMETRY, block=BLOCK, gate_dim=6, mass=0.5, query=query, decode=decode).double()
    tensors, around = drawn(module)
    seen, (queries, keys) = attended(module, tensors, around), around.unrotated or ()
    for kv in range(2):
        for number in (2, 5):
            own = number * BLOCK
            chosen_by = {
                "previous": (range(own - BLOCK, own), own + 3.5),
                "block": (range(own, own + BLOCK), own + 3.5),
                "first": ([own], own),
                "token": ([own + 3], own + 3),
            }
            rows, place = chosen_by[query]
            pooled = torch.cat([queries[0, 2 * kv + g, list(rows)].mean(0) for g in range(2)])
            row = turned(pooled @ module.gate_query[kv], place)
            logits = []
            for block in range(number):
                part = keys[0, kv, block * BLOCK : (block + 1) * BLOCK]
                column = torch.cat([part.amax(0), part.amin(0), part.mean(0)]) @ module.gate_key[kv]
                logits.append(row @ turned(column, block * BLOCK + 3.5) * SCALING * module.gate_scale[kv].exp())
            # Of what is left without the first block, which is attended anyway.
            shares = torch.stack(logits)[1:].softmax(0)
            order = shares.argsort(descending=True)
            before = shares[order].cumsum(0) - shares[order]
            wanted = {0, number} | {int(block) + 1 for block in order[before < 0.5]}
            assert {int(key) // BLOCK for key in seen[kv, own + 3].nonzero()} == wanted, (kv, number)


def test_an_index_chooses_single_tokens() -> None:
    module = create("dsa", GEOMETRY, budget=12, index_dim=6, sink_blocks=1, local_blocks=2).double()
    tensors, around = drawn(module)
    seen, (query, key, _) = attended(module, tensors, around), tensors
    for kv in range(2):
        for t in (5, 30, 59):
            logits = torch.zeros(t, dtype=torch.float64)
            for head in (2 * kv, 2 * kv + 1):
                weight = 1 + query[0, head, t] @ module.index_weight[head]
                index = query[0, head, t] @ module.index_query[head]
                logits += weight * (key[0, kv, :t] @ module.index_key[kv] @ index * SCALING).relu()
            logits[0] = torch.inf
            logits[t - 2 :] = torch.inf
            wanted = {t, *logits.sort(descending=True, stable=True).indices[:11].tolist()}
            assert set(seen[kv, t].nonzero()[:, 0].tolist()) == wanted


@pytest.mark.parametrize(("method", "options"), [("seer", {"query": "token"}), ("dsa", {"density": 0.3})])
def test_what_is_counted_are_the_pairs_with_a_weight(method: str, options: dict) -> None:
    module = create(method, GEOMETRY, block=4, **options).double()
    tensors, around = drawn(module)
    pairs = int(attended(module, tensors, around).double().mean(0).sum().round())
    with torch.no_grad(), counting(module) as counter:
        module(*tensors, scaling=SCALING, around=around)
    assert counter.total.exact_pairs == pairs < counter.total.dense_pairs


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("seer", {"gate_dim": 5}, "gate_dim=5 is odd"),
        ("seer", {"query": "block"}, "it needs decode: dense"),
        ("seer", {"mass": 0.5, "density": 0.5}, "give mass or density, not both"),
        ("dsa", {"mass": 0.5, "density": 0.5}, "give density or mass, not both"),
    ],
)
def test_impossible_options_are_one_sentence(method: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(method, GEOMETRY, **options)


@pytest.mark.parametrize(("method", "options"), [("seer", {"gate_dim": 8}), ("dsa", {"index_dim": 8})])
def test_what_was_fitted_on_another_model_is_one_sentence(method: str, options: dict) -> None:
    fitted = create(method, Geometry(8, 4, 32, 32), **options)
    with pytest.raises(RuntimeError) as error:
        create(method, GEOMETRY, **options).load_state_dict(fitted.state_dict())
    _, said = str(error.value).splitlines()
    assert "was fitted on another model, or for other options" in said
    assert f"fit '{method}' on this model" in said
