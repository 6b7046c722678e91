"""The linear remainder of `sparse_linear`: what it sees, in which share, and behind which form of the exact part."""

import pytest
import torch
from torch import Tensor

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.counting import counting
from attnconv.attention_modules.paths import leaving_out
from attnconv.attention_modules.tokens import Call, Tokens

GEOMETRY = Geometry(4, 2, 16, 24)
BLOCK, SCALING = 8, 0.25


def core(**options: object) -> AttentionModule:
    torch.manual_seed(1)
    module = create("sparse_linear", GEOMETRY, block=BLOCK, **{"density": 0.35, "mixing": 0.25, **options})
    with torch.no_grad():
        for part in (module.query_map, module.key_map):
            part.weight.add_(0.3 * torch.randn_like(part.weight))
    return module.double()


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 61, d, dtype=torch.float64) for h, d in ((4, 16), (2, 16), (2, 24)))
    return 2 * query, key, value


def test_both_parts_together_see_every_token_once(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    """Their weights are those of a choice and of linear attention over its complement, a quarter of the second."""
    module, (query, key, value) = core(), drawn
    weights = module.attention_weights(query, key, scaling=SCALING)
    with leaving_out(module, "linear"):
        exact = module.attention_weights(query, key, scaling=SCALING)
    with leaving_out(module, "blocks"):
        rest = module.attention_weights(query, key, scaling=SCALING)
    seen, behind = exact > 0, torch.ones(61, 61, dtype=torch.bool).tril()
    assert torch.equal(rest > 0, behind & ~seen)
    assert 0.2 < seen.sum() / (4 * behind.sum()) < 0.5
    has_rest = (rest > 0).any(-1, keepdim=True)
    torch.testing.assert_close(weights, torch.where(has_rest, 0.75 * exact + 0.25 * rest, exact))
    products = module.query_map(query) @ module.key_map(key).repeat_interleave(2, 1).transpose(-1, -2)
    by_hand = products.masked_fill(~(rest > 0), 0.0)
    torch.testing.assert_close(rest, by_hand / by_hand.sum(-1, keepdim=True).clamp_min(1e-300))
    logits = (SCALING * query @ key.repeat_interleave(2, 1).transpose(-1, -2)).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(exact, logits.softmax(-1))
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), module(query, key, value, scaling=SCALING))


def test_all_of_the_tokens_are_counted(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    module, (query, key, value) = core(), drawn
    with counting(module) as counter:
        module(query, key, value, scaling=SCALING)
    found = counter.total
    assert 0.2 < found.density < 0.5
    assert found.exact_pairs + found.summarized_pairs == found.dense_pairs


@pytest.mark.parametrize("padded", [False, True])
def test_the_rest_is_the_same_behind_a_kernel(drawn: tuple[Tensor, Tensor, Tensor], padded: bool) -> None:
    """Which chooses by a call in full precision that holds no values."""
    pytest.importorskip("triton")
    module, (query, key, value) = core(), drawn
    valid = torch.arange(61)[None] >= 5 if padded else None
    call = Call(query, Tokens(key, value, valid), SCALING)
    with leaving_out(module, "linear"):
        exact = module.attend_torch(call, {})
    canvas, keep = module._exact_choice(call)
    assert not canvas.values.shape[-1]
    expected, found = module.attend_torch(call, {}), module.with_rest(exact, call, canvas, keep)
    torch.testing.assert_close(found[:, :, 5:], expected[:, :, 5:])


def test_published_choices_are_for_prompts() -> None:
    with pytest.raises(ValueError, match="needs decode: dense"):
        core(query="block")
    assert core(query="block", decode="dense").dense_in == {"decode"}
