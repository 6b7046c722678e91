"""Tokens that came one by one can be taken back together, as those of an assistant that drafted too many."""

import pytest
import torch

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
