"""The gated delta rule against transformers' own two forms of it, its definition and its gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.linear import delta
from attnconv.attention_modules.linear.recurrent import decay_slopes

HIDDEN = 12
GEOMETRY = Geometry(4, 2, 16, 24, hidden_size=HIDDEN)
SCALING = 16**-0.5


def core(implementation: str = "torch", **options: Any) -> AttentionModule:
    torch.manual_seed(3)
    module = create("gated_delta", GEOMETRY, implementation=implementation, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.requires_grad_(False)


def inputs(length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = {"query": (2, 4, length, 16), "key": (2, 2, length, 16), "value": (2, 2, length, 24)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**drawn, "hidden_states": torch.randn(2, length, HIDDEN, generator=generator)}


@pytest.mark.parametrize("reference", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("state_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("length", [1, 7, 64, 200])
def test_it_is_transformers_rule(reference: Any, implementation: str, state_per: str, length: int) -> None:
    module, given = core(implementation, activation="none", state_per=state_per), inputs(length)
    signals = module.signals(given["key"], given["hidden_states"])
    repeats = 4 // module.key_heads
    decay, beta = (signals[name].squeeze(-1).repeat_interleave(repeats, 1) for name in ("log_decay", "beta"))
    heads = [given["query"], *(given[name].repeat_interleave(2, 1) for name in ("key", "value"))]
    expected, final = reference(
        *(t.transpose(1, 2) for t in heads),
        g=decay.transpose(1, 2),
        beta=beta.transpose(1, 2),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    weights = module.attention_weights(
        given["query"], given["key"], scaling=SCALING, hidden_states=given["hidden_states"]
    )
    torch.testing.assert_close(weights @ heads[2], expected.transpose(1, 2), atol=2e-5, rtol=1e-4)
    state = module.new_state()
    module(**given, scaling=SCALING, state=state)
    torch.testing.assert_close(state.memory["state"].repeat_interleave(repeats, 1), final, atol=2e-5, rtol=1e-4)


def test_norm_and_gate_follow() -> None:
    module, given = core().double(), {name: t.double() for name, t in inputs(30).items()}
    weights = module.attention_weights(
        given["query"], given["key"], scaling=SCALING, hidden_states=given["hidden_states"]
    )
    mixed = weights @ given["value"].repeat_interleave(2, 1)
    gate = (given["hidden_states"] @ module.output_gate.weight).sigmoid().view(2, 30, 4, 24).transpose(1, 2)
    expected = F.rms_norm(mixed, (24,), eps=1e-6) * module.norm.weight[:, None] * gate
    torch.testing.assert_close(module(**given, scaling=SCALING), expected)


def test_without_norm_and_gate_the_weights_are_all_there_is() -> None:
    module, given = core(output_norm=False, output_gate=False), inputs(30)
    weights = module.attention_weights(given["query"], given["key"], scaling=7.0, hidden_states=given["hidden_states"])
    out = module(**given, scaling=SCALING)
    torch.testing.assert_close(out, weights @ given["value"].repeat_interleave(2, 1), atol=1e-5, rtol=1e-4)
    assert not any("norm" in name or "output" in name for name in module.state_dict())


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(length: int) -> list[Tensor]:
    """Queries, keys, values, log decays, strengths and a state."""
    keys = F.normalize(draw(1, 2, length, 3, seed=1), dim=-1)
    gates = [-draw(1, 2, length, 1, seed=3).exp(), draw(1, 2, length, 1, seed=4).sigmoid()]
    return [draw(1, 2, 2, length, 3, seed=0), keys, draw(1, 2, length, 4, seed=2), *gates, draw(1, 2, 3, 4, seed=5)]


def test_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "SCALAR_CHUNK", 4)
    leaves = [t.requires_grad_() for t in arguments(10)]
    assert torch.autograd.gradcheck(delta.delta_chunks, leaves)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 17])
def test_chunks_are_steps(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "SCALAR_CHUNK", 4)
    given = arguments(length)
    expected, state = delta.delta_steps(*given)
    out, last = delta.delta_chunks(*given)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, state)
    torch.testing.assert_close(delta.delta_state(*given[1:]), state)


def test_a_key_stands_for_its_latest_value() -> None:
    """What sets the rule apart from a sum: at full strength and without fading, writing again replaces."""
    keys = torch.eye(3).repeat(2, 1)[None, None]
    values = torch.arange(24.0).view(1, 1, 6, 4)
    nothing, full = torch.zeros(1, 1, 6, 1), torch.ones(1, 1, 6, 1)
    for form in (delta.delta_steps, delta.delta_chunks):
        out, state = form(keys[:, :, None], keys, values, nothing, full, None)
        torch.testing.assert_close(out[:, :, 0], values)
        torch.testing.assert_close(state, values[:, :, 3:])


def test_the_start_is_half_strength_and_the_rates_of_lightning() -> None:
    module = create("gated_delta", GEOMETRY, state_per="kv_head")
    given = inputs(9)
    signals = module.signals(given["key"], given["hidden_states"])
    assert (signals["beta"] == 0.5).all()
    torch.testing.assert_close(signals["log_decay"][0, :, 4, 0], -decay_slopes(2).float())


def test_it_needs_the_size_of_the_layers_input() -> None:
    with pytest.raises(ValueError, match="hidden_size is not known"):
        create("gated_delta", Geometry(4, 2, 8, 8), output_gate=False)
