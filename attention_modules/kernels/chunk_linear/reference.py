"""What the kernels compute, in plain torch: chunk after chunk, for tensors that no kernel takes."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Terms = tuple[Tensor, Tensor]


def packed_linear_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor | None,
    memory: Terms | None,
    cu_seqlens: Tensor,
    chunk: int,
) -> tuple[Terms, Terms]:
    """The same as `chunk_linear` for several sequences in one row, one after the other."""
    results = []
    for row, (first, end) in enumerate(pairwise(cu_seqlens.tolist())):
        tensors = query[:, :, first:end], key[:, :, first:end], value[:, :, first:end]
        decay = None if gates is None else gates[:, :, first:end]
        past = None if memory is None else (memory[0][row : row + 1], memory[1][row : row + 1])
        results.append(chunk_linear_torch(*tensors, decay, None, past, chunk))
    (numerators, denominators), (sums, norms) = (zip(*parts, strict=True) for parts in zip(*results, strict=True))
    return (torch.cat(numerators, 2), torch.cat(denominators, 2)), (torch.cat(sums), torch.cat(norms))


def chunk_linear_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor | None,
    start: Tensor | None,
    memory: Terms | None,
    chunk: int,
) -> tuple[Terms, Terms]:
    """The same as `chunk_linear`, with the log decay of every token in `gates`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads, length = query.shape[1:3]
    state_heads = max(key.shape[1], 0 if gates is None else gates.shape[1])
    if start is not None:
        padding = torch.arange(length, device=key.device) < start[:, None]
        key = key.masked_fill(padding[:, None, :, None], 0.0)
    queries = query.to(dtype).unflatten(1, (state_heads, heads // state_heads))
    keys = key.to(dtype).repeat_interleave(state_heads // key.shape[1], 1)
    # A last column of ones makes the denominator one more column of the numerator.
    values = F.pad(value.to(dtype), (0, 1), value=1.0).repeat_interleave(state_heads // value.shape[1], 1)
    decay = keys.new_zeros(*keys.shape[:3], 1) if gates is None else gates.to(dtype)
    decay = decay if decay.dim() == 4 else decay[..., None]
    state = keys.new_zeros(*keys.shape[:2], keys.shape[-1], values.shape[-1])
    if memory is not None:
        state = torch.cat([memory[0], memory[1][..., None]], -1).to(dtype)
    # The first has no tokens, for a packed sequence may be empty.
    outs = [values.new_empty(*queries.shape[:3], 0, values.shape[-1])]
    # With a gate for each channel a chunk costs its length times as much as its keys.
    chunk = chunk if gates is None or gates.ndim == 3 else min(chunk, 16)
    for first in range(0, length, chunk):
        here = slice(first, first + chunk)
        q, k, v, total = queries[:, :, :, here], keys[:, :, here], values[:, :, here], decay[:, :, here].cumsum(2)
        size = k.shape[2]
        causal = torch.ones(size, size, dtype=torch.bool, device=k.device).tril()[..., None]
        between = (total[..., :, None, :] - total[..., None, :, :]).masked_fill(~causal, -torch.inf).exp()
        if gates is not None and gates.ndim == 4:
            weights = torch.einsum("bhgid,bhjd,bhijd->bhgij", q, k, between)
        else:
            weights = q @ k[:, :, None].transpose(-1, -2) * between[:, :, None, ..., 0]
        past = q * total.exp()[:, :, None]
        outs.append(weights @ v[:, :, None] + past @ state[:, :, None])
        left = (total[:, :, -1:] - total).exp()
        state = state * total[:, :, -1, :, None].exp() + (k * left).transpose(-1, -2) @ v
    out = torch.cat(outs, 3).flatten(1, 2)
    return (out[..., :-1].to(query.dtype), out[..., -1]), (state[..., :-1], state[..., -1])
