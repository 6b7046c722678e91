"""Tokens that came one by one can be taken back together, as those of an assistant that drafted too many."""

import random

import pytest
import torch
from invariants import Row, build, causal_rows, close, part, tokens
from invariants import attend as attend_row

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.state import AttentionState

GEOMETRY = Geometry(4, 2, 16, 16)


def attend(
    module: AttentionModule, inputs: torch.Tensor, start: int, stop: int, state: AttentionState | None = None
) -> torch.Tensor:
    part = inputs[:, :, start:stop]
    out: torch.Tensor = module(part, part[:, :2], part[:, 2:], scaling=0.25, state=state)
    return out


@pytest.mark.parametrize("name", ["softmax", "sliding_window", "hedgehog", "lolcats"])
def test_single_tokens_are_taken_back(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    kept, drafts = (torch.randn(1, 4, 40, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    options = {"window": 4} if name in ("lolcats", "sliding_window") else {}
    module = create(name, GEOMETRY, **options).double()
    whole = attend(module, kept, 0, 40)
    state = module.new_state()
    state.record_past = True
    attend(module, kept, 0, 10, state)
    for start in range(10, 40, 10):
        for token in range(12):
            attend(module, drafts, token, token + 1, state)
        state.crop(12)
        torch.testing.assert_close(attend(module, kept, start, start + 10, state), whole[:, :, start : start + 10])
    # The next crop lets go of what was recorded.
    state.crop(0)
    attend(module, kept, 0, 1, state)
    if module.tail_tokens is not None:
        assert state.tail_length == module.tail_tokens + 1


@pytest.mark.parametrize("name", ["sliding_window", "lolcats"])
def test_tokens_are_not_taken_back_from_under_a_window(name: str) -> None:
    """What the window would need in their place was forgotten, so that the next outputs could not be exact."""
    module = create(name, GEOMETRY, window=8).double()
    inputs = torch.randn(1, 4, 30, 16, dtype=torch.float64)
    state = module.new_state()
    attend(module, inputs, 0, 7, state)
    state.crop(2)
    torch.testing.assert_close(attend(module, inputs, 5, 20, state), attend(module, inputs, 0, 20)[:, :, 5:])
    with pytest.raises(ValueError, match="only 0 can be taken back exactly; set record_past"):
        state.crop(1)
    state.record_past = True
    attend(module, inputs, 25, 30, state)
    with pytest.raises(ValueError, match="cannot take back 6 tokens: only 5"):
        state.crop(6)
    state.crop(5)
    torch.testing.assert_close(attend(module, inputs, 20, 30, state), attend(module, inputs, 0, 30)[:, :, 20:])


@pytest.mark.parametrize("name", ["softmax", "sliding_window", "hedgehog", "lolcats"])
def test_padding_is_taken_back_and_no_older_token(name: str) -> None:
    """Where a row's share of the tokens taken back was padding, it has no free places in front instead of them."""
    module = create(name, GEOMETRY, **({"window": 3} if name in ("lolcats", "sliding_window") else {})).double()
    inputs = torch.randn(2, 4, 20, 16, dtype=torch.float64)
    state = module.new_state()
    state.record_past = True
    whole = attend(module, inputs, 0, 6)
    attend(module, inputs, 0, 5, state)
    state.crop(0)
    drafts = inputs[:, :, 10:12]
    mask = torch.tensor([[True, False], [True, True]])
    module(drafts, drafts[:, :2], drafts[:, 2:], scaling=0.25, state=state, padding_mask=mask)
    state.crop(2)
    assert state.seen == 5
    torch.testing.assert_close(attend(module, inputs, 5, 6, state), whole[:, :, 5:])
    # Nor do free places add up.
    for _ in range(50):
        module(drafts, drafts[:, :2], drafts[:, 2:], scaling=0.25, state=state, padding_mask=mask)
        state.crop(2)
    longest = 6 if module.tail_tokens is None else module.tail_tokens + 2
    assert state.tail_length <= longest


def random_mask(rng: random.Random, batch: int, length: int) -> torch.Tensor | None:
    """None, or padding on the left, on the right or anywhere; a row may be nothing else."""
    kind = rng.choice(["none", "left", "right", "anywhere"])
    counts = torch.tensor([[rng.randint(0, length)] for _ in range(batch)])
    ranks = torch.stack([torch.tensor(rng.sample(range(length), length)) for _ in range(batch)])
    place = torch.arange(length).expand(batch, -1)
    masks = {"none": None, "left": place >= length - counts, "right": place < counts, "anywhere": ranks < counts}
    return masks[kind]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@causal_rows
def test_random_conversations(row: Row, seed: int) -> None:
    """Turns that are padded somehow, recorded and partly taken back, in rows that change places: each as if alone."""
    rng, module = random.Random(seed), build(row)
    state, kept, recorded = module.new_state(), tokens(0, batch=3), 0
    outs, mask = kept["query"].new_empty(3, 4, 0, 24), torch.ones(3, 0, dtype=torch.bool)
    for turn in range(12):
        length = rng.choice([1, 1, 2, 5, 13])
        inputs, valid = tokens(length, batch=3, seed=turn), random_mask(rng, 3, length)
        state.record_past = rng.random() < 0.7
        with torch.set_grad_enabled(rng.random() < 0.2):
            out = attend_row(module, inputs, padding_mask=valid, state=state).detach()
        recorded = recorded + length if state.record_past else 0
        real = torch.ones(3, length, dtype=torch.bool) if valid is None else valid
        outs, mask = torch.cat([outs, out], 2), torch.cat([mask, real], 1)
        kept = {name: torch.cat([t, inputs[name]], 2) for name, t in kept.items()}
        if rng.random() < 0.6:
            taken, recorded = rng.randint(0, recorded), 0
            state.crop(taken)
            end = outs.shape[2] - taken
            outs, mask, kept = outs[:, :, :end], mask[:, :end], part(kept, 0, end)
        if rng.random() < 0.3:
            order = torch.tensor([rng.randrange(3) for _ in range(3)])
            state.reorder(order)
            outs, mask, kept = outs[order], mask[order], {name: t[order] for name, t in kept.items()}
        assert state.seen == outs.shape[2]
    oracle = build(row, implementation="naive")
    for b in range(3):
        alone = {name: t[b : b + 1, :, mask[b]] for name, t in kept.items()}
        close(outs[b : b + 1, :, mask[b]], attend_row(oracle, alone))
