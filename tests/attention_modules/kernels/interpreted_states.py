"""Chunked linear attention and the methods that consist of it, interpreted; see `interpreting.py`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from interpreting import Case, Inputs, Module, answer, differentiate, errors, starts
from torch import Tensor

from attnconv.attention_modules.kernels.chunk_linear.forward import chunk_linear, token_gates
from attnconv.attention_modules.kernels.delta_rule.forward import delta_rule

# What has a row for each sequence instead of tokens.
STATES = ("sums", "norm", "state")


def cumulative(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)


def unpacked(inputs: Inputs, sizes: tuple[int, ...]) -> Iterator[Inputs]:
    """What belongs to each of the sequences in one row: their tokens, and their rows of what has no tokens."""
    ends = list(accumulate(sizes, initial=0))
    for row, (first, end) in enumerate(pairwise(ends)):
        yield {
            name: t if name == "decay" else t[row : row + 1] if name in STATES else t[:, :, first:end]
            for name, t in inputs.items()
        }


def joined(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([r[name] for r in results], 0 if name in STATES else 2) for name in results[0]}


@dataclass(frozen=True)
class Linear:
    """One call of chunk_linear; `gate_heads` 0 means no gates, and so on."""

    batch: int = 2
    heads: tuple[int, int, int] = (4, 2, 2)
    length: int = 37
    dims: tuple[int, int] = (16, 24)
    decay: bool = False
    gate_heads: int = 0
    # A gate for each channel, closed at times to a degree that would overflow were it opened again.
    vector: bool = False
    padded: bool = False
    memory: bool = False
    cuts: tuple[int, ...] = ()
    # Lengths of sequences packed in one row; their sum is the length.
    packed: tuple[int, ...] = ()
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
            shape = self.batch, self.gate_heads, self.length
            inputs["gates"] = -0.3 * torch.rand(*shape)
            if self.vector:
                inputs["gates"] = -0.3 * torch.rand(*shape, features) - 20.0 * (torch.rand(*shape, 1) > 0.8)
        if self.memory:
            rows = len(self.packed) or self.batch
            inputs["sums"] = torch.randn(rows, state_heads, features, width)
            inputs["norm"] = torch.rand(rows, state_heads, features)
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
                cu_seqlens=cumulative(self.packed) if self.packed else None,
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
        """Token after token, and packed sequences one by one."""
        if self.packed:
            alone = (
                replace(self, length=size, packed=()).oracle(part)
                for size, part in zip(self.packed, unpacked(x, self.packed), strict=True)
            )
            return joined(list(alone))
        start, heads = self.start(), self.heads[0]
        gates = token_gates(x["query"], x.get("decay"), x.get("gates"), start)
        key, value = (x[name].repeat_interleave(heads // x[name].shape[1], 1) for name in ("key", "value"))
        if start is not None:
            key = key.masked_fill((torch.arange(self.length) < start[:, None])[:, None, :, None], 0.0)
        state_heads = max(self.heads[1], 0 if gates is None else gates.shape[1])
        every = heads // state_heads
        decay = key.new_ones(key.shape[:3]) if gates is None else gates.exp().repeat_interleave(every, 1)
        decay = decay if self.vector else decay[..., None]
        sums = key.new_zeros(self.batch, heads, *self.dims)
        norm = sums[..., 0]
        if self.memory:
            sums, norm = x["sums"].repeat_interleave(every, 1), x["norm"].repeat_interleave(every, 1)
        numerators = [key.new_empty(self.batch, heads, 0, self.dims[1])]
        denominators = [numerators[0][..., 0]]
        for t in range(self.length):
            sums = sums * decay[:, :, t, :, None] + key[:, :, t, :, None] * value[:, :, t, None, :]
            norm = norm * decay[:, :, t] + key[:, :, t]
            query = x["query"][:, :, t, None]
            numerators.append(query @ sums)
            denominators.append((query @ norm[..., None])[..., 0])
        return {
            "numerator": torch.cat(numerators, 2),
            "denominator": torch.cat(denominators, 2),
            "sums": sums[:, ::every],
            "norm": norm[:, ::every],
        }


@dataclass(frozen=True)
class Delta:
    """One call of delta_rule, or several."""

    batch: int = 2
    heads: tuple[int, int, int] = (4, 2, 2)
    state_heads: int = 4
    length: int = 37
    dims: tuple[int, int] = (16, 24)
    padded: bool = False
    memory: bool = False
    cuts: tuple[int, ...] = ()
    packed: tuple[int, ...] = ()
    chunk: int = 16
    # Every key the same, never fading and replaced in full: the worst case for the triangular systems. Gradients of
    # gates, small differences of large numbers then, are not asked for.
    same_keys: bool = False

    def run(self) -> dict[str, float]:
        torch.manual_seed(self.length)
        (heads, key_heads, value_heads), (key_dim, width) = self.heads, self.dims
        key = torch.randn(self.batch, key_heads, self.length, key_dim)
        gates, beta = (factor * torch.rand(self.batch, self.state_heads, self.length) for factor in (-0.3, 1.0))
        if self.same_keys:
            key, beta = torch.ones_like(key), torch.ones_like(beta)
        inputs = {
            "query": torch.randn(self.batch, heads, self.length, key_dim),
            "key": key / key.norm(dim=-1, keepdim=True),
            "value": torch.randn(self.batch, value_heads, self.length, width),
            "beta": beta,
        }
        if not self.same_keys:
            inputs["gates"] = gates
        if self.memory:
            inputs["state"] = torch.randn(len(self.packed) or self.batch, self.state_heads, key_dim, width)
        actual = differentiate(self.ours, inputs, torch.float32)
        return errors(actual, differentiate(self.oracle, inputs, torch.float64))

    def start(self) -> Tensor | None:
        return starts(self.batch, self.length) if self.padded else None

    def ours(self, x: Inputs) -> dict[str, Tensor]:
        state, outs, first, start = x.get("state"), [], 0, self.start()
        x = {"gates": torch.zeros_like(x["beta"]), **x}
        for size in self.cuts or (self.length,):
            part = slice(first, first + size)
            out, state = delta_rule(
                *(x[name][:, :, part] for name in ("query", "key", "value", "gates", "beta")),
                start=None if start is None else (start - first).clamp(0, size),
                state=state,
                cu_seqlens=cumulative(self.packed) if self.packed else None,
                chunk=self.chunk,
            )
            first += size
            outs.append(out)
        assert state is not None
        return {"out": self.real(torch.cat(outs, 2)), "state": state}

    def real(self, out: Tensor) -> Tensor:
        start = self.start()
        return out if start is None else out * (torch.arange(self.length) >= start[:, None])[:, None, :, None]

    def oracle(self, x: Inputs) -> dict[str, Tensor]:
        """Token after token, and packed sequences one by one."""
        if self.packed:
            alone = zip(self.packed, unpacked(x, self.packed), strict=True)
            return joined([replace(self, length=size, packed=()).oracle(part) for size, part in alone])
        start, heads = self.start(), self.heads[0]
        padding = torch.zeros(self.batch, 1, self.length, dtype=torch.bool)
        if start is not None:
            padding = (torch.arange(self.length) < start[:, None])[:, None]
        gates = x.get("gates", torch.zeros_like(x["beta"]))
        decay, beta = gates.masked_fill(padding, 0.0).exp(), x["beta"].masked_fill(padding, 0.0)
        tokens = {name: x[name] for name in ("query", "key", "value")} | {"decay": decay, "beta": beta}
        tokens = {name: t.repeat_interleave(heads // t.shape[1], 1) for name, t in tokens.items()}
        every = heads // self.state_heads
        state = tokens["key"].new_zeros(self.batch, heads, *self.dims)
        if "state" in x:
            state = x["state"].repeat_interleave(every, 1)
        outs = [state.new_empty(self.batch, heads, 0, self.dims[1])]
        for t in range(self.length):
            query, key, value = (tokens[name][:, :, t, None] for name in ("query", "key", "value"))
            state = state * tokens["decay"][:, :, t, None, None]
            added = tokens["beta"][:, :, t, None, None] * (value - key @ state)
            state = state + key.transpose(-1, -2) @ added
            outs.append(query @ state)
        return {"out": self.real(torch.cat(outs, 2)), "state": state[:, ::every]}


SOFTMAX = (("activation", "softmax"), ("normalizer", True))
PLAIN = (("activation", "none"), ("output_norm", False), ("output_gate", False))
LIGER = (("gate_from", "keys"), ("gate_temperature", 1.0), ("state_per", "kv_head"))
CASES: dict[str, Case] = {
    "linear-1": Linear(length=1).run,
    "linear-7": Linear(batch=1, heads=(1, 1, 1), length=7).run,
    "linear-63-padded": Linear(heads=(3, 3, 1), length=63, padded=True, chunk=32).run,
    "linear-123": Linear(batch=1, heads=(2, 1, 1), length=123, dims=(80, 40), chunk=64).run,
    "linear-memory-padded": Linear(padded=True, memory=True).run,
    "linear-cuts": Linear(batch=1, heads=(2, 2, 1), memory=True, cuts=(20, 1, 16)).run,
    "linear-decay": Linear(batch=1, decay=True, memory=True, padded=True).run,
    "linear-gates": Linear(batch=1, gate_heads=2, heads=(4, 2, 1), memory=True).run,
    "linear-gates-decay-cuts": Linear(batch=1, gate_heads=4, decay=True, padded=True, cuts=(21, 16)).run,
    "linear-packed": Linear(batch=1, length=62, packed=(17, 1, 32, 12)).run,
    "linear-packed-gates": Linear(batch=1, length=41, packed=(5, 0, 33, 3), gate_heads=4, decay=True, memory=True).run,
    "linear-packed-torch": Linear(
        batch=1, length=41, packed=(0, 5, 33, 3), gate_heads=4, memory=True, implementation="torch"
    ).run,
    "vector-1": Linear(length=1, gate_heads=2, vector=True).run,
    "vector-37-padded": Linear(heads=(4, 2, 1), padded=True, memory=True, gate_heads=4, vector=True, chunk=32).run,
    "vector-123": Linear(batch=1, heads=(1, 1, 1), length=123, dims=(80, 40), gate_heads=1, vector=True, chunk=64).run,
    "vector-decay-cuts": Linear(batch=1, gate_heads=4, vector=True, decay=True, cuts=(20, 1, 16), chunk=32).run,
    "vector-packed": Linear(batch=1, length=41, packed=(5, 0, 33, 3), gate_heads=2, vector=True, memory=True).run,
    "vector-torch": Linear(gate_heads=2, vector=True, padded=True, memory=True, implementation="torch").run,
    "linear-torch-padded": Linear(padded=True, memory=True, implementation="torch").run,
    "linear-torch-gates": Linear(gate_heads=4, decay=True, padded=True, implementation="torch").run,
    "delta-1": Delta(length=1).run,
    "delta-7": Delta(batch=1, heads=(1, 1, 1), state_heads=1, length=7).run,
    "delta-63-padded": Delta(heads=(4, 2, 1), state_heads=2, length=63, padded=True, memory=True, chunk=32).run,
    "delta-123": Delta(batch=1, heads=(2, 1, 1), state_heads=1, length=123, dims=(80, 40), chunk=64).run,
    "delta-cuts": Delta(batch=1, memory=True, cuts=(20, 1, 16)).run,
    "delta-packed": Delta(batch=1, length=41, packed=(5, 0, 33, 3), memory=True).run,
    "delta-same-keys": Delta(batch=1, heads=(1, 1, 1), state_heads=1, length=64, chunk=64, same_keys=True).run,
    "module-hedgehog": Module("hedgehog", record_past=True).run,
    "module-linear": Module("linear").run,
    "module-lightning": Module("lightning", record_past=True).run,
    "module-lightning-kv-head": Module("lightning", options=(("decay", "learned"), ("state_per", "kv_head"))).run,
    "module-gated-delta": Module("gated_delta", record_past=True).run,
    "module-gated-delta-kv-head": Module("gated_delta", options=(("state_per", "kv_head"), *PLAIN)).run,
    "module-gated-vector": Module("gated", record_past=True).run,
    "module-liger-vector": Module("gated", options=(("gate_from", "keys"), *SOFTMAX, ("state_per", "kv_head"))).run,
    "module-gated-scalar": Module("gated", options=(("gate", "scalar"),)).run,
    "module-gated-normalized": Module("gated", options=(("gate", "scalar"), *SOFTMAX), record_past=True).run,
    "module-liger-kv-head": Module("gated", options=(("gate", "scalar"), *LIGER, *SOFTMAX)).run,
}

if __name__ == "__main__":
    answer(CASES)
