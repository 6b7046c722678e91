"""Softmax over gathered blocks, by itself and inside the methods, interpreted; see `interpreting.py`."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from interpreting import Case, Inputs, Module, answer, differentiate, errors
from torch import Tensor

from attnconv.attention_modules import Geometry, create
from attnconv.attention_modules.kernels.block_gather import decode
from attnconv.attention_modules.kernels.block_gather.gather import block_gather


@dataclass(frozen=True)
class Gather:
    """One call; the oracle adds up every chosen pair, as often as it was chosen."""

    heads: tuple[int, int] = (2, 2)
    length: int = 37
    past: int = 0
    dims: tuple[int, int] = (16, 24)
    block: int = 16
    # Padding at the left of each row.
    padding: tuple[int, ...] = (0,)
    dtype: torch.dtype = torch.float32

    @property
    def total(self) -> int:
        return self.length + self.past

    def choices(self) -> Tensor:
        """The own block, others, one of them twice, holes between them, rows of choices that are empty."""
        generator = torch.Generator().manual_seed(self.length)
        num_blocks = -(-self.total // self.block)
        before = self.past % self.block if set(self.padding) == {0} else self.block - 1
        rows = min(-(-(self.length + before) // self.block), num_blocks)
        indices = torch.full((len(self.padding), self.heads[1], rows, 4), -1)
        for b, padding in enumerate(self.padding):
            first = max(self.past - padding, 0) // self.block
            for h in range(self.heads[1]):
                for r in range(rows):
                    own = min(first + r, num_blocks - 1)
                    others = torch.randperm(own + 1, generator=generator)[: 1 + (h + r) % 2].tolist()
                    chosen = [own, -1, *others] if r % 2 else [own, *others]
                    indices[b, h, r, : len(chosen)] = torch.tensor(chosen)
        # Behind the queries is no block that they see.
        indices[0, 0, 0, 3] = num_blocks - 1
        indices[-1, -1, -1] = -1
        return indices

    def pairs(self, indices: Tensor) -> Tensor:
        """`[B, KV, T, S]`: how often each query has chosen each key."""
        counts = torch.zeros(len(self.padding), self.heads[1], self.length, self.total, dtype=torch.float64)
        for b, padding in enumerate(self.padding):
            first = max(self.past - padding, 0) // self.block
            for t in range(self.length):
                position = self.past - padding + t
                for h in range(self.heads[1]):
                    chosen = indices[b, h, position // self.block - first].tolist() if position >= 0 else []
                    for number in chosen:
                        begin = number * self.block
                        if number >= 0 and begin <= position:
                            end = min(begin + self.block, position + 1)
                            counts[b, h, t, padding + begin : padding + end] += 1
        return counts

    def run(self) -> dict[str, float]:
        torch.manual_seed(self.length)
        batch, (heads, kv_heads), (dim, width) = len(self.padding), self.heads, self.dims
        inputs = {
            "query": torch.randn(batch, heads, self.length, dim),
            "key": torch.randn(batch, kv_heads, self.total, dim),
            "value": torch.randn(batch, kv_heads, self.total, width),
        }
        inputs = {name: t.to(self.dtype) for name, t in inputs.items()}
        indices = self.choices()
        pairs = self.pairs(indices).repeat_interleave(heads // kv_heads, 1)
        start = None if set(self.padding) == {0} else torch.tensor(self.padding, dtype=torch.int32)

        def seen(out: Tensor, log_sum: Tensor) -> dict[str, Tensor]:
            is_empty = pairs.sum(-1) == 0
            assert bool((log_sum[is_empty] == -torch.inf).all())
            return {"out": out, "log_sum": torch.where(is_empty, 0.0, log_sum)}

        def gathered(x: Inputs) -> dict[str, Tensor]:
            tensors = x["query"], x["key"], x["value"]
            return seen(*block_gather(*tensors, indices, scaling=0.3, block=self.block, start=start))

        def oracle(x: Inputs) -> dict[str, Tensor]:
            key, value = (x[name].repeat_interleave(heads // kv_heads, 1) for name in ("key", "value"))
            logits = x["query"] @ key.mT * 0.3
            # A weight of nothing on everything, so that no gradient is 0 / 0.
            is_empty = pairs.sum(-1) == 0
            log_sum = (logits + torch.where(is_empty[..., None], 1.0, pairs).log()).logsumexp(-1)
            weights = pairs * (logits - log_sum[..., None]).exp()
            return seen(weights @ value, log_sum.masked_fill(is_empty, -torch.inf))

        actual = differentiate(gathered, inputs, self.dtype)
        return errors(actual, differentiate(oracle, inputs, torch.float64))


def one_token(*, dims: tuple[int, int], group: int, block: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """One query of two padded rows: holes, a block twice, the last in part, a head without any; a cache with room."""
    torch.manual_seed(block)
    decode.SPAN, start = 32, (0, 9)
    total = 4 * block + 3
    query = torch.randn(2, 2 * group, 1, dims[0]).to(dtype)
    key, value = (torch.randn(2, 2, total + 5, dim).to(dtype)[:, :, :total] for dim in dims)
    indices = torch.tensor([[[[4, -1, 0, 2, 0]], [[4, 1, -1, -1, -1]]], [[[3, 1, -1, 4, 2]], [[-1] * 5]]])
    out = decode.decode_blocks(
        query, key, value, indices, scaling=0.3, block=block, start=torch.tensor(start, dtype=torch.int32)
    )
    expected = torch.zeros(2, 2 * group, 1, dims[1], dtype=torch.float64)
    for b, h in ((0, 0), (0, 1), (1, 0)):
        numbers = [number for number in indices[b, h, 0].tolist() if number >= 0]
        at = torch.cat([torch.arange(number * block, (number + 1) * block) for number in numbers]) + start[b]
        near, mixed = (t[b, h, at[at < total]].double() for t in (key, value))
        heads = slice(h * group, (h + 1) * group)
        expected[b, heads, 0] = (query[b, heads, 0].double() @ near.T * 0.3).softmax(-1) @ mixed
    return errors({"out": out.double()}, {"out": expected})


def tokens_after_a_prompt(method: str, **options: object) -> dict[str, float]:
    """Four tokens one by one, across the end of a block, against the method's oracle; a row of padding among them."""
    outs, geometry, prompt = [], Geometry(3, 1, 16, 24), 30
    for implementation, dtype in (("triton", torch.float32), ("naive", torch.float64)):
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, 3, prompt + 4, 16), (2, 1, prompt + 4, 16), (2, 1, prompt + 4, 24)]
        drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        mask = torch.arange(prompt + 4) >= torch.tensor([[0], [7]])
        mask[0, prompt + 1] = False
        module = create(method, geometry, implementation=implementation, **options)
        state = module.new_state()
        cuts = [0, prompt, *range(prompt + 1, prompt + 5)]
        with torch.no_grad():
            for low, high in pairwise(cuts):
                part = [t[:, :, low:high] for t in drawn]
                out = module(*part, scaling=0.3, padding_mask=mask[:, low:high], state=state)
                outs.append(out.double())
    half = len(outs) // 2
    return errors(*({str(i): out for i, out in enumerate(part)} for part in (outs[:half], outs[half:])))


