"""One new token that chooses a fixed number of pages for itself, where no row is padded: in as few steps as it takes.

The same as a choice among blocks in general, which costs more than the attention itself at some thousand tokens: here
every page before the own one is whole and seen, so nothing is masked, and pages are read as one vector each.
"""

import torch
from torch import Tensor

from ...tokens import Tokens
from ..slots.scorers import PrefixScorer
from ..slots.selectors import Forced


def choose_pages(
    scorer: PrefixScorer,
    query: Tensor,
    tokens: Tokens,
    columns: Tensor,
    *,
    block: int,
    most: int,
    forced: Forced,
    scaling: float,
) -> Tensor:
    """The pages before the own one with the largest shares.

    Args:
        scorer: with one column for a page.
        query: `[B, heads, 1, D]`, fp32 or fp64.
        tokens: all that are held, none of them padding, that of the query last.
        columns: `[B, KV, n, E]` at least of all pages before the own one.
        block: tokens of a page.
        most: how many pages are attended, the own one included.
        forced: pages that are among them.
        scaling: factor on query-key products.

    Returns:
        `[B, KV, K]` int64, in any order.
    """
    number = (tokens.length - 1) // block
    wanted = min(number, max(most, int(forced.number_of(torch.tensor(number)))) - 1)
    rows = scorer.of_queries(query).squeeze(2).unflatten(1, (columns.shape[1], -1))
    part = tokens.keys[:, :, number * block :].to(query.dtype)
    both = columns[:, :, :number], scorer.of_prefixes(part)[..., -1:, :]
    logits = torch.cat([rows @ some.transpose(-1, -2) for some in both], -1)
    shares = (logits * (scaling * scorer.factor)).softmax(-1).mean(2)[..., :number]
    # More than any share is.
    shares[..., : forced.sinks] = 2.0
    shares[..., max(number - forced.local, 0) :] = 2.0
    return shares.topk(wanted, -1, sorted=False).indices


def attend_pages(query: Tensor, tokens: Tokens, pages: Tensor, *, block: int, scaling: float) -> Tensor:
    """Exact softmax over some pages and the part of the own one that is there.

    Args:
        query: `[B, heads, 1, D]`.
        tokens: as above.
        pages: `[B, KV, K]` int64, before the own one, each once.
        block: tokens of a page.
        scaling: factor on query-key products.

    Returns:
        `[B, heads, 1, V]`.
    """
    start = (tokens.length - 1) // block * block
    dtype = torch.promote_types(tokens.keys.dtype, tokens.values.dtype)
    keys, values = (_with_own(t, pages, start, block).to(dtype) for t in (tokens.keys, tokens.values))
    rows = query.to(dtype).unflatten(1, (keys.shape[1], -1)).squeeze(3)
    logits = (rows @ keys.transpose(-1, -2)).to(torch.promote_types(dtype, torch.float32)) * scaling
    out: Tensor = logits.softmax(-1).to(dtype) @ values
    return out.flatten(1, 2).unsqueeze(2)


def _with_own(tensor: Tensor, pages: Tensor, start: int, block: int) -> Tensor:
    """`[B, KV, S, D]` → `[B, KV, K * block + tokens from start on, D]`."""
    batch, heads, _, size = tensor.shape
    parts = [
        part
        for own, at in zip(tensor.flatten(0, 1), pages.flatten(0, 1), strict=True)
        for part in (own[:start].view(-1, block * size).index_select(0, at).view(-1, size), own[start:])
    ]
    return torch.cat(parts).view(batch, heads, -1, size)
