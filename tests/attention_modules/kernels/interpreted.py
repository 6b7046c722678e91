"""Runs the Triton kernels on the CPU and compares them with float64 oracles: outputs and every gradient.

A process of its own, for triton reads TRITON_INTERPRET once. Prints `{case: {quantity: error}}`, errors relative to the
largest number of the oracle, or to 1 where all are smaller.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.kernels.chunk_linear import chunk_linear, token_gates
from attnconv.attention_modules.kernels.decode import DecodeState, decode_step
from attnconv.attention_modules.kernels.fused import hedgehog_window_linear
from attnconv.attention_modules.kernels.hybrid import hybrid_window_linear

Inputs = dict[str, Tensor]
Result = dict[str, Tensor]


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


@dataclass(frozen=True)
class Linear:
    """One call of chunk_linear; `gate_heads` 0 means no gates, and so on."""

    batch: int = 2
    heads: tuple[int, int, int] = (4, 2, 2)
    length: int = 37
    dims: tuple[int, int] = (16, 24)
    decay: bool = False
    gate_heads: int = 0
    padded: bool = False
    memory: bool = False
    cuts: tuple[int, ...] = ()
    chunk: int = 16
    implementation: str = "triton"

    def draw(self) -> Inputs:
        torch.manual_seed(self.length)
        (heads, key_heads, value_heads), (features, width) = self.heads, self.dims
        state_heads = max(key_heads, self.gate_heads, heads if self.decay else 0)
        inputs = {
            "query": torch.rand(self.batch, heads, self.length, features),
            "key": torch.rand(self.batch, key_heads, self.length, features),
            "value": torch.randn(self.batch, value_heads, self.length, width),
        }
        if self.decay:
            inputs["decay"] = -0.3 * torch.rand(heads)
        if self.gate_heads:
            inputs["gates"] = -0.3 * torch.rand(self.batch, self.gate_heads, self.length)
        if self.memory:
            inputs["sums"] = torch.randn(self.batch, state_heads, features, width)
            inputs["norm"] = torch.rand(self.batch, state_heads, features)
        return inputs

    def start(self) -> Tensor | None:
        return starts(self.batch, self.length) if self.padded else None

    def run(self) -> dict[str, float]:
        inputs = self.draw()
        actual = differentiate(self.ours, inputs, torch.float32)
        return errors(actual, differentiate(self.oracle, inputs, torch.float64))

    def ours(self, x: Inputs) -> dict[str, Tensor]:
        memory = (x["sums"], x["norm"]) if self.memory else None
        numerators, denominators, first, start = [], [], 0, self.start()
        for size in self.cuts or (self.length,):
            part = slice(first, first + size)
            (numerator, denominator), memory = chunk_linear(
                x["query"][:, :, part],
                x["key"][:, :, part],
                x["value"][:, :, part],
                log_decay=x.get("decay"),
                log_gates=x["gates"][:, :, part] if self.gate_heads else None,
                start=None if start is None else (start - first).clamp(0, size),
                memory=memory,
                implementation=self.implementation,
                chunk=self.chunk,
            )
            first += size
            numerators.append(numerator)
            denominators.append(denominator)
        assert memory is not None
        return {
            "numerator": torch.cat(numerators, 2),
            "denominator": torch.cat(denominators, 2),
            "sums": memory[0],
            "norm": memory[1],
        }

    def oracle(self, x: Inputs) -> dict[str, Tensor]:
        """Token after token."""
        start, heads = self.start(), self.heads[0]
        gates = token_gates(x["query"], x.get("decay"), x.get("gates"), start)
        key, value = (x[name].repeat_interleave(heads // x[name].shape[1], 1) for name in ("key", "value"))
        if start is not None:
            key = key.masked_fill((torch.arange(self.length) < start[:, None])[:, None, :, None], 0.0)
        state_heads = max(self.heads[1], 0 if gates is None else gates.shape[1])
        every = heads // state_heads
        decay = key.new_ones(key.shape[:3]) if gates is None else gates.exp().repeat_interleave(every, 1)
        sums = key.new_zeros(self.batch, heads, *self.dims)
        norm = sums[..., 0]
        if self.memory:
            sums, norm = x["sums"].repeat_interleave(every, 1), x["norm"].repeat_interleave(every, 1)
        numerators, denominators = [], []
        for t in range(self.length):
            sums = sums * decay[:, :, t, None, None] + key[:, :, t, :, None] * value[:, :, t, None, :]
            norm = norm * decay[:, :, t, None] + key[:, :, t]
            numerators.append((x["query"][:, :, t, None] @ sums)[:, :, 0])
            denominators.append((x["query"][:, :, t] * norm).sum(-1))
        return {
            "numerator": torch.stack(numerators, 2),
            "denominator": torch.stack(denominators, 2),
            "sums": sums[:, ::every],
            "norm": norm[:, ::every],
        }


@dataclass(frozen=True)
class Hybrid:
    """One call of hybrid_window_linear; the oracle is that of `lolcats`."""

    batch: int = 1
    heads: tuple[int, int] = (2, 1)
    length: int = 37
    past: int = 0
    dims: tuple[int, int] = (16, 24)
    window: int = 20
    state_per: str = "query_head"
    padded: bool = False
    memory: bool = False
    chunk: int = 16
    dtype: torch.dtype = torch.float32
    fused: bool = False

    def run(self) -> dict[str, float]:
        torch.manual_seed(self.length)
        geometry = Geometry(*self.heads, *self.dims)
        module = create("lolcats", geometry, window=self.window, state_per=self.state_per).double()
        num_keys = self.length + self.past
        inputs = {
            "query": torch.randn(self.batch, self.heads[0], self.length, self.dims[0]),
            "key": torch.randn(self.batch, self.heads[1], num_keys, self.dims[0]),
            "value": torch.randn(self.batch, self.heads[1], num_keys, self.dims[1]),
            "mixing": torch.randn(self.heads[0]),
        }
        for name, features in (("query", module.query_map), ("key", module.key_map)):
            inputs[f"{name}_weight"] = features.weight.detach() + 0.3 * torch.randn_like(features.weight)
        if self.memory:
            shapes = module.memory_shapes()
            inputs["sums"] = torch.randn(self.batch, *shapes["key_values"])
            inputs["norm"] = torch.rand(self.batch, *shapes["normalizer"])
        inputs = {name: t.to(self.dtype) for name, t in inputs.items()}
        start = starts(self.batch, num_keys) if self.padded else None
        valid = None if start is None else torch.arange(num_keys) >= start[:, None]

        def attend(x: Inputs) -> dict[str, Tensor]:
            sums, norm = x.get("sums"), x.get("norm")
            memory = {} if sums is None or norm is None else {"key_values": sums, "normalizer": norm}
            weights = {"mixing": x["mixing"]}
            weights |= {f"{name}_map.weight": x[f"{name}_weight"] for name in ("query", "key")}

            def call(_: Tensor) -> Tensor:
                tensors = x["query"], x["key"], x["value"]
                if x["query"].dtype == torch.float64:
                    return module.attend_naive(*tensors, valid, 0.3, memory)
                maps: tuple[Tensor, Tensor] = module.query_map.weight, module.key_map.weight
                if not self.fused:
                    maps = module.query_map(tensors[0]), module.key_features(tensors[1], valid)
                function = hedgehog_window_linear if self.fused else hybrid_window_linear
                return function(
                    *tensors,
                    *maps,
                    module.mixing.sigmoid(),
                    scaling=0.3,
                    window=self.window,
                    start=start,
                    memory=None if sums is None or norm is None else (sums, norm),
                    chunk=self.chunk,
                )

            module.forward = call  # type: ignore[method-assign]
            out = torch.func.functional_call(module, weights, (x["query"],))
            # What a row of padding gives is of no interest.
            return {"out": out if valid is None else out.masked_fill(~valid[:, None, -self.length :, None], 0.0)}

        return errors(differentiate(attend, inputs, self.dtype), differentiate(attend, inputs, torch.float64))


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


@dataclass(frozen=True)
class Decoding:
    """A prefill in torch, then tokens one by one through the kernel, rows of different lengths."""

    heads: tuple[int, int] = (4, 2)
    window: int = 5
    prefill: int = 9
    steps: int = 8
    state_per: str = "query_head"

    def run(self) -> dict[str, float]:
        torch.manual_seed(0)
        geometry = Geometry(*self.heads, 16, 24)
        options = {"window": self.window, "state_per": self.state_per, "feature_dim": 20}
        module = create("lolcats", geometry, implementation="naive", **options).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        length = self.prefill + self.steps
        shapes = (self.heads[0], length, 16), (self.heads[1], length, 16), (self.heads[1], length, 24)
        tensors = [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]
        mask = torch.arange(length) >= torch.tensor([[self.prefill - 2], [0]])
        expected = module(*tensors, scaling=0.3, padding_mask=mask)[:, :, self.prefill :]
        state = module.new_state()
        module(
            *(t[:, :, : self.prefill] for t in tensors),
            scaling=0.3,
            padding_mask=mask[:, : self.prefill],
            state=state,
        )
        shapes = {name: torch.zeros(2, *shape) for name, shape in module.memory_shapes().items()}
        memory = {name: state.memory.get(name, zeros) for name, zeros in shapes.items()}
        tail = max(0, min(self.prefill, self.window - 1))
        newest = slice(self.prefill - tail, self.prefill)
        ours = DecodeState.from_tail(
            tensors[1][:, :, newest].float(),
            tensors[2][:, :, newest].float(),
            mask[:, newest],
            memory["key_values"],
            memory["normalizer"],
            self.window,
        )
        weights = module.query_map.weight.float(), module.key_map.weight.float(), module.mixing.sigmoid()
        with torch.no_grad():
            outs = [
                decode_step(*(t[:, :, now : now + 1].float() for t in tensors), ours, *weights, scaling=0.3)
                for now in range(self.prefill, length)
            ]
        assert ours.positions.tolist() == mask[:, newest.start :].sum(-1).tolist()
        return errors({"out": torch.cat(outs, 2).double()}, {"out": expected.detach()})


SOFTMAX = (("activation", "softmax"), ("normalizer", True))
LIGER = (("gate_from", "keys"), ("gate_temperature", 1.0), ("state_per", "kv_head"))
CASES: dict[str, Callable[[], dict[str, float]]] = {
    "linear-1": Linear(length=1).run,
    "linear-7": Linear(batch=1, heads=(1, 1, 1), length=7).run,
    "linear-63-padded": Linear(heads=(3, 3, 1), length=63, padded=True, chunk=32).run,
    "linear-123": Linear(batch=1, heads=(2, 1, 1), length=123, dims=(80, 40), chunk=64).run,
    "linear-memory-padded": Linear(padded=True, memory=True).run,
    "linear-cuts": Linear(batch=1, heads=(2, 2, 1), memory=True, cuts=(20, 1, 16)).run,
    "linear-decay": Linear(batch=1, decay=True, memory=True, padded=True).run,
    "linear-gates": Linear(batch=1, gate_heads=2, heads=(4, 2, 1), memory=True).run,
    "linear-gates-decay-cuts": Linear(batch=1, gate_heads=4, decay=True, padded=True, cuts=(21, 16)).run,
    "linear-torch-padded": Linear(padded=True, memory=True, implementation="torch").run,
    "linear-torch-gates": Linear(gate_heads=4, decay=True, padded=True, implementation="torch").run,
    "hybrid-1": Hybrid(length=1, window=3).run,
    "hybrid-7": Hybrid(heads=(1, 1), length=7, window=4).run,
    "hybrid-63-padded": Hybrid(batch=2, heads=(1, 1), length=63, padded=True, chunk=32).run,
    "hybrid-123": Hybrid(heads=(1, 1), length=123, window=33, dims=(40, 40), chunk=64).run,
    "hybrid-past": Hybrid(batch=2, heads=(1, 1), past=16, window=16, memory=True, padded=True).run,
    "hybrid-kv-head": Hybrid(heads=(4, 2), past=4, window=5, memory=True, state_per="kv_head").run,
    "hybrid-all-in-window": Hybrid(length=23, window=64).run,
    "fused-37-padded": Hybrid(batch=2, heads=(2, 1), past=16, window=16, memory=True, padded=True, fused=True).run,
    "fused-kv-head": Hybrid(length=23, heads=(2, 1), state_per="kv_head", window=5, fused=True).run,
    "module-lolcats": Module("lolcats", options=(("window", 8),), record_past=True).run,
    "module-lolcats-long-window": Module("lolcats", options=(("window", 64), ("state_per", "kv_head"))).run,
    "module-hedgehog": Module("hedgehog", record_past=True).run,
    "module-linear": Module("linear").run,
    "module-lightning": Module("lightning", record_past=True).run,
    "module-lightning-kv-head": Module("lightning", options=(("decay", "learned"), ("state_per", "kv_head"))).run,
    "module-gated-scalar": Module("gated", options=(("gate", "scalar"),)).run,
    "module-gated-normalized": Module("gated", options=(("gate", "scalar"), *SOFTMAX), record_past=True).run,
    "module-liger-kv-head": Module("gated", options=(("gate", "scalar"), *LIGER, *SOFTMAX)).run,
    "decode": Decoding(steps=4).run,
    "decode-kv-head": Decoding(heads=(3, 1), state_per="kv_head").run,
    "decode-window-1": Decoding(heads=(1, 1), window=1, prefill=4, steps=3).run,
    "decode-all-in-window": Decoding(heads=(1, 1), window=64, steps=3).run,
    "hybrid-bf16": Hybrid(length=33, dtype=torch.bfloat16).run,
}

if __name__ == "__main__":
    json.dump({name: CASES[name]() for name in sys.argv[1:] or CASES}, sys.stdout)
