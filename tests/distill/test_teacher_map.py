"""Attention pooled over blocks, against attention written out; and what it holds at a time."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnconv.distill.teacher_map import pooled_attention

BLOCK, SCALING = 8, 0.3


def drawn(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, n, length, 16, generator=generator, dtype=torch.float64) for n in (4, 2))
    return 2 * query, key


def written_out(query: Tensor, key: Tensor, together: int, pooling: str) -> Tensor:
    length = query.shape[2]
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * SCALING
    weights = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    out = torch.zeros(1, 2, -(-length // together), -(-length // BLOCK), dtype=torch.float64)
    for head in range(4):
        for row in range(out.shape[2]):
            for block in range(out.shape[3]):
                part = weights[0, head, row * together : (row + 1) * together, block * BLOCK : (block + 1) * BLOCK]
                out[0, head // 2, row, block] += part.max() if pooling == "max" else part.sum() / together
    return out


@pytest.mark.parametrize("length", [5, 24, 61])
@pytest.mark.parametrize("together", [1, BLOCK])
@pytest.mark.parametrize("pooling", ["max", "mass"])
def test_it_is_the_attention_of_blocks(length: int, together: int, pooling: str) -> None:
    query, key = drawn(length)
    wanted = written_out(query, key, together, pooling)
    num_rows = wanted.shape[2]
    parts = [
        pooled_attention(
            query, key, scaling=SCALING, block=BLOCK, together=together, rows=range(start, stop), pooling=pooling
        )
        for start, stop in ((0, num_rows // 2), (num_rows // 2, num_rows))
        if stop > start
    ]
    torch.testing.assert_close(torch.cat(parts, 2), wanted)


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_is_as_large_as_all_queries_by_all_keys() -> None:
    query, key = drawn(256)
    with Largest() as largest:
        pooled_attention(query, key, scaling=SCALING, block=BLOCK, together=BLOCK, rows=range(20, 22), pooling="max")
    assert largest.numel <= max(query.numel(), 4 * 2 * BLOCK * 256) < 256 * 256
