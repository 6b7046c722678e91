"""States that keep all tokens: written in place, with summaries of their blocks beside them."""

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import AttentionState, Geometry, Tokens, create
from attnconv.attention_modules.growing import MOST_SPARE

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients() -> object:
    with torch.no_grad():
        yield


def draw(length: int, batch: int = 2, valid: Tensor | None = None) -> Tokens:
    keys, values, index = (torch.randn(batch, 2, length, dim) for dim in (4, 3, 2))
    return Tokens(keys, values, valid, signals={"index": index})


def means(blocks: Tensor) -> Tensor:
    return blocks.mean(-2)


def test_a_token_moves_no_other() -> None:
    state = AttentionState(grows=True)
    state.append(draw(100))
    held = state.append(draw(1))
    at = held.keys.data_ptr(), held.values.data_ptr(), held.signals["index"].data_ptr()
    for _ in range(99):
        held = state.append(draw(1))
        assert (held.keys.data_ptr(), held.values.data_ptr(), held.signals["index"].data_ptr()) == at
    assert held.length == state.tail_length == state.seen == 200


def test_all_that_was_appended_is_there_and_counted() -> None:
    state, parts = AttentionState(grows=True), [draw(n) for n in (5, 1, 1, 7, 30, 1)]
    for part in parts:
        held = state.append(part)
    for name in ("keys", "values"):
        assert torch.equal(getattr(held, name), torch.cat([getattr(part, name) for part in parts], 2))
    assert torch.equal(held.signals["index"], torch.cat([part.signals["index"] for part in parts], 2))
    bytes_of_a_token = 2 * (2 * (4 + 3 + 2) * 4 + 9)
    assert 45 * bytes_of_a_token <= state.nbytes <= 2 * 45 * bytes_of_a_token
    state.reset()
    assert state.nbytes == 0


def test_spare_room_is_bounded() -> None:
    state = AttentionState(grows=True)
    state.append(draw(3 * MOST_SPARE, batch=1))
    exact = state.nbytes
    state.append(draw(1, batch=1))
    assert exact < state.nbytes < exact * (1 + 1.1 / 3)


def test_what_was_taken_back_is_written_over() -> None:
    state, first, drafts, then = AttentionState(grows=True), draw(20), draw(6), draw(3)
    state.append(first)
    state.append(drafts)
    state.crop(5)
    held = state.append(then)
    assert torch.equal(held.keys, torch.cat([first.keys, drafts.keys[:, :, :1], then.keys], 2))


def test_buffers_made_in_inference_mode_are_left_alone_outside_of_it() -> None:
    state = AttentionState(grows=True)
    with torch.inference_mode():
        parts = [draw(5), draw(1)]
        for part in parts:
            state.append(part)
    parts.append(draw(1))
    held = state.append(parts[-1])
    assert torch.equal(held.keys, torch.cat([part.keys for part in parts], 2))


def test_gradients_reach_tokens_that_stand_in_no_buffer() -> None:
    state, first = AttentionState(grows=True), draw(4)
    state.append(first)
    state.append(draw(1))
    with torch.enable_grad():
        new = draw(1).keys.requires_grad_()
        held = state.append(Tokens(new, torch.randn(2, 2, 1, 3), signals={"index": torch.randn(2, 2, 1, 2)}))
        loss = held.keys.square().sum()
        state.append(draw(1))
        loss.backward()
    assert torch.equal(new.grad, 2 * new)


@pytest.mark.parametrize("padded", [False, True])
def test_summaries_of_blocks_are_those_of_each_row_alone(padded: bool) -> None:
    state, size, computed = AttentionState(grows=True), 4, []

    def counted(blocks: Tensor) -> Tensor:
        computed.append(blocks.shape[2])
        return means(blocks)

    for step, length in enumerate((11, 1, 1, 1, 9, 1, 1, 1, 1, 1, 1)):
        valid = torch.ones(3, length, dtype=torch.bool) if padded else None
        if padded and step in (0, 4):
            valid = torch.arange(length) >= torch.tensor([[2], [7], [0]])
        held = state.append(draw(length, 3, valid))
        if step == 6:
            state.crop(2)
            held = state.append(draw(2, 3))
        if step == 7:
            state.reorder(torch.tensor([2, 0, 1]))
            state.repeat(2)
            state.reorder(torch.tensor([0, 2, 4]))
            held = state.append(draw(1, 3))
        got = state.summaries("means", size, counted)
        for row, real in enumerate(held.real):
            alone = held.keys[row : row + 1, :, real]
            whole = alone.shape[2] // size
            expected = means(alone[:, :, : whole * size].unflatten(2, (whole, size)))
            torch.testing.assert_close(got[row : row + 1, :, :whole], expected)
    # A single token makes at most one block whole.
    assert computed[1] <= 2
    assert computed[-1] == 1


def test_softmax_decodes_in_the_dtype_of_its_keys() -> None:
    module, state = create("softmax", Geometry(4, 2, 16, 16)), None
    state = module.new_state()
    query, key, value = (torch.randn(2, heads, 40, 16).bfloat16() for heads in (4, 2, 2))
    mask = torch.arange(40) >= torch.tensor([[0], [13]])
    outs = [
        module(query[:, :, at], key[:, :, at], value[:, :, at], scaling=0.25, padding_mask=mask[:, at], state=state)
        for at in (slice(0, 30), *(slice(t, t + 1) for t in range(30, 40)))
    ]
    expected = module(query, key, value, scaling=0.25, padding_mask=mask)
    torch.testing.assert_close(torch.cat(outs, 2), expected, atol=2e-2, rtol=2e-2)
