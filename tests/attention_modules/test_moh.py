"""Mixture of heads: its formulas, the start that changes nothing, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import Geometry, create
from attnconv.attention_modules.heads.gate import HeadUse

GEOMETRY = Geometry(6, 3, 8, 8, hidden_size=12)


def inputs(length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (6, 8), "key": (3, 8), "value": (3, 8)}
    drawn = {name: torch.randn(2, heads, length, dim, generator=generator) for name, (heads, dim) in shapes.items()}
    return {**drawn, "hidden_states": torch.randn(2, length, 12, generator=generator)}


def moh(**options: Any) -> Any:
    torch.manual_seed(1)
    core = create("moh", GEOMETRY, **options)
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter)
    return core


def gates(core: Any) -> Tensor:
    drawn = inputs()
    with torch.no_grad():
        found: Tensor = core.gates(drawn["query"], drawn["hidden_states"]).transpose(1, 2)
    return found


@pytest.mark.parametrize("options", [{}, {"unit": "group"}, {"num_shared": 2}, {"shared": [1], "unit": "group"}])
@pytest.mark.parametrize("heads", [6, 49])
def test_routers_of_zero_are_softmax_bit_for_bit(options: dict[str, Any], heads: int) -> None:
    """Also where 1 / n * n is not 1."""
    geometry = Geometry(heads, heads if heads == 49 else 3, 8, 8, hidden_size=12)
    core = create("moh", geometry, **options)
    drawn = inputs()["hidden_states"]
    query = torch.randn(2, heads, 9, 8)
    assert torch.equal(core.gates(query, drawn), torch.ones(2, heads, 9))


def test_code_form() -> None:
    core = moh(num_shared=2, active=2)
    hidden = inputs()["hidden_states"]
    alpha = (hidden @ core.balance.T).softmax(-1)
    shared = 2 * alpha[..., :1] * 2 * (hidden @ core.shared_router.T).softmax(-1)
    scores = hidden @ core.routed_router.T
    values, places = scores.topk(2, -1)
    routed = torch.zeros_like(scores).scatter(-1, places, 2 * values.softmax(-1)) * 2 * alpha[..., 1:]
    torch.testing.assert_close(gates(core), torch.cat([shared, routed], -1).detach())


@pytest.mark.parametrize("options", [{"active": 1}, {"active": 1, "num_shared": 1}, {"active": 2, "unit": "group"}])
def test_gates_are_the_same_with_and_without_gradients(options: dict[str, Any]) -> None:
    core, drawn = moh(**options), inputs()
    with_gradients = core.gates(drawn["query"], drawn["hidden_states"]).transpose(1, 2)
    assert with_gradients.requires_grad
    torch.testing.assert_close(gates(core), with_gradients.detach(), rtol=0, atol=0)


def test_paper_form() -> None:
    core = moh(shared=[4, 1], active=2, form="paper")
    hidden = inputs()["hidden_states"]
    alpha = (hidden @ core.balance.T).softmax(-1)
    shared = alpha[..., :1] * (hidden @ core.shared_router.T).softmax(-1)
    weights = (hidden @ core.routed_router.T).softmax(-1)
    kept = weights * (weights >= weights.topk(2, -1).values[..., -1:]) * alpha[..., 1:]
    found = gates(core)
    torch.testing.assert_close(found[..., [1, 4]], shared.detach())
    torch.testing.assert_close(found[..., [0, 2, 3, 5]], kept.detach())
    assert (found.sum(-1) <= 1 + 1e-6).all()


def test_groups_are_switched_as_one() -> None:
    found = gates(moh(unit="group", active=1))
    assert torch.equal(found[..., ::2], found[..., 1::2])
    assert ((found[..., ::2] != 0).sum(-1) == 1).all()


def test_query_norm_takes_the_longest_queries_with_gates_of_one_and_their_gradient() -> None:
    core = moh(router="query_norm", active=2, num_shared=1)
    assert not list(core.parameters())
    query = inputs()["query"].requires_grad_()
    found = core.gates(query, None)
    lengths = query.detach().norm(dim=-1)
    chosen = lengths[:, 1:] >= lengths[:, 1:].topk(2, 1).values[:, -1:]
    assert torch.equal(found[:, 1:], chosen.float())
    assert torch.equal(found[:, 0], torch.ones(2, 9))
    found.sum().backward()
    assert query.grad is not None
    moved = query.grad.norm(dim=-1) > 0
    assert torch.equal(moved[:, 1:], chosen)
    assert not moved[:, 0].any()


def test_a_fitted_router_prefers_what_contributes_and_hardly_weighs_it() -> None:
    core = moh(active=3)
    contributions, hidden = torch.randn(6, 12, dtype=torch.float64), torch.randn(4000, 12, dtype=torch.float64)
    core.start_from(HeadUse(contributions, hidden.T @ hidden / len(hidden), torch.ones(6), torch.ones(6)))
    scores = hidden @ core.routed_router.detach().double().T
    assert torch.equal(scores.topk(3, -1).indices, (hidden @ contributions.T).topk(3, -1).indices)
    assert float(scores.square().mean().sqrt()) == pytest.approx(0.03, rel=1e-3)
    assert core.tie is None
    torch.nn.init.zeros_(core.routed_router)
    assert "the same heads would be dropped" in core.tie


@pytest.mark.parametrize("router", ["linear", "query_norm"])
@pytest.mark.parametrize(("unit", "contribution"), [("head", [1, 5, 2, 6, 3, 4]), ("group", [1, 3, 2])])
def test_units_that_contribute_most_are_shared(router: str, unit: str, contribution: list[int]) -> None:
    """The same as naming them."""
    options = {"router": router, "unit": unit, "active": 1}
    best = sorted(range(len(contribution)), key=lambda number: -contribution[number])[:2]
    units = len(contribution)
    core, named = moh(num_shared=2, shared_by="contribution", **options), moh(shared=best, **options)
    assert core.observed_units == units
    use = HeadUse(torch.randn(units, 12), torch.eye(12), torch.tensor(contribution).float(), torch.ones(units))
    core.start_from(use)
    named.start_from(use)
    assert core.shared_units == named.shared_units == sorted(best)
    for name, parameter in named.named_parameters():
        parameter.data.copy_(core.get_parameter(name).data)
    assert torch.equal(gates(core), gates(named))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"active": 7}, "active=7 is more than the 6 heads that are routed"),
        ({"active": 3, "unit": "group", "num_shared": 1}, "active=3 is more than the 2 KV heads that are routed"),
        ({"shared": [6]}, "shared names the unit 6, but the layer has 6 heads, numbered from 0"),
        ({"shared": [1, 1]}, "shared names a unit twice"),
        ({"shared": [1], "num_shared": 1}, "give shared or num_shared, not both"),
        ({"num_shared": 6}, "all 6 heads are shared"),
        ({"shared_by": "contribution"}, "say how many"),
        ({"router": "query_norm", "form": "paper"}, "query_norm has gates of 1"),
    ],
)
def test_what_cannot_be_routed_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create("moh", GEOMETRY, **options)
