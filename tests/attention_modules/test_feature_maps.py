"""Feature maps against their definitions, and the `linear` method that takes any of them."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnconv.attention_modules import Geometry, create
from attnconv.attention_modules.linear.feature_maps import FEATURE_MAPS, FeatureMap, FeatureMapName

GEOMETRY = Geometry(4, 2, 8, 8)
NAMES = sorted(FEATURE_MAPS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def disturbed(feature_map: FeatureMap) -> FeatureMap:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in feature_map.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return feature_map.double()


def by_definition(name: str, y: Tensor) -> Tensor:
    """Each paper's formula for one projected vector."""
    dim = len(y)
    if name == "hedgehog":
        return torch.cat([y.exp() / y.exp().sum(), (-y).exp() / (-y).exp().sum()])
    if name == "hedgehog_fla":
        both = torch.cat([2 * y, -2 * y]).exp()
        return both / both.sum()
    if name in ("relu", "t2r"):
        return torch.stack([max(entry, torch.zeros_like(entry)) for entry in y])
    if name == "elu":
        return torch.stack([entry + 1 if entry > 0 else entry.exp() for entry in y])
    if name == "exp":
        return y.exp() / y.max().exp()
    if name == "dpfp":
        r = torch.cat([y, -y]).clamp_min(0)
        return torch.stack([r[i] * r[i - 1] for i in range(2 * dim)])
    squares = [y[i] * y[j] / (2 * dim) ** 0.5 for i in range(dim) for j in range(dim)]
    return torch.cat([torch.ones(1).double(), y / dim**0.25, torch.stack(squares)])


def test_the_table_and_the_names_agree() -> None:
    assert set(FEATURE_MAPS) == set(get_args(FeatureMapName))
    assert all(info.paper.startswith("https://") for info in FEATURE_MAPS.values())


@pytest.mark.parametrize("name", NAMES)
def test_each_map_is_its_definition(name: str) -> None:
    feature_map = disturbed(FeatureMap(name, 3, 8, 5, "identity"))
    x, other = draw(1, 3, 2, 8), draw(1, 3, 2, 8, seed=1)
    features = feature_map(x)
    assert features.shape == (1, 3, 2, feature_map.output_dim)
    products = features @ feature_map(other).transpose(-1, -2)
    weight = feature_map.weight.expand(3, -1, -1)
    bias = torch.zeros(3, 1, 5).double() if feature_map.bias is None else feature_map.bias.expand(3, -1, -1)
    for head in range(3):
        rows = [by_definition(name, row @ weight[head] + bias[head, 0]) for row in x[0, head]]
        others = [by_definition(name, row @ weight[head] + bias[head, 0]) for row in other[0, head]]
        expected = torch.stack(rows) @ torch.stack(others).T
        torch.testing.assert_close(products[0, head], expected, atol=1e-10, rtol=1e-10)
    assert (products >= 0).all()


def test_taylor_is_the_second_order_of_the_exponential() -> None:
    feature_map = FeatureMap("taylor", 2, 8, 8, "identity").double()
    x, other = draw(1, 2, 6, 8), draw(1, 2, 6, 8, seed=1)
    s = x @ other.transpose(-1, -2) * 8**-0.5
    torch.testing.assert_close(feature_map(x) @ feature_map(other).transpose(-1, -2), 1 + s + s.square() / 2)


@pytest.mark.parametrize("name", NAMES)
def test_the_identity_start_is_the_map_without_a_projection(name: str) -> None:
    learned = FeatureMap(name, 3, 8, 8, "identity").double()
    plain = FeatureMap(name, 3, 8, 8, "identity", projected=False).double()
    assert not list(plain.parameters())
    assert torch.equal(learned(draw(2, 3, 4, 8)), plain(draw(2, 3, 4, 8)))
    plain.reset_parameters()
    assert "feature_dim=8" in repr(plain)


def test_the_names_in_checkpoints() -> None:
    """A new name would orphan the weights of every saved conversion."""
    assert set(create("hedgehog", GEOMETRY).state_dict()) == {"query_map.weight", "key_map.weight"}
    shared = create("hedgehog", GEOMETRY, feature_map="hedgehog_fla").state_dict()
    assert {name: tuple(t.shape) for name, t in shared.items()} == {
        "query_map.weight": (1, 8, 8),
        "query_map.bias": (1, 1, 8),
        "key_map.weight": (1, 8, 8),
        "key_map.bias": (1, 1, 8),
    }
    normed = create("linear", GEOMETRY, normalizer=False)
    assert set(normed.state_dict()) == {"query_map.weight", "key_map.weight", "norm.weight"}
    assert not create("linear", GEOMETRY, projection="none").state_dict()


def test_linear_with_hedgehog_features_is_hedgehog() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 90, 8) for heads in (4, 2, 2)]
    hedgehog = create("hedgehog", GEOMETRY, initialization="kaiming")
    linear = create("linear", GEOMETRY)
    linear.load_state_dict(hedgehog.state_dict())
    # They differ by the small term in hedgehog's denominator.
    torch.testing.assert_close(linear(*inputs, scaling=1.0), hedgehog(*inputs, scaling=1.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_without_the_normalizer_outputs_have_the_size_of_the_norms_weight(causal: bool) -> None:
    geometry = Geometry(4, 2, 8, 8, causal)
    inputs = [draw(1, heads, 30, 8, seed=heads) for heads in (4, 2, 2)]
    module = create("linear", geometry, feature_map="elu", projection="none", normalizer=False).double()
    out = module(*inputs, scaling=1.0)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(1, 4, 30).double(), atol=1e-4, rtol=0)
    weights = module.attention_weights(inputs[0], inputs[1], scaling=1.0)
    mixed = weights @ inputs[2].repeat_interleave(2, 1)
    torch.testing.assert_close(out, F.rms_norm(mixed, (8,), eps=1e-6))
    query, key = ((1 + F.elu(t)).repeat_interleave(4 // t.shape[1], 1) for t in inputs[:2])
    products = query @ key.transpose(-1, -2)
    torch.testing.assert_close(weights, products.tril() if causal else products)
    assert module.is_normalized is False
    assert create("linear", geometry).is_normalized


def test_taylor_takes_few_columns_unless_told() -> None:
    wide = Geometry(2, 2, 32, 32)
    assert create("linear", wide, feature_map="taylor").key_map.output_dim == 1 + 16 + 16 * 17 // 2
    assert create("linear", wide, feature_map="elu").key_map.output_dim == 32
    assert create("lolcats", wide, feature_map="taylor", feature_dim=4).key_map.output_dim == 1 + 4 + 10


def test_a_width_without_a_projection_is_refused() -> None:
    with pytest.raises(ValueError, match="leave feature_dim out"):
        create("linear", GEOMETRY, projection="none", feature_dim=4)
