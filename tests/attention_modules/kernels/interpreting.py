"""What the scripts share that run Triton kernels on the CPU and compare them with float64 oracles.

They are processes of their own, for triton reads TRITON_INTERPRET once, and answer the name of a case by
`{quantity: error}`, errors relative to the largest number of the oracle, or to 1 where all are smaller.
"""

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import quick_triton  # noqa: F401
import torch
from torch import Tensor

from attnconv.attention_modules import AttentionModule, Geometry, create

Inputs = dict[str, Tensor]
Result = dict[str, Tensor]
Case = Callable[[], dict[str, float]]


def differentiate(function: Callable[[Inputs], dict[str, Tensor]], inputs: Inputs, dtype: torch.dtype) -> Result:
    """Outputs by name, and gradients of a fixed random sum of them."""
    leaves = {name: t.to(dtype).clone().requires_grad_() for name, t in inputs.items()}
    outs = function(leaves)
    generator = torch.Generator().manual_seed(5)
    total = sum((out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum() for out in outs.values())
    assert isinstance(total, Tensor)
    total.backward()
    gradients = {f"d_{name}": torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
    return {name: t.detach().double() for name, t in {**outs, **gradients}.items()}


def errors(actual: Result, expected: Result) -> dict[str, float]:
    assert actual.keys() == expected.keys()
    return {name: float((actual[name] - t).abs().max() / t.abs().max().clamp_min(1.0)) for name, t in expected.items()}


def starts(batch: int, length: int) -> Tensor:
    """Padding at the left of every row: much, none, some."""
    return torch.tensor([length // 2, 0, length // 5][:batch], dtype=torch.int32)


def answer(cases: Mapping[str, Case]) -> None:
    """For each name that comes in as a line, the errors of that case go out as a line, or what it raised."""
    for line in sys.stdin:
        try:
            print(json.dumps(cases[line.strip()]()), flush=True)
        # Said where it was asked for, so that the other cases can still be.
        except Exception:  # noqa: BLE001
            print(json.dumps(traceback.format_exc()), flush=True)


@dataclass(frozen=True)
class Module:
    """Turns of a padded conversation through a whole attention module, its state carried from call to call."""

    method: str
    turns: tuple[int, ...] = (21, 12, 1)
    options: tuple[tuple[str, object], ...] = ()
    # Keeps the latest turn whole, so that the next one finds keys before its first window.
    record_past: bool = False

    def run(self) -> dict[str, float]:
        results = []
        for implementation, dtype in (("triton", torch.float32), ("naive", torch.float64)):
            torch.manual_seed(0)
            geometry = Geometry(2, 1, 16, 24, hidden_size=12)
            module = create(self.method, geometry, implementation=implementation, **dict(self.options))
            inputs = {name: t.detach() + 0.3 * torch.randn_like(t) for name, t in module.named_parameters()}
            for turn, length in enumerate(self.turns):
                shapes = {"query": (2, length, 16), "key": (1, length, 16), "value": (1, length, 24)}
                drawn = {name: torch.randn(2, *shape) for name, shape in shapes.items()}
                drawn["hidden_states"] = torch.randn(2, length, 12)
                inputs |= {f"{name}@{turn}": t for name, t in drawn.items()}
            results.append(differentiate(self.attend(module.to(dtype)), inputs, dtype))
        return errors(results[0], results[1])

    def attend(self, module: AttentionModule) -> Callable[[Inputs], dict[str, Tensor]]:
        """All turns as one function of the parameters and of what each turn brings."""

        def talk(x: Inputs) -> dict[str, Tensor]:
            state, outs = module.new_state(), {}
            state.record_past = self.record_past
            parameters = {name: t for name, t in x.items() if "@" not in name}
            for turn, length in enumerate(self.turns):
                given = {name.removesuffix(f"@{turn}"): t for name, t in x.items() if name.endswith(f"@{turn}")}
                mask = torch.arange(length) >= torch.tensor([[length // 3], [0]])
                given |= {"scaling": 0.3, "padding_mask": mask, "state": state}
                outs[f"turn {turn}"] = torch.func.functional_call(module, parameters, (), given)
            return outs

        return talk
