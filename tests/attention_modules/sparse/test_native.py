"""The three branches of `native`, their gates, and what is counted of them."""

from functools import partial

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.counting import counting
from attnconv.attention_modules.paths import leaving_out
from attnconv.attention_modules.tokens import Call, Tokens

HIDDEN, BLOCK, WINDOW, LENGTH, SCALING = 12, 8, 20, 61, 0.25
GEOMETRY = Geometry(4, 2, 16, 24, hidden_size=HIDDEN)


def core(**options: object) -> AttentionModule:
    return create("native", GEOMETRY, **{"block": BLOCK, "density": 0.35, "window": WINDOW, **options}).double()


@pytest.fixture(scope="module")
def drawn() -> dict[str, Tensor]:
    torch.manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64)
    tensors = {"query": 2 * draw(1, 4, LENGTH, 16), "key": draw(1, 2, LENGTH, 16), "value": draw(1, 2, LENGTH, 24)}
    return {**tensors, "hidden_states": draw(1, LENGTH, HIDDEN)}


def alone(module: AttentionModule, branch: str, drawn: dict[str, Tensor]) -> Tensor:
    others = [name for name in module.paths if name != branch]
    with leaving_out(module, others[0]), leaving_out(module, others[1]):
        out: Tensor = module(**drawn, scaling=SCALING)
    return out


def test_the_output_is_the_gated_sum_of_three_attentions(drawn: dict[str, Tensor]) -> None:
    module = core()
    with torch.no_grad():
        module.gate_weight.normal_(std=0.3)
        module.places.normal_()
    key, value = (drawn[name].repeat_interleave(2, 1) for name in ("key", "value"))
    behind = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    logits = SCALING * drawn["query"] @ key.transpose(-1, -2)
    gates = (
        torch.einsum("bth,nkh->nbkt", drawn["hidden_states"], module.gate_weight) + module.gate_bias[:, None, :, None]
    )
    chosen, far, near = gates.sigmoid()[..., None]

    inside = behind & ~behind.tril(-WINDOW)
    expected = near * (logits.masked_fill(~inside, -torch.inf).softmax(-1) @ value)
    torch.testing.assert_close(alone(module, "window", drawn), expected)

    whole = LENGTH // BLOCK
    weights = module.places.softmax(-1).repeat_interleave(2, 1)[..., None]
    keys, values = (t[:, :, : whole * BLOCK].unflatten(2, (whole, BLOCK)) for t in (key, value))
    keys, values = (keys * weights[0, :, None]).sum(3), (values * weights[1, :, None]).sum(3)
    before = torch.arange(whole) < torch.arange(LENGTH)[:, None] // BLOCK
    mixed = (SCALING * drawn["query"] @ keys.transpose(-1, -2)).masked_fill(~before, -torch.inf).softmax(-1)
    torch.testing.assert_close(alone(module, "compressed", drawn), far * (mixed.nan_to_num(0.0) @ values))

    seen = create("sparse", GEOMETRY, block=BLOCK, density=0.35).double()
    exact = seen(drawn["query"], drawn["key"], drawn["value"], scaling=SCALING)
    torch.testing.assert_close(alone(module, "blocks", drawn), chosen * exact)
    total = sum(alone(module, name, drawn) for name in module.paths)
    torch.testing.assert_close(module(**drawn, scaling=SCALING), total)


def test_it_starts_as_the_chosen_blocks_and_a_little_of_the_rest() -> None:
    gates = core(gates=0.02).gate_bias.sigmoid()
    torch.testing.assert_close(gates, torch.tensor([0.96, 0.02, 0.02])[:, None].expand(3, 4).double())


@pytest.mark.parametrize("parts", [(LENGTH,), (40, *[1] * 21)], ids=["prompt", "tokens"])
@pytest.mark.parametrize("implementation", ["torch", "naive"])
def test_tokens_in_blocks_and_window_are_counted_once(
    drawn: dict[str, Tensor], parts: tuple[int, ...], implementation: str
) -> None:
    module = core()
    module.implementation = implementation
    with leaving_out(module, "compressed"):
        seen = module.attention_weights(
            drawn["query"], drawn["key"], scaling=SCALING, hidden_states=drawn["hidden_states"]
        )
    pairs = float((seen > 0).double().mean(1).sum())
    cuts, start = [], 0
    for size in parts:
        cuts.append({name: t.narrow(t.ndim - 2, start, size) for name, t in drawn.items()})
        start += size
    state = module.new_state()
    with torch.no_grad(), counting(module) as counter:
        for cut in cuts:
            module(**cut, scaling=SCALING, state=state)
    # Each call is rounded to whole pairs.
    assert abs(counter.total.exact_pairs - pairs) <= len(parts)
    assert abs(counter.total.summarized_pairs + pairs - counter.total.dense_pairs) <= len(parts)
    assert 0.2 < counter.total.density < counter.total.work < 0.9


def test_the_other_branches_are_the_same_behind_a_kernel(drawn: dict[str, Tensor]) -> None:
    """Which chooses by a call in full precision that holds no values."""
    pytest.importorskip("triton")
    module = core()
    call = Call(drawn["query"], Tokens(drawn["key"], drawn["value"]), SCALING, drawn["hidden_states"])
    exact = create("sparse", GEOMETRY, block=BLOCK, density=0.35).double().attend_torch(call, {})
    canvas, keep = module._exact_choice(call)
    assert not canvas.values.shape[-1]
    torch.testing.assert_close(module.with_rest(exact, call, canvas, keep), module.attend_torch(call, {}))


def test_the_size_of_the_layers_input_must_be_known() -> None:
    with pytest.raises(ValueError, match="whose size is not known"):
        create("native", Geometry(4, 2, 16, 24))
