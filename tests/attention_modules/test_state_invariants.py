"""What must hold for the states of every method that has one."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from invariants import (
    HIDDEN_SIZE,
    ROWS,
    Row,
    attend,
    build,
    causal_rows,
    close,
    is_first,
    leads,
    part,
    tokens,
    with_and_without_gradients,
)
from torch.utils._python_dispatch import TorchDispatchMode

from attnconv.attention_modules import Geometry

CUTS = {"tokens": [1] * 90, "sevens": [7] * 13, "mixed": [63, 1, 26], "one": [90], "few": [40, *[1] * 10, 40]}
CUTS["edge"] = [60, *[1] * 9, 21]
TURNS = [("torch", cuts, grad) for cuts in ("sevens", "mixed", "one") for grad in (True, False)]
# Decoding in place is seen at every length; with gradients, which keep all that was, where a chunk ends.
TURNS += [("torch", "tokens", False), ("torch", "edge", True)]
# The oracle does the same with gradients and without, and is slow for token after token.
TURNS += [("naive", "few", False), ("naive", "sevens", False), ("naive", "mixed", True), ("naive", "one", True)]
# In every run, of the first options of a method and of further ones; other turns are in the long tests.
MOST_TURNS = [turn for turn in TURNS if turn not in [("naive", "sevens", False), ("naive", "mixed", True)]]
FEWER_TURNS = [
    ("torch", "sevens", False),
    ("torch", "tokens", False),
    ("torch", "mixed", True),
]


def rows_and_turns() -> Iterator[Any]:
    """Every causal row with every kind of turns."""
    for row in [row for row in ROWS if row.causal]:
        for turn in TURNS:
            implementation, turns, grad = turn
            is_long = turn not in (MOST_TURNS if leads(row) else FEWER_TURNS)
            name = "-".join([implementation, turns, "grad" if grad else "no-grad", row.id])
            yield pytest.param(row, *turn, id=name, marks=[pytest.mark.slow] if is_long else [])


@pytest.mark.parametrize(("row", "implementation", "turns", "grad"), [*rows_and_turns()])
def test_prefill_chunks_and_decode_agree(row: Row, implementation: str, turns: str, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        prefill_and_decode(row, implementation, CUTS[turns])


def prefill_and_decode(row: Row, implementation: str, cuts: list[int]) -> None:
    inputs = tokens(90)
    module = build(row, implementation=implementation)
    state, outs, start = module.new_state(), [], 0
    for cut in cuts:
        outs.append(attend(module, part(inputs, start, start + cut), state=state))
        start += cut
    close(torch.cat(outs, 2), attend(module, inputs))
    assert state.seen == 90


@with_and_without_gradients
@causal_rows
def test_padding_is_absent_with_a_state(row: Row) -> None:
    """Turns of a batched conversation: padding left of, behind and between the turns, then decoding."""
    module, turns = build(row), [(12, [5, 12, 9]), (20, [20, 3, 11]), (1, [1, 1, 1]), (1, [1, 1, 1]), (9, [2, 9, 0])]
    state, outs, masks, all_inputs = module.new_state(), [], [], []
    for turn, (length, lengths) in enumerate(turns):
        mask = torch.stack([torch.arange(length) >= length - n for n in lengths])
        if turn == 1:
            mask = mask.flip(1)
        inputs = tokens(length, batch=3, seed=turn)
        outs.append(attend(module, inputs, padding_mask=mask, state=state))
        masks.append(mask)
        all_inputs.append(inputs)
    mask, out = torch.cat(masks, 1), torch.cat(outs, 2)
    joined = {name: torch.cat([i[name] for i in all_inputs], 2) for name in all_inputs[0]}
    for b in range(3):
        alone = {name: t[b : b + 1, :, mask[b]] for name, t in joined.items()}
        close(out[b : b + 1, :, mask[b]], attend(module, alone))


@with_and_without_gradients
@causal_rows
def test_state_reorder_repeat_reset(row: Row) -> None:
    module, inputs = build(row), tokens(50)
    whole = attend(module, inputs)
    state = module.new_state()
    attend(module, part(inputs, 0, 40), state=state)
    state.reorder(torch.tensor([1, 0, 1]))
    state.repeat(2)
    rest = {name: t[[1, 1, 0, 0, 1, 1]] for name, t in part(inputs, 40, 50).items()}
    close(attend(module, rest, state=state), whole[[1, 1, 0, 0, 1, 1], :, 40:])
    state.reset()
    assert state.seen == 0
    assert state.nbytes == 0
    close(attend(module, inputs, state=state), whole)


@with_and_without_gradients
@causal_rows
def test_state_crop_is_exact(row: Row) -> None:
    """Drafted tokens are taken back, as assisted decoding does."""
    module, inputs, drafts = build(row), tokens(60), tokens(9, seed=5)
    whole = attend(module, inputs)
    state = module.new_state()
    state.record_past = True
    attend(module, part(inputs, 0, 20), state=state)
    for start in range(20, 60, 4):
        attend(module, drafts, state=state)
        state.crop(9)
        close(attend(module, part(inputs, start, start + 4), state=state), whole[:, :, start : start + 4])
    assert state.seen == 60


@causal_rows
def test_state_crop_refuses_what_is_folded(row: Row) -> None:
    module, state = build(row), build(row).new_state()
    attend(module, tokens(100), state=state)
    if module.tail_tokens is None and not module.reprojects and not module.earlier_queries:
        state.crop(99)
        assert state.seen == 1
    else:
        with pytest.raises(ValueError, match="record_past"):
            state.crop(99)


@causal_rows
def test_state_size(row: Row) -> None:
    module = build(row).float()
    sizes = []
    for length in (200, 400):
        state = module.new_state()
        attend(module, {name: t.float() for name, t in tokens(length, batch=1).items()}, state=state)
        sizes.append(state.nbytes)
        expected = module.state_bytes(1, length, torch.float32)
        # The validity and position of each token held, and of those whose projections or queries are, are all the rest.
        held = state.tail_length + (module.projected_tokens if module.reprojects else 0) + module.earlier_queries
        assert expected <= state.nbytes <= expected + 9 * held + 16
    assert (sizes[0] == sizes[1]) == module.is_recurrent
    state.map(lambda t: t.to("meta"))
    assert state.nbytes == sizes[1]


@with_and_without_gradients
@causal_rows
def test_bfloat16_weights_keep_an_fp32_state(row: Row) -> None:
    """2,048 tokens, the last 48 decoded, do not drift away from the prefill.

    Fewer of further options of a method, and where gradients, which decide how a state is kept, are the difference.
    """
    geometry = row.widen(Geometry(2, 1, 16, 16, hidden_size=HIDDEN_SIZE))
    length = 256 if torch.is_grad_enabled() else 2048 if is_first(row) else 512
    length = 128 if row.walks else length
    module = build(row, geometry).bfloat16()
    inputs = {name: t.bfloat16() for name, t in tokens(length, geometry, batch=1).items()}
    state, outs = module.new_state(), []
    attend(module, part(inputs, 0, length - 48), state=state)
    for t in range(length - 48, length):
        outs.append(attend(module, part(inputs, t, t + 1), state=state))
    assert all(tensor.dtype in (torch.float32, torch.bool) or tensor.ndim == 4 for tensor in state.memory.values())
    expected = attend(module, inputs)[:, :, -48:]
    assert (torch.cat(outs, 2).float() - expected.float()).abs().max() < 2e-2


class Devices(TorchDispatchMode):
    """Where the tensors are that go into operations and come out of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.look_at((args, kwargs or (), result))
        return result

    def look_at(self, given: Any) -> None:
        if isinstance(given, torch.Tensor):
            self.seen.add(given.device.type)
        elif isinstance(given, tuple | list):
            for part in given:
                self.look_at(part)
        elif isinstance(given, dict):
            self.look_at(tuple(given.values()))


@with_and_without_gradients
@causal_rows
def test_nothing_is_copied_to_the_device_in_a_call(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with a prompt nor with a token; such a copy waits for the host, and no CUDA graph can hold it."""
    # It does not know the device that stands for one.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    module, devices = build(row).to("meta"), Devices()
    state = module.new_state()
    for length in (9, 1, 1):
        inputs = {name: t.to("meta") for name, t in tokens(length).items()}
        mask = torch.ones(2, length, dtype=torch.bool, device="meta")
        with devices:
            attend(module, inputs, state=state, padding_mask=mask)
    assert devices.seen == {"meta"}
