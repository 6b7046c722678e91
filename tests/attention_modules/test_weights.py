"""Weights of a method are its outputs for unit vectors: exact, whatever the method."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import AttentionModule, Call, Geometry, Tokens, create
from attnconv.attention_modules.paths import leaving_out
from attnconv.attention_modules.weights import density, response_weights

SCALING = 0.25
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("softmax", {}),
    ("sliding_window", {"window": 5, "num_sinks": 2}),
    ("hedgehog", {}),
    ("lolcats", {"window": 5}),
    ("lolcats", {"window": 5, "state_per": "kv_head"}),
    ("lolcats", {"window": 5, "num_sinks": 2}),
    ("linear", {"feature_map": "taylor", "feature_dim": 5}),
    ("linear", {"feature_map": "elu", "projection": "none", "state_per": "kv_head"}),
]


def core(method: str, causal: bool = True, value_dim: int = 24, **options: Any) -> AttentionModule:
    torch.manual_seed(1)
    module = create(method, Geometry(4, 2, 16, value_dim, causal), **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def draw(length: int, heads: int, dim: int = 16, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(100 * heads + dim)
    return torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("length", [7, 24, 53])
def test_weights_make_the_output(method: str, options: dict[str, Any], causal: bool, length: int) -> None:
    module, query, key, value = core(method, causal, **options), draw(length, 4), draw(length, 2), draw(length, 2, 24)
    weights = module.attention_weights(query, key, scaling=SCALING)
    assert weights.shape == (2, 4, length, length)
    assert (weights >= 0).all()
    expected = module(query, key, value, scaling=SCALING)
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, length).double(), atol=1e-3, rtol=0)
    if causal:
        assert (weights.triu(1) == 0).all()


def test_softmax_is_softmax_and_a_window_is_zero_outside() -> None:
    query, key = draw(40, 4), draw(40, 2)
    gap = torch.arange(40)[:, None] - torch.arange(40)
    logits = SCALING * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    softmax = core("softmax").attention_weights(query, key, scaling=SCALING)
    torch.testing.assert_close(softmax, logits.masked_fill(gap < 0, -torch.inf).softmax(-1))
    seen = (gap >= 0) & ((gap < 5) | (torch.arange(40) < 2))
    windowed = core("sliding_window", window=5, num_sinks=2).attention_weights(query, key, scaling=SCALING)
    torch.testing.assert_close(windowed, logits.masked_fill(~seen, -torch.inf).softmax(-1))
    assert (windowed[:, :, ~seen] == 0).all()
    assert density(windowed, causal=True).values.tolist() == pytest.approx([int(seen.sum()) / (40 * 41 / 2)] * 4)
    assert density(softmax, causal=True).values.tolist() == [1.0] * 4


def test_lolcats_is_its_oracle_and_says_its_linear_share() -> None:
    module, query, key = core("lolcats", window=5), draw(40, 4), draw(40, 2)
    weights = module.attention_weights(query, key, scaling=SCALING)
    naive = create("lolcats", Geometry(4, 2, 16, 40), window=5, implementation="naive").double()
    naive.load_state_dict(module.state_dict())
    units = torch.eye(40, dtype=torch.float64).expand(2, 2, 40, 40)
    torch.testing.assert_close(weights, naive.attend_naive(Call(query, Tokens(key, units), SCALING), {}))
    share = module.statistics(query, key, scaling=SCALING)["linear share"]
    gap = torch.arange(40)[:, None] - torch.arange(40)
    torch.testing.assert_close(share.values, (weights * (gap >= 5)).sum(-1).mean((0, 2)))
    assert (share.per, share.style, share.values.shape) == ("head", "percent", (4,))
    assert 0 < share.values.min() < share.values.max() < 1
    with leaving_out(module, "linear"):
        assert (module.statistics(query, key, scaling=SCALING)["linear share"].values == 0).all()


def test_a_window_says_how_much_its_sinks_get() -> None:
    module, query, key = core("sliding_window", window=5, num_sinks=2), draw(40, 4), draw(40, 2)
    weights = module.attention_weights(query, key, scaling=SCALING)
    share = module.statistics(query, key, scaling=SCALING)["sink share"]
    # The window of queries 0 to 4 holds the first token, that of query 5 the second.
    by_hand = (weights[:, :, 5:, 0].sum(-1) + weights[:, :, 6:, 1].sum(-1)) / 40
    torch.testing.assert_close(share.values, by_hand.mean(0))
    assert (core("sliding_window", num_sinks=0).statistics(query, key, scaling=SCALING)["sink share"].values == 0).all()


def test_padding_has_no_weight_and_no_say() -> None:
    module, query, key = core("lolcats", window=5), draw(40, 4), draw(40, 2)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :9] = False
    mask[1, 30:] = False
    weights = module.attention_weights(query, key, scaling=SCALING, padding_mask=mask)
    shares = []
    for row in range(2):
        assert (weights[row, :, ~mask[row]] == 0).all()
        assert (weights[row, :, :, ~mask[row]] == 0).all()
        part = query[row : row + 1, :, mask[row]], key[row : row + 1, :, mask[row]]
        alone = module.attention_weights(*part, scaling=SCALING)
        torch.testing.assert_close(weights[row][:, mask[row]][:, :, mask[row]], alone[0])
        shares.append(module.statistics(*part, scaling=SCALING)["linear share"].values * int(mask[row].sum()))
    share = module.statistics(query, key, scaling=SCALING, padding_mask=mask)["linear share"].values
    torch.testing.assert_close(share, sum(shares) / mask.sum())


def test_other_methods_have_nothing_to_tell_and_low_precision_is_no_obstacle() -> None:
    module, query, key = core("hedgehog"), draw(40, 4), draw(40, 2)
    assert module.statistics(query, key, scaling=SCALING) == {}
    exact = module.attention_weights(query, key, scaling=SCALING)
    rough = module.float().attention_weights(query.bfloat16(), key.bfloat16(), scaling=SCALING)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), exact, atol=2e-2, rtol=0)


def test_values_wider_than_the_sequence() -> None:
    matrix = torch.rand(3, 3)
    assert torch.equal(
        response_weights(lambda values: matrix @ values, torch.empty(1, 2, 3, 8)), matrix.expand(1, 2, 3, 3)
    )
