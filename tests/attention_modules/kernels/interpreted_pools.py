"""Attention pooled over blocks, interpreted; see `interpreting.py`."""

from dataclasses import dataclass

import torch
from interpreting import Case, answer, errors

from attnconv.attention_modules.kernels.pooled_map.pooled import pooled_map


@dataclass(frozen=True)
class Pool:
    """One call, of some of the rows; the oracle writes out every weight."""

    largest: bool
    heads: tuple[int, int] = (2, 2)
    length: int = 70
    first: int = 0
    last: int = 70
    dim: int = 16
    block: int = 16
    together: int = 16
    dtype: torch.dtype = torch.float32

    def run(self) -> dict[str, float]:
        torch.manual_seed(self.length)
        heads, kv_heads = self.heads
        query = torch.randn(2, heads, self.length, self.dim).to(self.dtype)
        key = torch.randn(2, kv_heads, self.length, self.dim).to(self.dtype)
        part = query[:, :, self.first : self.last]
        sizes = {"block": self.block, "together": self.together, "first": self.first}
        out = pooled_map(part, key, scaling=0.3, largest=self.largest, **sizes)
        logits = query.double() @ key.double().repeat_interleave(heads // kv_heads, 1).mT * 0.3
        later = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)[:, :, self.first : self.last]
        expected = torch.zeros(out.shape, dtype=torch.float64)
        for row, of_row in enumerate(weights.split(self.together, 2)):
            for number, held in enumerate(of_row.split(self.block, 3)):
                whole = held.amax((2, 3)) if self.largest else held.sum((2, 3)) / self.together
                expected[:, :, row, number] = whole
        return errors({"out": out.double()}, {"out": expected})


CASES: dict[str, Case] = {
    "largest-blocks-of-16": Pool(largest=True).run,
    "mass-blocks-of-48-group-3": Pool(largest=False, heads=(3, 1), block=48, together=48).run,
    "largest-64-rows-from-32": Pool(largest=True, dim=64, first=32, last=64, block=32, together=32).run,
    "mass-80-each-query": Pool(largest=False, dim=80, first=5, last=70, together=1).run,
    "largest-128-each-query": Pool(largest=True, heads=(4, 2), length=40, last=40, dim=128, together=1).run,
    "mass-256-blocks-of-64": Pool(largest=False, heads=(2, 1), dim=256, block=64, together=64).run,
    "mass-fp16": Pool(largest=False, dtype=torch.float16).run,
    "largest-bf16": Pool(largest=True, block=64, together=64, dtype=torch.bfloat16).run,
}

if __name__ == "__main__":
    answer(CASES)
