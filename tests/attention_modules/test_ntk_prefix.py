"""The infinitely long prefix: its formula, its start, and weights that leave the prefix its share."""

from typing import Any

import torch
import torch.nn.functional as F

from attnconv.attention_modules import Geometry, create

GEOMETRY = Geometry(4, 2, 8, 6)


def inputs(length: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 8), (2, 8), (2, 6)
    query, key, value = (
        torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64) for heads, dim in shapes
    )
    return query, key, value


def drawn() -> Any:
    torch.manual_seed(1)
    core = create("ntk_prefix", GEOMETRY).double()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter)
    return core


def test_the_formula() -> None:
    core, (query, key, value) = drawn(), inputs()
    keys, values = (t.repeat_interleave(2, 1) for t in (key, value))
    weights = (query @ keys.transpose(-1, -2) * 0.3).exp().tril()
    features = F.elu(query / 8**0.25) + 1
    numerator = weights @ values + features @ core.prefix_values
    denominator = weights.sum(-1) + (features * core.prefix_keys.clamp_min(0)[:, None]).sum(-1)
    with torch.no_grad():
        torch.testing.assert_close(core(query, key, value, scaling=0.3), numerator / denominator[..., None])
        found = core.attention_weights(query, key, scaling=0.3)
    torch.testing.assert_close(found, weights / denominator[..., None])
    assert sum(parameter.numel() for parameter in core.parameters()) == 4 * (8 * 6 + 8)


def test_the_start_is_softmax_and_can_learn() -> None:
    core: Any = create("ntk_prefix", GEOMETRY).double()
    query, key, value = inputs(300)
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.3)
    out = core(query, key, value, scaling=0.3)
    torch.testing.assert_close(out, wanted)
    (out * torch.randn_like(out)).sum().backward()
    assert all(bool((parameter.grad != 0).all()) for parameter in core.parameters())


def test_logits_far_from_zero_stay_finite() -> None:
    core, (query, key, value) = drawn().float(), (t.float() for t in inputs())
    for scaling in (1e4, -1e4):
        out = core(query, key, value, scaling=scaling)
        assert out.isfinite().all()
