"""Layers that read the pages another layer chose, in a whole model: prompts, chunks, tokens, padding, packed rows."""

import pytest
import torch
from tiny_models import tiny_llama

import attnconv
from attnconv.attention_modules import Geometry, Surroundings, create
from attnconv.attention_modules.counting import counting
from attnconv.recipes import parse_recipe

RECIPE = """
name: tiny-delta
attention:
  - {layers: 0, method: softmax}
  - {layers: 1, method: delta, options: {role: select, block: 4, budget: 12}}
  - {layers: all, method: delta, options: {role: reuse, block: 4, budget: 12}}
stages: []
"""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return attnconv.convert_model(tiny_llama(num_hidden_layers=4).eval(), parse_recipe(RECIPE))


@pytest.fixture(scope="module")
def tokens(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (2, 50), generator=generator)


@torch.no_grad()
def test_prompt_chunks_and_tokens_agree(model, tokens):
    whole = model(tokens).logits
    cache, outs, start = None, [], 0
    for stop in (20, 21, 22, 31, *range(32, 51)):
        out = model(tokens[:, start:stop], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, stop
        outs.append(out.logits)
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padded_and_packed_rows_are_as_if_alone(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :17] = 0
    padded = model(tokens, attention_mask=mask).logits
    alone = model(tokens[:1, 17:]).logits
    torch.testing.assert_close(padded[:1, 17:], alone, atol=1e-5, rtol=1e-5)
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None].expand(2, -1)
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(tokens[:, :20]).logits, model(tokens[:, 20:]).logits], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_is_read_is_what_was_chosen_and_counted(model, tokens):
    with counting(model) as counter:
        model(tokens)
    density = [counts.density for counts in counter.by_module.values()]
    assert density[0] == 1.0
    assert density[1] == density[2] < 0.5
    with counting(model) as counter:
        model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(counter.by_module) == 3


def test_layers_without_a_choice_before_them_and_other_pages_are_refused():
    geometry = Geometry(4, 2, 16, 16)
    query, key = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 20, 16)
    board: dict[str, torch.Tensor] = {}
    reuse = create("delta", geometry, role="reuse", block=4)
    with pytest.raises(ValueError, match="no layer before this one chose pages: give an earlier one `role: select`"):
        reuse(query, key, key, scaling=0.25, around=Surroundings(board=board))
    create("delta", geometry, block=8)(query, key, key, scaling=0.25, around=Surroundings(board=board))
    with pytest.raises(ValueError, match="`block` must be the same in both"):
        reuse(query, key, key, scaling=0.25, around=Surroundings(board=board))


def test_pages_are_those_with_the_most_attention():
    geometry = Geometry(4, 2, 16, 16)
    torch.manual_seed(0)
    query, key = 3 * torch.randn(1, 4, 30, 16), torch.randn(1, 2, 30, 16)
    board: dict[str, torch.Tensor] = {}
    options = {"block": 4, "budget": 12, "sink_blocks": 0}
    create("delta", geometry, **options)(query, key, key, scaling=0.25, around=Surroundings(board=board))
    weights = create("softmax", geometry).attention_weights(query, key, scaling=0.25)
    mass = torch.nn.functional.pad(weights, (0, 2)).unflatten(-1, (8, 4)).sum(-1).unflatten(1, (2, 2)).mean(2)
    (keep,) = board.values()
    for head in range(2):
        for t in (13, 29):
            shares = mass[0, head, t].clone()
            shares[t // 4] = 2
            assert set(shares.topk(3).indices.tolist()) == set(keep[0, head, t].nonzero().flatten().tolist())
