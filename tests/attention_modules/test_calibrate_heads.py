"""Operators on single heads: what each does, and that nothing is changed where they are off."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_llama

from attnconv.attention_modules import Geometry, create
from attnconv.convert import convert_model

GEOMETRY = Geometry(4, 2, 8, 6)


def inputs(length: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, length, dim, generator=generator) for heads, dim in ((4, 8), (2, 8), (2, 6))]


@torch.no_grad()
def run(length: int = 9, **options: Any) -> torch.Tensor:
    out: torch.Tensor = create("calibrate_heads", GEOMETRY, **options)(*inputs(length), scaling=0.5)
    return out


@torch.no_grad()
def test_off_it_is_softmax_bit_for_bit_in_every_head_that_is_off() -> None:
    plain = create("softmax", GEOMETRY)(*inputs(150), scaling=0.5)
    assert torch.equal(run(150), plain)
    found = run(150, heads=[1, 2], cap=0.1, scale=0.5)
    assert torch.equal(found[:, [0, 3]], plain[:, [0, 3]])
    assert not torch.isclose(found[:, [1, 2], 5:], plain[:, [1, 2], 5:]).all()


@torch.no_grad()
def test_off_a_model_says_what_it_said_bit_for_bit() -> None:
    tokens = torch.arange(3, 23)[None]
    wanted = tiny_llama().eval()(tokens).logits
    assert torch.equal(convert_model(tiny_llama().eval(), "calibrate_heads")(tokens).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_sinks_keep_the_cap_and_the_others_take_the_rest_by_their_shares(causal: bool) -> None:
    geometry = replace(GEOMETRY, causal=causal)
    query, key, _ = inputs()
    weights = create("softmax", geometry).attention_weights(query, key, scaling=0.5)
    core = create("calibrate_heads", geometry, cap=0.2, num_sinks=2)
    found = core.attention_weights(query, key, scaling=0.5)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 9))
    share, over = weights[..., :2].sum(-1), weights[..., :2].sum(-1) > 0.2
    if causal:
        # They see nothing else.
        over[:, :, :2] = False
    assert over.any()
    assert (~over).any()
    torch.testing.assert_close(found[~over], weights[~over])
    ratios = found[over] / weights[over]
    torch.testing.assert_close(ratios[:, :2], (0.2 / share[over])[:, None].expand(-1, 2))
    rest = ratios[:, 2:].nan_to_num(0)
    torch.testing.assert_close(rest, ((0.8 / (1 - share[over]))[:, None] * (rest > 0)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_scale_and_identity() -> None:
    query, key, value = inputs()
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.5)
    own = value.repeat_interleave(2, 1)
    torch.testing.assert_close(run(scale=1.5, identity=0.25), 1.5 * (0.75 * mixed + 0.25 * own))


def test_operators_that_are_off_learn_to_be_on() -> None:
    core = create("calibrate_heads", GEOMETRY)
    core(*inputs(), scaling=0.5).square().sum().backward()
    assert bool((core.scale.grad != 0).all())
    assert bool((core.identity.grad != 0).all())


def test_a_head_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="heads names the query head 4, but the layer has 4, numbered from 0"):
        create("calibrate_heads", GEOMETRY, heads=[4], scale=0.5)
