"""LoLA: what the cache keeps, what that is good for, and that it is LoLCATs without one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from attnconv.attention_modules import AttentionModule, Call, Geometry, Tokens, create
from attnconv.attention_modules.paths import leaving_out
from attnconv.recipes import Recipe, load_recipe
from attnconv.runs import embedded_model_path, run_conversion

SCALING = 0.25


def core(method: str = "lola", *, groups: int = 2, **options: Any) -> AttentionModule:
    torch.manual_seed(1)
    module = create(method, Geometry(2 * groups, 2, 16, 24), **{"window": 5, **options})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def tokens(length: int = 60, groups: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2 * groups, 16), (2, 16), (2, 24))
    return [torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64) for heads, dim in shapes]


@pytest.mark.parametrize("implementation", ["naive", "torch"])
def test_without_a_cache_it_is_lolcats_with_the_same_parameters(implementation: str) -> None:
    lola, lolcats = core(cache_size=0, implementation=implementation), core("lolcats")
    lola.load_state_dict(lolcats.state_dict())
    torch.testing.assert_close(lola(*tokens(), scaling=SCALING), lolcats(*tokens(), scaling=SCALING))
    assert {n: p.shape for n, p in core().named_parameters()} == {n: p.shape for n, p in lolcats.named_parameters()}


@pytest.mark.parametrize("implementation", ["naive", "torch"])
def test_a_cache_for_all_that_leaves_the_window_is_softmax(implementation: str) -> None:
    expected = create("softmax", Geometry(4, 2, 16, 24))(*tokens(), scaling=SCALING)
    for size in (55, 200):
        out = core(cache_size=size, implementation=implementation)(*tokens(), scaling=SCALING)
        torch.testing.assert_close(out, expected)


def chosen_by_hand(module: AttentionModule, key: Tensor, value: Tensor) -> list[set[int]]:
    """The tokens left in the cache of each head of a single row, from the definition and one token at a time."""
    size, window = module.options.cache_size, module.options.window
    heads = []
    maps = module.key_map(key.repeat_interleave(module.key_heads // 2, 1))[0].unflatten(0, (2, -1))
    for features, values in zip(maps, value[0], strict=True):
        cached: set[int] = set()
        folded: list[int] = []
        for token in range(len(values) - window):
            cached.add(token)
            if len(cached) <= size:
                continue
            errors = {}
            for number in cached:
                weights = torch.einsum("gf,gtf->gt", features[:, number], features[:, folded])
                recalled = weights @ values[folded] / weights.sum(-1, keepdim=True) if folded else 0 * values[:1]
                errors[number] = (recalled - values[number]).square().sum(-1).mean().item()
            best = min(errors, key=lambda number: errors[number])
            cached.remove(best)
            folded.append(best)
        heads.append(cached)
    return heads


@pytest.mark.parametrize("state_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("size", [1, 4, 13])
def test_the_cache_keeps_what_is_recalled_worst(state_per: str, size: int) -> None:
    module, (query, key, value) = core(cache_size=size, state_per=state_per), tokens()
    state = module.new_state()
    module(query, key, value, scaling=SCALING, state=state)
    # What the next token's window no longer holds has been through the cache.
    longer = (torch.cat([tensor, torch.zeros_like(tensor[:, :, :1])], 2) for tensor in (key, value))
    for head, expected in enumerate(chosen_by_hand(module, *longer)):
        is_kept = (state.memory["cache_keys"][0, head][:, None] == key[0, head]).all(-1)
        assert set(is_kept.any(0).nonzero().flatten().tolist()) == expected
    assert state.memory["cache_filled"].tolist() == [size] * 2


def test_the_weights_are_those_of_the_output_and_need_the_values() -> None:
    module, (query, key, value) = core(cache_size=6), tokens(40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :7] = False
    mask[1, 30:] = False
    weights = module.attention_weights(query, key, scaling=SCALING, padding_mask=mask, value=value)
    expected = module(query, key, value, scaling=SCALING, padding_mask=mask)
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), expected)
    assert (weights.triu(1) == 0).all()
    assert (weights[0, :, :, :7] == 0).all()
    assert (weights[1, :, 30:] == 0).all()
    with pytest.raises(ValueError, match="chooses tokens by their values"):
        module.attention_weights(query, key, scaling=SCALING)
    naive = core(cache_size=6, implementation="naive")
    units = torch.eye(40).double().expand(2, 2, 40, 40)
    with pytest.raises(ValueError, match="chooses tokens by their values"):
        naive.attend_naive(Call(query, Tokens(key, units), SCALING), {})


@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("path", ["window", "linear", "cache"])
def test_each_path_can_be_left_out(implementation: str, path: str) -> None:
    module, inputs = core(cache_size=6, implementation=implementation), tokens(40)
    whole = module(*inputs, scaling=SCALING)
    others = {"window", "linear", "cache"} - {path}
    with leaving_out(module, path):
        out = module(*inputs, scaling=SCALING)
        state = module.new_state()
        parts = [[t[:, :, start : start + 8] for t in inputs] for start in range(0, 40, 8)]
        by_parts = torch.cat([module(*part, scaling=SCALING, state=state) for part in parts], 2)
        torch.testing.assert_close(by_parts, out)
        with leaving_out(module, others.pop()), leaving_out(module, others.pop()):
            assert (module(*inputs, scaling=SCALING) == 0).all()
    assert (out - whole).abs()[:, :, 20:].amax(-1).min() > 1e-6
    with leaving_out(module, "cache"), leaving_out(module, "linear"):
        window = create("sliding_window", module.geometry, window=5, num_sinks=0)(*inputs, scaling=SCALING)
        torch.testing.assert_close(module(*inputs, scaling=SCALING), window)


def needle(length: int = 400, place: int = 100) -> tuple[list[Tensor], Tensor]:
    """Many tokens whose keys are alike and say alike things, one that is different, and a query for it at the end."""
    generator = torch.Generator().manual_seed(5)
    common, rare = torch.eye(16)[0], torch.eye(16)[1]
    key = 3 * common + 0.3 * torch.randn(1, 2, length, 16, generator=generator)
    value = torch.ones(24) + 0.3 * torch.randn(1, 2, length, 24, generator=generator)
    key[:, :, place] = 3 * common + 4 * rare
    value[:, :, place] = secret = torch.randn(24, generator=generator)
    query = 3 * common + 0.3 * torch.randn(1, 4, length, 16, generator=generator)
    query[:, :, -1] = 12 * rare
    return [query, key, value], secret


@pytest.mark.parametrize("state_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("window_terms", ["relative", "absolute"])
def test_it_retrieves_what_lolcats_loses(state_per: str, window_terms: str) -> None:
    """A passkey far behind the window: its key has a direction of its own among hundreds that are alike."""
    inputs, secret = needle()
    softmax = create("softmax", Geometry(4, 2, 16, 24))
    options = {"window": 16, "mixing": 0.5, "feature_map": "exp", "state_per": state_per, "window_terms": window_terms}
    lolcats = create("lolcats", softmax.geometry, **options)
    lola = create("lola", softmax.geometry, **options, cache_size=8)
    with torch.no_grad():
        # A map of keys that does not see that direction, as one of few features must miss some.
        lolcats.key_map.weight[:, :, 1] = -3 * torch.eye(16)[0]
    lola.load_state_dict(lolcats.state_dict())
    found = [module(*inputs, scaling=1.0)[0, :, -1] for module in (softmax, lolcats, lola)]
    errors = [((out - secret).norm(dim=-1) / (secret - 1).norm()).max().item() for out in found]
    assert errors[0] < 1e-3
    assert errors[1] > 0.9
    assert errors[2] < 0.02


def test_it_refuses_to_look_both_ways() -> None:
    with pytest.raises(ValueError, match=r"order of time.*bidirectional.*`lolcats`"):
        create("lola", Geometry(4, 2, 16, 24, causal=False))


@pytest.mark.slow
def test_the_recipe_heals_as_lolcats_plus_does_and_its_weights_serve_both(tmp_path) -> None:
    lola, plus = load_recipe("lola"), load_recipe("lolcats-plus")
    assert {*lola.attention[0].options, "num_sinks"} == {*plus.attention[0].options, "cache_size"}
    stages = [
        {"kind": "attention_transfer", "steps": 3, "sequence_length": 48, "learning_rate": 0.01},
        {"kind": "lora", "steps": 2, "sequence_length": 48, "learning_rate": 0.001, "rank": 2, "train_cores": True},
    ]
    folders = []
    for method, options in (("lola", {"window": 8, "cache_size": 4}), ("lolcats", {"window": 8})):
        rules = [{"layers": "all", "method": method, "options": {**options, "state_per": "kv_head"}}]
        recipe = Recipe(name="test", attention=rules, data={"embedded": True}, stages=stages)
        folders.append(run_conversion(embedded_model_path(), recipe, tmp_path / method, device="cpu").output)
    lola_model, lolcats_model = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    missing, unexpected = lolcats_model.load_state_dict(lola_model.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    prompt = torch.arange(3, 40)[None]
    generated = [
        lola_model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*generated)
