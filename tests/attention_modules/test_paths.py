"""A method without one of its paths is the fraction without that path's terms, above and below the line."""

import pytest
import torch
from torch import Tensor, nn

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.paths import leaving_out, paths_of
from attnconv.attention_modules.tokens import Call, Tokens

WINDOW, LENGTH, SCALING = 5, 40, 0.25


def core(implementation: str, *, causal: bool = True, window: int = WINDOW) -> AttentionModule:
    torch.manual_seed(3)
    module = create("lolcats", Geometry(4, 2, 16, 24, causal), window=window, implementation=implementation)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def tokens(length: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 16), (2, 16), (2, 24))
    return [torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64) for heads, dim in shapes]


def by_hand(module: AttentionModule, path: str, causal: bool) -> Tensor:
    """The one path alone, from its definition."""
    query, key, value = tokens()
    position = torch.arange(LENGTH)
    gap = position[:, None] - position[None]
    inside = (gap < WINDOW) & (gap >= 0 if causal else gap > -WINDOW)
    if path == "window":
        logits = SCALING * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
        weights = logits.masked_fill(~inside, -torch.inf).softmax(-1)
    else:
        products = module.naive_products(Call(query, Tokens(key, value), SCALING))[1]
        weights = products * (~inside & (gap > 0 if causal else gap.abs() > 0))
        weights = (weights / weights.sum(-1, keepdim=True)).nan_to_num(0.0)
    return weights @ value.repeat_interleave(2, 1)


@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("left_out", "rest"), [("linear", "window"), ("window", "linear")])
def test_the_other_path_is_left(implementation: str, causal: bool, left_out: str, rest: str) -> None:
    module = core(implementation, causal=causal)
    whole = module(*tokens(), scaling=SCALING)
    with leaving_out(module, left_out):
        out = module(*tokens(), scaling=SCALING)
    torch.testing.assert_close(out, by_hand(module, rest, causal), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(module(*tokens(), scaling=SCALING), whole, atol=0, rtol=0)
    assert (out - whole).abs().max() > 0.1


@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("window", [WINDOW, 2 * LENGTH])
def test_what_sees_nothing_is_zero(implementation: str, causal: bool, window: int) -> None:
    module = core(implementation, causal=causal, window=window)
    with leaving_out(module, "window"):
        out = module(*tokens(), scaling=SCALING)
        assert out.shape == (2, 4, LENGTH, 24)
        assert out.isfinite().all()
        assert (out[:, :, :WINDOW] == 0).all() == (causal or window > LENGTH)
        assert (out[:, :, WINDOW:] != 0).any() == (window < LENGTH)
        with leaving_out(module, "linear"):
            assert (module(*tokens(), scaling=SCALING) == 0).all()
    assert module.left_out == frozenset()


@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("path", ["window", "linear"])
def test_decoding_leaves_it_out_too(implementation: str, path: str) -> None:
    module, inputs = core(implementation), tokens()
    state, outs, start = module.new_state(), [], 0
    with leaving_out(module, path):
        whole = module(*inputs, scaling=SCALING)
        for length in (12, 1, 1, 7, 1, 18):
            part = [tensor[:, :, start : start + length] for tensor in inputs]
            outs.append(module(*part, scaling=SCALING, state=state))
            start += length
        assert start == LENGTH
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-9, rtol=1e-9)
    # The state itself has missed nothing.
    untouched = module.new_state()
    module(*inputs, scaling=SCALING, state=untouched)
    following = tokens(3)
    torch.testing.assert_close(
        module(*following, scaling=SCALING, state=state), module(*following, scaling=SCALING, state=untouched)
    )


def test_padded_rows_are_as_if_alone() -> None:
    module, inputs = core("torch"), tokens()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :11] = False
    with leaving_out(module, "window"):
        padded = module(*inputs, scaling=SCALING, padding_mask=mask)
        alone = module(*(tensor[:1, :, 11:] for tensor in inputs), scaling=SCALING)
    torch.testing.assert_close(padded[:1, :, 11:], alone)


def test_only_modules_with_the_path_are_touched_and_errors_restore_them() -> None:
    geometry = Geometry(4, 2, 16, 24)
    model = nn.ModuleDict({"a": core("torch"), "b": create("sliding_window", geometry), "c": core("torch")})
    assert paths_of(model) == ("window", "linear")

    def fail_inside() -> None:
        with leaving_out(model, "linear"):
            assert [module.left_out for module in model.values()] == [{"linear"}, frozenset(), {"linear"}]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert all(not module.left_out for module in model.values())


def test_a_path_that_is_not_there_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"'linaer'.*there are: 'window', 'linear'"),
        leaving_out(core("torch"), "linaer"),
    ):
        pass
    with pytest.raises(ValueError, match="there are: none"), leaving_out(nn.Linear(2, 2), "linear"):
        pass
