"""What a call sums up behind its queries becomes the state's memory: no key is mapped and folded twice."""

import json
from typing import Any

import pytest
import torch
from interpreted_cases import interpreted
from invariants import BASE, ROWS, Row, attend, build, causal_rows, close, part, tokens, with_and_without_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from attnconv.attention_modules import AttentionModule, Tokens
from attnconv.attention_modules.linear.base import STRETCH, LinearAttentionModule
from attnconv.attention_modules.linear.recurrent import RecurrentModule

LENGTH = 90
# Windows and methods that keep all tokens map and fold nothing.
# So do parts of heads, which have rows of their own.
OTHERS = ("sliding_window", "neighborhood", "by_head")
FOLDING_ROWS = [row for row in ROWS if row.causal and row.method not in OTHERS and build(row).tail_tokens is not None]


@causal_rows
def test_memory_is_that_of_the_definition(row: Row) -> None:
    """A naive module folds all tokens by `absorb`; values and gradients of memories are compared."""
    results = []
    for implementation in ("naive", "torch"):
        module = build(row, implementation=implementation)
        inputs = {name: t.requires_grad_() for name, t in tokens(LENGTH).items()}
        state = module.new_state()
        for start, stop in ((0, 70), (70, 77), (77, LENGTH)):
            lengths = torch.tensor([[0], [(stop - start) // 3]])
            mask = torch.arange(stop - start) >= lengths
            attend(module, part(inputs, start, stop), padding_mask=mask, state=state)
        total = sum((t * torch.arange(t.numel()).view_as(t).cos()).sum() for t in state.memory.values())
        leaves = {**dict(module.named_parameters()), **inputs}
        if isinstance(total, torch.Tensor) and total.requires_grad:
            total.backward()
        gradients = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
        results.append(({name: t.detach() for name, t in state.memory.items()}, gradients))
    for expected, actual in zip(*results, strict=True):
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            close(actual[name], tensor)


def absorbed(module: AttentionModule, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of tokens of every call of `absorb`."""
    counts: list[int] = []
    absorb = module.absorb

    def counted(given: Tokens, memory: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        counts.append(given.length)
        return absorb(given, memory)

    monkeypatch.setattr(module, "absorb", counted)
    return counts


@with_and_without_gradients
@pytest.mark.parametrize("row", FOLDING_ROWS, ids=lambda row: row.id)
def test_prefill_folds_no_key_twice(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(row)
    counts = absorbed(module, monkeypatch)
    mapped: list[int] = []
    if isinstance(module, LinearAttentionModule):
        module.key_map.register_forward_pre_hook(lambda _, args: mapped.append(args[0].shape[2]))
    if isinstance(module, RecurrentModule):
        activate = module.activate
        monkeypatch.setattr(module, "activate", lambda x: (mapped.append(x.shape[2]), activate(x))[1])
        monkeypatch.setattr(module, "update", None)
    state = module.new_state()
    attend(module, tokens(LENGTH), state=state)
    # The last token that leaves a window's tail is still inside the window of the last query.
    assert sum(counts) == (1 if module.tail_tokens is not None and row.options.get("window") else 0)
    if row.method == "lolcats":
        assert sum(mapped) == LENGTH - state.tail_length
    elif row.method != "lola":
        # Queries go through the activation too.
        assert sum(mapped) == LENGTH * (2 if isinstance(module, RecurrentModule) else 1)


@pytest.mark.parametrize("row", FOLDING_ROWS, ids=lambda row: row.id)
def test_recorded_tokens_stay_out_of_the_memory(row: Row) -> None:
    """The call knows sums behind tokens that do not leave the tail yet."""
    module, inputs = build(row), tokens(LENGTH)
    state = module.new_state()
    attend(module, part(inputs, 0, 60), state=state)
    before = dict(state.memory)
    state.record_past = True
    attend(module, part(inputs, 60, LENGTH), state=state)
    assert state.memory.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(state.memory[name], tensor, rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.numbers = max(self.numbers, result.numel())
        return result


@torch.no_grad()
def test_long_stretches_are_absorbed_in_parts() -> None:
    module = build(Row("lolcats", {"window": 5}))
    inputs = tokens(2 * STRETCH + 100, batch=1)
    keys, values = inputs["key"], inputs["value"]
    valid = torch.arange(keys.shape[2])[None] >= 50
    with Largest() as largest:
        memory = module.absorb(Tokens(keys, values, valid), {})
    assert largest.numbers <= BASE.num_heads * module.memory_shapes()["normalizer"][-1] * STRETCH
    features = module.key_features(Tokens(keys, values, valid))
    close(memory["normalizer"], features.sum(2))
    close(memory["key_values"], features.transpose(-1, -2) @ values.repeat_interleave(BASE.num_groups, 1))


KERNELS = """
import json
import quick_triton
import torch
from attnconv.attention_modules import Geometry, create

def fold(implementation, dtype, method, options):
    torch.manual_seed(0)
    module = create(method, Geometry(2, 1, 16, 24, hidden_size=12), implementation=implementation, **options)
    shapes = (2, 40, 16), (1, 40, 16), (1, 40, 24)
    tensors = [torch.randn(2, *shape).bfloat16().to(dtype) for shape in shapes]
    absorb, counts = module.absorb, []
    module.absorb = lambda tokens, memory: (counts.append(tokens.length), absorb(tokens, memory))[1]
    mask = torch.arange(40) >= torch.tensor([[13], [0]])
    state = module.new_state()
    hidden = torch.randn(2, 40, 12)
    with torch.no_grad():
        module(*tensors, scaling=0.3, padding_mask=mask, state=state, hidden_states=hidden)
    return sum(counts), state.memory

gated = {"gate": "scalar", "activation": "softmax", "normalizer": True}
found = []
for method, options in (
    ("hedgehog", {}), ("linear", {}), ("lightning", {}), ("gated", {}), ("gated", gated), ("gated_delta", {})
):
    _, expected = fold("naive", torch.float32, method, options)
    for dtype in (torch.float32, torch.bfloat16):
        count, memory = fold("triton", dtype, method, options)
        assert memory.keys() == expected.keys()
        error = max(float((memory[name] - t).abs().max() / t.abs().max()) for name, t in expected.items())
        found.append([method, str(dtype), count, error, sorted({str(t.dtype) for t in memory.values()})])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_kernels_hand_over_their_sums() -> None:
    pytest.importorskip("triton")
    for method, dtype, count, error, dtypes in json.loads(interpreted("-c", KERNELS)):
        assert count == 0, method
        assert dtypes == ["torch.float32"], method
        assert error < (1e-5 if dtype == "torch.float32" else 1e-2), (method, dtype)