CASES: dict[str, Case] = {
    "gather-1": Gather(length=1).run,
    "gather-37": Gather().run,
    "gather-past-padded": Gather(heads=(4, 1), past=21, length=30, padding=(7, 40)).run,
    "gather-64-group-3": Gather(heads=(3, 1), length=45, dims=(64, 64), padding=(0, 11)).run,
    "gather-80-group-8": Gather(heads=(8, 1), length=18, dims=(80, 96)).run,
    "gather-96-group-4": Gather(heads=(4, 1), length=19, dims=(96, 32), padding=(3, 0)).run,
    "gather-blocks-of-48": Gather(heads=(1, 1), past=40, length=10, block=48).run,
    "gather-128": Gather(heads=(1, 1), length=35, dims=(128, 128), block=32).run,
    "gather-256": Gather(heads=(1, 1), length=19, dims=(256, 200), padding=(2,)).run,
    "gather-long-blocks": Gather(heads=(1, 1), past=60, length=5, block=128).run,
    "module-xattention": Module("xattention", (21, 20, 1), (("block", 16), ("stride", 4), ("mass", 0.6))).run,
    "module-strided": Module("strided", (19, 9, 1), (("block", 16),)).run,
    "decode-64-group-3": partial(one_token, dims=(64, 64), group=3, block=16),
    "decode-80-blocks-of-5": partial(one_token, dims=(80, 96), group=1, block=5),
    "decode-256-bf16": partial(one_token, dims=(256, 200), group=17, block=8, dtype=torch.bfloat16),
    "decode-xattention": partial(tokens_after_a_prompt, "xattention", block=16, mass=0.6),
    "decode-quest": partial(tokens_after_a_prompt, "quest", block=4, budget=12, prefill="dense"),
    "gather-fp16": Gather(heads=(3, 1), length=33, dtype=torch.float16).run,
    "gather-bf16": Gather(heads=(3, 1), length=33, padding=(2, 5), dtype=torch.bfloat16).run,
}

if __name__ == "__main__":
    answer(CASES)
