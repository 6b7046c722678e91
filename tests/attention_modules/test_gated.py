"""Gated linear attention against its definition with every weight written out, and its two kinds of gates."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.linear.recurrent import decay_slopes

HIDDEN = 12
GEOMETRY = Geometry(4, 2, 8, 6, hidden_size=HIDDEN)
LENGTH = 45


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(length: int = LENGTH) -> dict[str, Any]:
    shapes = {"query": (2, 4, length, 8), "key": (2, 2, length, 8), "value": (2, 2, length, 6)}
    tensors = {name: draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    return {**tensors, "hidden_states": draw(2, length, HIDDEN, seed=9), "scaling": 0.4}


def core(**options: Any) -> AttentionModule:
    torch.manual_seed(3)
    module = create("gated", GEOMETRY, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module.double()


def weights_of(module: AttentionModule, given: dict[str, Any]) -> Tensor:
    return module.attention_weights(**{name: t for name, t in given.items() if name != "value"})


def written_out(query: Tensor, key: Tensor, gates: Tensor) -> Tensor:
    """`Σ_c q_ic k_jc Π_{j < s ≤ i} g_sc`, a weight at a time; all `[batch, heads, T, dim]`."""
    length = query.shape[2]
    weights = query.new_zeros(*query.shape[:2], length, length)
    for i in range(length):
        for j in range(i + 1):
            left = gates[:, :, j + 1 : i + 1].prod(2).expand_as(query[:, :, i])
            weights[:, :, i, j] = (query[:, :, i] * key[:, :, j] * left).sum(-1)
    return weights


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("state_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("temperature", [1.0, 16.0])
def test_learned_gates_by_definition(gate: str, state_per: str, temperature: float) -> None:
    module = core(gate=gate, state_per=state_per, gate_temperature=temperature, gate_rank=3)
    given = inputs()
    projection = module.gate_projection
    logits = (given["hidden_states"] @ projection.down @ projection.weight).unflatten(-1, (module.key_heads, -1))
    gates = (logits + module.gate_bias).sigmoid().pow(1 / temperature).transpose(1, 2)
    assert gates.shape[-1] == (1 if gate == "scalar" else 8)
    gates = gates.repeat_interleave(4 // module.key_heads, 1)
    expected = written_out(0.4 * given["query"], given["key"].repeat_interleave(2, 1), gates)
    torch.testing.assert_close(weights_of(module, given), expected)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("temperature", [1.0, 16.0])
def test_gates_of_the_keys_need_no_weights(gate: str, temperature: float) -> None:
    module = core(
        gate_from="keys",
        gate=gate,
        gate_temperature=temperature,
        activation="softmax",
        normalizer=True,
        output_gate=False,
    )
    assert not list(module.parameters())
    assert not module.reads_hidden_states
    given = inputs()
    keys = given["key"].repeat_interleave(2, 1)
    pooled = keys.mean(-1, keepdim=True) if gate == "scalar" else keys
    expected = written_out(given["query"].softmax(-1), keys.softmax(-1), pooled.sigmoid().pow(1 / temperature))
    weights = weights_of(module, given)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True))
    out = module(**given)
    torch.testing.assert_close(out, weights @ given["value"].repeat_interleave(2, 1))
    assert module.is_normalized


def test_weights_make_the_output_before_norm_and_gate() -> None:
    module, given = core(activation="silu"), inputs()
    mixed = weights_of(module, given) @ given["value"].repeat_interleave(2, 1)
    normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm.weight[:, None]
    gate = (given["hidden_states"] @ module.output_gate.weight).sigmoid().view(2, LENGTH, 4, 6).transpose(1, 2)
    torch.testing.assert_close(module(**given), normed * gate)
    assert not module.is_normalized


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("state_per", ["query_head", "kv_head"])
def test_it_starts_as_lightning_attention(gate: str, state_per: str) -> None:
    given = inputs()
    gated = create("gated", GEOMETRY, gate=gate, activation="silu", state_per=state_per).double()
    lightning = create("lightning", GEOMETRY, state_per=state_per).double()
    torch.testing.assert_close(gated(**given), lightning(**given), atol=1e-5, rtol=1e-5)
    tensors = {name: given[name] for name in ("query", "key", "hidden_states", "scaling")}
    lives = gated.statistics(**tensors)["half-life"].values, lightning.statistics(**tensors)["half-life"].values
    torch.testing.assert_close(*lives, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_closed_gates_forget_and_open_gates_keep(gate: str) -> None:
    module, given = core(gate=gate), inputs()
    products = 0.4 * given["query"] @ given["key"].repeat_interleave(2, 1).transpose(-1, -2)
    for bias, expected in ((-1e6, products * torch.eye(LENGTH)), (1e6, products.tril())):
        torch.nn.init.constant_(module.gate_bias, bias)
        torch.testing.assert_close(weights_of(module, given), expected, atol=1e-6, rtol=1e-6)


def test_one_gate_can_close_for_a_moment() -> None:
    """A hard reset between open gates, inside a chunk: nothing before it is seen, and all after it is."""
    module, given = core(gate="vector", gate_from="keys", output_gate=False), inputs()
    given["key"] = torch.full_like(given["key"], 50.0)
    given["key"][:, :, 21] = -500.0
    weights = weights_of(module, given)
    assert weights[:, :, 21:, :21].abs().max() < 1e-6 * weights.abs().max()
    assert (weights[:, :, 20, :21].abs() > 0.1).all()
    assert (weights[:, :, 44, 21:].abs() > 0.1).all()


@pytest.mark.parametrize("count", [1, 2, 9, 32])
def test_starts_are_finite_for_any_number_of_heads(count: int) -> None:
    module = create("gated", Geometry(count, count, 8, 8, hidden_size=HIDDEN), gate="scalar")
    rates = -torch.nn.functional.logsigmoid(module.gate_bias.double()).flatten() / 16
    torch.testing.assert_close(rates, decay_slopes(count), atol=1e-5, rtol=1e-4)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="activation silu makes negative"):
        create("gated", GEOMETRY, normalizer=True, activation="silu")
    with pytest.raises(ValueError, match="hidden_size is not known"):
        create("gated", Geometry(4, 2, 8, 8), output_gate=False)
    assert create("gated", Geometry(4, 2, 8, 8), gate_from="keys", output_gate=False)


@pytest.mark.parametrize("temperature", [1.0, 16.0, 5000.0])
def test_it_starts_at_the_slopes_at_any_temperature(temperature: float) -> None:
    """Up to those at which the exponential of temperature times slope overflows."""
    module = create("gated", GEOMETRY, gate_temperature=temperature)
    given = {name: inputs()[name].float() for name in ("key", "hidden_states")}
    decay = module.signals(**given)["log_decay"]
    torch.testing.assert_close(decay, -decay_slopes(4).float()[None, :, None, None].expand_as(decay))
