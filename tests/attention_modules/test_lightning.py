"""Lightning attention against transformers' own form of it, and what the methods with a decaying state share."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.linear.recurrent import decay_slopes

HIDDEN, HEAD_DIM, LENGTH = 24, 8, 75


def reference(num_heads: int) -> MiniMaxLightningAttention:
    torch.manual_seed(0)
    config = MiniMaxConfig(
        hidden_size=HIDDEN,
        num_attention_heads=num_heads,
        head_dim=HEAD_DIM,
        num_hidden_layers=4,
        block_size=16,
        layer_types=["linear_attention"] * 4,
        hidden_act="silu",
    )
    return MiniMaxLightningAttention(config, layer_idx=1).double().requires_grad_(False)


def same_weights(theirs: MiniMaxLightningAttention) -> AttentionModule:
    heads = theirs.num_attention_heads
    module = create("lightning", Geometry(heads, heads, HEAD_DIM, HEAD_DIM, hidden_size=HIDDEN), decay="learned")
    module = module.double()
    with torch.no_grad():
        module.slope_log.copy_(theirs.slope_rate.flatten().log())
        module.output_gate.weight.copy_(theirs.output_gate.weight.T)
        module.norm.weight.copy_(theirs.norm.weight.view(heads, HEAD_DIM))
    return module


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projections(theirs: MiniMaxLightningAttention, hidden_states: Tensor) -> list[Tensor]:
    """Query and key before their activation, value behind it."""
    joint = theirs.qkv_proj(hidden_states).unflatten(-1, (theirs.num_attention_heads, -1)).transpose(1, 2)
    query, key, value = joint.split(HEAD_DIM, -1)
    return [query, key, F.silu(value)]


@pytest.mark.parametrize("implementation", ["naive", "torch"])
def test_one_head_is_transformers_layer_whole(implementation: str) -> None:
    theirs, hidden_states = reference(1), draw(2, LENGTH, HIDDEN)
    expected, _ = theirs(hidden_states, None, None)
    module = same_weights(theirs)
    module.implementation = implementation
    out = module(*projections(theirs, hidden_states), scaling=1.0, hidden_states=hidden_states)
    torch.testing.assert_close(theirs.out_proj(out.transpose(1, 2).flatten(2)), expected)


def test_several_heads_are_transformers_up_to_its_joint_norm() -> None:
    theirs, hidden_states = reference(5), draw(2, LENGTH, HIDDEN)
    expected, _ = theirs(hidden_states, None, None)
    query, key, value = projections(theirs, hidden_states)
    weights = same_weights(theirs).attention_weights(query, key, scaling=1.0, hidden_states=hidden_states)
    mixed = theirs.norm((weights @ value).transpose(1, 2).flatten(2))
    out = theirs.out_proj(theirs.output_gate(hidden_states).sigmoid() * mixed)
    torch.testing.assert_close(out, expected)


def test_weights_are_products_that_fade() -> None:
    module = create("lightning", Geometry(4, 2, 8, 6, hidden_size=HIDDEN), activation="none").double()
    query, key = draw(2, 4, 40, 8), draw(2, 2, 40, 8, seed=1)
    hidden_states = draw(2, 40, HIDDEN)
    weights = module.attention_weights(query, key, scaling=0.3, hidden_states=hidden_states)
    gap = torch.arange(40)[:, None] - torch.arange(40)
    fading = torch.exp(-decay_slopes(4)[:, None, None] * gap).tril()
    products = 0.3 * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    torch.testing.assert_close(weights, products * fading)
    # What follows is not linear in the values, and is no part of the weights.
    value = draw(2, 2, 40, 6, seed=2)
    mixed = weights @ value.repeat_interleave(2, 1)
    out = module(query, key, value, scaling=0.3, hidden_states=hidden_states)
    torch.testing.assert_close(out, 0.5 * F.rms_norm(mixed, (6,), eps=1e-6))


@pytest.mark.parametrize("heads", [1, 2, 8, 9, 14, 32])
def test_slopes_are_those_of_alibi_and_serve_any_number_of_heads(heads: int) -> None:
    slopes = decay_slopes(heads)
    assert slopes.shape == (heads,)
    assert slopes[-1] == 2**-8
    assert 0 < slopes.min() <= slopes.max() < 1
    torch.testing.assert_close(slopes[1:] / slopes[:-1], torch.full((heads - 1,), 2 ** (-8 / heads)).double())


@pytest.mark.parametrize("state_per", ["query_head", "kv_head"])
def test_it_tells_how_far_its_heads_look_back(state_per: str) -> None:
    geometry = Geometry(4, 2, 8, 8, hidden_size=HIDDEN)
    module = create("lightning", geometry, state_per=state_per).double()
    query, key, hidden_states = draw(2, 4, 20, 8), draw(2, 2, 20, 8), draw(2, 20, HIDDEN)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :7] = False
    for padding_mask in (None, mask):
        found = module.statistics(query, key, scaling=1.0, padding_mask=padding_mask, hidden_states=hidden_states)[
            "half-life"
        ]
        slopes = decay_slopes(4) if state_per == "query_head" else decay_slopes(2).repeat_interleave(2)
        torch.testing.assert_close(found.values, math.log(2) / slopes)
        assert (found.per, found.style) == ("head", "number")


def test_it_learns_its_slopes_or_keeps_them() -> None:
    geometry = Geometry(4, 2, 8, 8, hidden_size=HIDDEN)
    learned, fixed = create("lightning", geometry, decay="learned"), create("lightning", geometry)
    inputs = [torch.randn(1, heads, 30, 8) for heads in (4, 2, 2)]
    hidden_states = torch.randn(1, 30, HIDDEN)
    out = learned(*inputs, scaling=1.0, hidden_states=hidden_states)
    torch.testing.assert_close(out, fixed(*inputs, scaling=1.0, hidden_states=hidden_states))
    (out * torch.randn_like(out)).sum().backward()
    assert (learned.slope_log.grad.abs() > 0).all()
    assert "slope_log" not in fixed.state_dict()


def test_what_it_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size is not known"):
        create("lightning", Geometry(4, 2, 8, 8))
    assert not create("lightning", Geometry(4, 2, 8, 8), output_gate=False).reads_hidden_states
    with pytest.raises(ValueError, match=r"this layer is bidirectional; `linear`"):
        create("lightning", Geometry(4, 2, 8, 8, causal=False, hidden_size=HIDDEN))


@pytest.mark.parametrize("given", [None, (1, 5, HIDDEN - 1), (1, 4, HIDDEN)])
def test_the_layers_input_must_be_there_and_fit(given: tuple[int, ...] | None) -> None:
    module = create("lightning", Geometry(4, 2, 8, 8, hidden_size=HIDDEN))
    inputs = [torch.zeros(1, heads, 5, 8) for heads in (4, 2, 2)]
    hidden_states = None if given is None else torch.zeros(given)
    with pytest.raises(ValueError, match=r"'lightning' reads the layer's input: .*\(1, 5, 24\)"):
        module(*inputs, scaling=1.0, hidden_states=hidden_states)


def test_the_output_gate_may_be_of_low_rank() -> None:
    module = create("lightning", Geometry(4, 2, 8, 6, hidden_size=HIDDEN), output_gate_rank=3)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    assert shapes == {"norm.weight": (4, 6), "output_gate.down": (HIDDEN, 3), "output_gate.weight": (3, 24)}


@pytest.mark.parametrize("start", [1.0, 0.3])
def test_the_size_of_the_first_outputs_is_chosen(start: float) -> None:
    module = create("lightning", Geometry(4, 2, 8, 6, hidden_size=HIDDEN), norm_start=start).double()
    query, key, value = draw(2, 4, 30, 8), draw(2, 2, 30, 8, seed=1), draw(2, 2, 30, 6, seed=2)
    # Large products, beside which the norm's small constant does not show.
    out = module(query, key, value, scaling=1e3, hidden_states=draw(2, 30, HIDDEN, seed=3))
    size = out.square().mean(-1).sqrt()
    torch.testing.assert_close(size, torch.full((2, 4, 30), start / 2).double(), atol=1e-3, rtol=1e-3)
