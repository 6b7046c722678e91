"""First tokens that LoLCATs keeps exact behind its window."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import AttentionModule, AttentionState, Geometry, create
from attnconv.attention_modules.tokens import Call, Tokens
from attnconv.attention_modules.window import LOG2E

SCALING, WINDOW = 0.25, 5


def core(implementation: str = "torch", *, causal: bool = True, **options: object) -> AttentionModule:
    torch.manual_seed(1)
    geometry = Geometry(4, 2, 16, 24, causal)
    module = create("lolcats", geometry, implementation=implementation, **{"window": WINDOW, "num_sinks": 2, **options})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def tokens(length: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 16), (2, 16), (2, 24))
    return [torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64) for heads, dim in shapes]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("window_terms", ["relative", "absolute"])
def test_they_are_softmax_terms_and_never_linear_ones(causal: bool, window_terms: str) -> None:
    module = core(causal=causal, window_terms=window_terms)
    query, key, value = tokens(40)
    gap = torch.arange(40)[:, None] - torch.arange(40)
    near = (gap < WINDOW) & (gap > -WINDOW) | (torch.arange(40) < 2)
    seen = gap >= 0 if causal else torch.ones_like(near)
    logits = (SCALING * query @ key.repeat_interleave(2, 1).transpose(-1, -2)).masked_fill(~(near & seen), -torch.inf)
    if window_terms == "relative":
        logits = logits - logits.amax(-1, keepdim=True)
        gamma = module.mixing.sigmoid()[:, None, None]
    else:
        gamma = (module._gamma(torch.float64) / LOG2E).exp()[:, None, None]
    weights = gamma * logits.exp() + module.naive_products(Call(query, Tokens(key, value), SCALING))[1] * (seen & ~near)
    expected = weights / weights.sum(-1, keepdim=True) @ value.repeat_interleave(2, 1)
    for implementation in ("naive", "torch"):
        out = core(implementation, causal=causal, window_terms=window_terms)(query, key, value, scaling=SCALING)
        torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("num_sinks", [1, 4])
@pytest.mark.parametrize("padding", [0, 30])
def test_long_inputs_are_the_oracle_in_one_call_and_in_several(num_sinks: int, padding: int) -> None:
    length, cuts = 1100, (0, 3, 4, 700, 1100)
    inputs, mask = tokens(length), torch.ones(2, length, dtype=torch.bool)
    mask[1, :padding] = False
    expected = core("naive", num_sinks=num_sinks)(*inputs, scaling=SCALING, padding_mask=mask)
    module, state = core(num_sinks=num_sinks), AttentionState()
    whole = module(*inputs, scaling=SCALING, padding_mask=mask)
    parts = [
        module(*(t[:, :, start:stop] for t in inputs), scaling=SCALING, padding_mask=mask[:, start:stop], state=state)
        for start, stop in pairwise(cuts)
    ]
    for out in (whole, torch.cat(parts, 2)):
        torch.testing.assert_close(out[mask[:, None].expand(-1, 4, -1)], expected[mask[:, None].expand(-1, 4, -1)])


def test_decoding_fills_them_one_by_one_and_never_again() -> None:
    inputs, state = tokens(24), AttentionState()
    module = core(num_sinks=3)
    with torch.no_grad():
        expected = core("naive", num_sinks=3)(*inputs, scaling=SCALING)
        for at in range(24):
            out = module(*(t[:, :, at : at + 1] for t in inputs), scaling=SCALING, state=state)
            torch.testing.assert_close(out, expected[:, :, at : at + 1])
            filled = state.memory["sink_filled"] if state.memory else torch.zeros(2)
            assert filled.tolist() == [min(max(at + 2 - WINDOW, 0), 3)] * 2
    torch.testing.assert_close(state.memory["sink_keys"], inputs[1][:, :, :3])


def test_none_is_the_published_form() -> None:
    inputs = tokens(40)
    published = core(num_sinks=0)
    assert set(published.memory_shapes()) == {"key_values", "normalizer"}
    assert (published(*inputs, scaling=SCALING) - core()(*inputs, scaling=SCALING)).abs().max() > 0.05


def test_they_do_not_count_as_linear() -> None:
    query, key, _ = tokens(40)
    with_sinks, without = (
        core(num_sinks=sinks).statistics(query, key, scaling=SCALING)["linear share"].values for sinks in (2, 0)
    )
    assert (with_sinks > 0).all()
    assert (with_sinks < without).all()
    assert (core(num_sinks=40).statistics(query, key, scaling=SCALING)["linear share"].values == 0).all()


def test_the_kernels_say_that_they_do_not_serve_them() -> None:
    with pytest.raises(ValueError, match="sinks are kept beside the window"):
        core("triton").float()(*(t.float() for t in tokens(8)), scaling=SCALING)


def test_lola_has_its_cache_instead() -> None:
    with pytest.raises(ValueError, match="num_sinks"):
        create("lola", Geometry(4, 2, 16, 24), num_sinks=1)
