"""The hybrid of LoLCATs and its decoding step, interpreted; see `interpreting.py`."""

from dataclasses import dataclass

import torch
from interpreting import Case, Inputs, Module, answer, differentiate, errors, starts
from torch import Tensor

from attnconv.attention_modules import Call, Geometry, Tokens, create
from attnconv.attention_modules.kernels.window_linear.fused import hedgehog_window_linear
from attnconv.attention_modules.kernels.window_linear.hybrid import hybrid_window_linear
from attnconv.attention_modules.linear.lolcats import LOG_STEP


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
    absolute: bool = False

    def run(self) -> dict[str, float]:
        torch.manual_seed(self.length)
        geometry = Geometry(*self.heads, *self.dims)
        options = {"window": self.window, "state_per": self.state_per}
        options |= {"window_terms": "absolute"} if self.absolute else {}
        module = create("lolcats", geometry, **options).double()
        num_keys = self.length + self.past
        inputs = {
            "query": torch.randn(self.batch, self.heads[0], self.length, self.dims[0]),
            "key": torch.randn(self.batch, self.heads[1], num_keys, self.dims[0]),
            "value": torch.randn(self.batch, self.heads[1], num_keys, self.dims[1]),
            # The logarithm of γ where terms are absolute: they range from next to nothing to nearly everything.
            "mixing": torch.randn(self.heads[0]) * (5.0 if self.absolute else 1.0),
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
            weights = {"mixing": x["mixing"] / (LOG_STEP if self.absolute else 1.0)}
            weights |= {f"{name}_map.weight": x[f"{name}_weight"] for name in ("query", "key")}

            def call(_: Tensor) -> Tensor:
                tensors = x["query"], x["key"], x["value"]
                given = Tokens(*tensors[1:], valid)
                if x["query"].dtype == torch.float64:
                    return module.attend_naive(Call(tensors[0], given, 0.3), memory)
                maps: tuple[Tensor, Tensor] = module.query_map.weight, module.key_map.weight
                if not self.fused:
                    maps = module.query_map(tensors[0]), module.key_features(given)
                function = hedgehog_window_linear if self.fused else hybrid_window_linear
                return function(
                    *tensors,
                    *maps,
                    module._gamma(torch.float32),
                    scaling=0.3,
                    window=self.window,
                    absolute=self.absolute,
                    start=start,
                    memory=None if sums is None or norm is None else (sums, norm),
                    chunk=self.chunk,
                )

            module.forward = call  # type: ignore[method-assign]
            out = torch.func.functional_call(module, weights, (x["query"],))
            # What a row of padding gives is of no interest.
            return {"out": out if valid is None else out.masked_fill(~valid[:, None, -self.length :, None], 0.0)}

        return errors(differentiate(attend, inputs, self.dtype), differentiate(attend, inputs, torch.float64))


CASES: dict[str, Case] = {
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
    "hybrid-features-512": Hybrid(heads=(1, 1), length=18, dims=(256, 16), window=5).run,
    "fused-columns-in-parts": Hybrid(heads=(1, 1), length=35, dims=(40, 24), window=9, fused=True).run,
    "hybrid-absolute": Hybrid(batch=2, past=6, window=7, memory=True, padded=True, absolute=True).run,
    "fused-absolute": Hybrid(batch=2, past=6, window=7, memory=True, padded=True, absolute=True, fused=True).run,
    "module-lolcats-absolute": Module("lolcats", options=(("window", 8), ("window_terms", "absolute"))).run,
    "hybrid-absolute-bf16": Hybrid(length=33, memory=True, absolute=True, dtype=torch.bfloat16).run,
    "fused-absolute-bf16": Hybrid(length=33, absolute=True, dtype=torch.bfloat16, fused=True).run,
    "hybrid-bf16": Hybrid(length=33, dtype=torch.bfloat16).run,
    "hybrid-memory-bf16": Hybrid(batch=2, length=45, window=12, memory=True, padded=True, dtype=torch.bfloat16).run,
    "fused-bf16": Hybrid(length=33, dtype=torch.bfloat16, fused=True).run,
    "fused-wide-bf16": Hybrid(heads=(1, 1), length=25, dims=(144, 40), dtype=torch.bfloat16, fused=True).run,
    "hybrid-fp16": Hybrid(length=33, dtype=torch.float16).run,
    "fused-fp16": Hybrid(length=33, past=6, memory=True, dtype=torch.float16, fused=True).run,
}

if __name__ == "__main__":
    answer(CASES)
