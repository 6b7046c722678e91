"""Images as methods see them: some first tokens that are no patches, then a grid of patches row by row."""

import math
from collections.abc import Sequence

from torch import Tensor

Grid = tuple[int, int]


def find_grid(image_tokens: int, prefix_tokens: int, grid: Sequence[int] | None = None) -> Grid | None:
    """Rows and columns of patches.

    Args:
        image_tokens: all tokens of an image.
        prefix_tokens: first ones that are no patches.
        grid: what the rest must be; None for a square.

    Returns:
        None where the rest is no such grid.
    """
    patches = image_tokens - prefix_tokens
    side = math.isqrt(max(patches, 0))
    rows, columns = grid or (side, side)
    return (rows, columns) if min(rows, columns) >= 1 and rows * columns == patches else None


def why_no_grid(
    image_tokens: int | None,
    prefix_tokens: int,
    grid: Sequence[int] | None = None,
    *,
    otherwise: str = "layout to sequence",
) -> str | None:
    """Why the tokens of a model are no such image, None if they are.

    Args:
        image_tokens: see `AttentionContract.why_unsupported_tokens`.
        prefix_tokens: first ones that are no patches.
        grid: what the rest must be; None for a square.
        otherwise: what to set instead of `prefix_tokens`.
    """
    if image_tokens is None:
        return "the model takes no images: set layout to sequence"
    if find_grid(image_tokens, prefix_tokens, grid) is not None:
        return None
    shape = "square image" if grid is None else f"grid of {grid[0]} rows and {grid[1]} columns"
    return (
        f"{image_tokens} tokens without {prefix_tokens} first ones are no {shape}: set prefix_tokens "
        f"to the number of class and register tokens, or {otherwise}"
    )


def refuse_padding(valid: Tensor | None) -> None:
    """Raise if not all tokens of an image are real.

    Raises:
        ValueError: some are padding.
    """
    if valid is not None and not valid.all():
        raise ValueError("an image has no padding: set layout to sequence")
