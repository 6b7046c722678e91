"""Square windows on a grid of patches, moved inwards at its borders: softmax in tiles, and which patches are seen.

Along an axis every `dilation`-th patch belongs to a row of its own; in a row of n the window of patch i are the w
patches from `clamp(i - ⌊w / 2⌋, 0, n - w)` on, so every patch sees exactly w.

Letters in shapes: `B` images, `H` heads, `KV` key/value heads, `P` first tokens that are no patches, `Y` rows and `X`
columns of patches, `D` and `V` sizes of keys and values.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..image_grid import Grid

# Patches along a side of the squares whose keys are gathered together.
TILE = 8


def seen_on_grid(grid: Grid, prefix_tokens: int, window: int, dilation: int, device: torch.device) -> Tensor:
    """`[P + Y * X, P + Y * X]` bool: which tokens each token sees; first ones see all and are seen by all."""
    rows, columns = (_seen_on_axis(side, window, dilation, device) for side in grid)
    patches = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
    return F.pad(patches, (prefix_tokens, 0, prefix_tokens, 0), value=True)


def _seen_on_axis(side: int, window: int, dilation: int, device: torch.device) -> Tensor:
    """`[side, side]` bool."""
    at = torch.arange(side, device=device)
    # Patches of the same residue, and what is where among them.
    residue, number = at % dilation, at // dilation
    length = (side - residue + dilation - 1) // dilation
    start = torch.minimum((number - window // 2).clamp_min(0), length - window)
    inside = (number >= start[:, None]) & (number < start[:, None] + window)
    return inside & (residue == residue[:, None])


def attend_grid(
    query: Tensor, keys: Tensor, values: Tensor, grid: Grid, *, window: int, dilation: int, scaling: float
) -> Tensor:
    """Softmax of patches over those in their windows and the first tokens.

    Args:
        query: `[B, H, Y * X, D]`, of patches alone.
        keys: `[B, H, P + Y * X, D]`.
        values: `[B, H, P + Y * X, V]`.
        grid: rows and columns.
        window: patches along a side of a window; `window * dilation` is no more than either side of the grid.
        dilation: patches from one to the next.
        scaling: factor on query-key products.

    Returns:
        `[B, H, Y * X, V]`.
    """
    patches = grid[0] * grid[1]
    first = [t[:, :, : t.shape[2] - patches] for t in (keys, values)]
    query, keys, values = (t[:, :, t.shape[2] - patches :].unflatten(2, grid) for t in (query, keys, values))
    whole = values.new_empty(*query.shape[:-1], values.shape[-1])
    for row in range(dilation):
        for column in range(dilation):
            apart = (..., slice(row, None, dilation), slice(column, None, dilation), slice(None))
            whole[apart] = _attend_tiles(query[apart], keys[apart], values[apart], first, window, scaling)
    return whole.flatten(2, 3)


class _Strips(NamedTuple):
    """One axis cut into strips of patches, each with the patches that one of them sees at least.

    Attributes:
        queries: `[strips, TILE]` int64; the last patch again behind the end.
        keys: `[strips, n]` int64.
        seen: `[strips, TILE, n]` bool.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor


def _strips(side: int, window: int, device: torch.device) -> _Strips:
    queries = torch.arange(-(-side // TILE) * TILE, device=device).clamp_max(side - 1).view(-1, TILE)
    start = (queries - window // 2).clamp(0, side - window)
    most = min(side, TILE + window - 1)
    keys = start[:, :1].clamp_max(side - most) + torch.arange(most, device=device)
    seen = (keys[:, None] >= start[..., None]) & (keys[:, None] < start[..., None] + window)
    return _Strips(queries, keys, seen)


def _attend_tiles(
    query: Tensor, keys: Tensor, values: Tensor, first: list[Tensor], window: int, scaling: float
) -> Tensor:
    """`[B, H, Y, X, V]` of windows without gaps."""
    batch, side = query.shape[0], query.shape[2:4]
    down, across = (_strips(length, window, query.device) for length in side)
    tiles = len(down.keys), len(across.keys)
    rows = _tiles(query, down.queries, across.queries)
    near_keys, near_values = (
        torch.cat([of_first.repeat_interleave(tiles[0] * tiles[1], 0), _tiles(t, down.keys, across.keys)], 2)
        for t, of_first in zip((keys, values), first, strict=True)
    )
    seen = down.seen[:, None, :, None, :, None] & across.seen[None, :, None, :, None, :]
    mask = F.pad(seen.flatten(4).flatten(2, 3).flatten(0, 1), (first[0].shape[2], 0), value=True)
    mask = mask[:, None].repeat(batch, 1, 1, 1)
    out = F.scaled_dot_product_attention(rows, near_keys, near_values, mask, scale=scaling)
    together = out.view(batch, *tiles, -1, TILE, TILE, out.shape[-1]).permute(0, 3, 1, 4, 2, 5, 6)
    return together.flatten(4, 5).flatten(2, 3)[:, :, : side[0], : side[1]]


def _tiles(tensor: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of `[B, H, Y, X, any]` the patches in each of some strips of either axis: `[B * tiles, H, patches, any]`."""
    taken = tensor[:, :, rows[:, None, :, None], columns[None, :, None, :]]
    tiles: Tensor = taken.flatten(4, 5).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    return tiles
