"""Neighborhood attention along a sequence or on a grid of patches: a window with gaps, exact softmax inside."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..base import AttentionModule
from ..contract import AttentionOptions, Memory
from ..geometry import Geometry
from ..image_grid import Grid, find_grid, refuse_padding, why_no_grid
from ..registry import register
from ..tokens import Call, Tokens
from ..window import LOG2E, softmax_terms, windowed_softmax
from .grid_windows import attend_grid, seen_on_grid


class NeighborhoodOptions(AttentionOptions):
    """Options of `neighborhood`.

    Attributes:
        window: neighbours attended, the token itself included; when not causal, as many on either side. Of an image the
            patches along a side of the square that is attended, an odd number.
        dilation: tokens, or patches, from one neighbour to the next; 1 is a window without gaps.
        layout: `sequence` for text, or `image` for a grid of patches.
        grid: rows and columns of patches of an image; null for a square. No effect on a sequence.
        prefix_tokens: first tokens of an image that are no patches, such as its class and register tokens; they attend
            and are attended by all. No effect on a sequence.
    """

    window: int = Field(256, ge=1)
    dilation: int = Field(4, ge=1)
    layout: Literal["sequence", "image"] = "sequence"
    grid: tuple[int, ...] | None = Field(None, min_length=2, max_length=2)
    prefix_tokens: int = Field(0, ge=0)


@register(
    name="neighborhood",
    options=NeighborhoodOptions,
    paper="https://arxiv.org/abs/2209.15001",
    summary="a window over every n-th token or patch of a grid, exact softmax inside; training-free",
)
class NeighborhoodAttention(AttentionModule):
    """Softmax over the tokens `i - dilation·n`, `0 ≤ n < window`, and those ahead where a layer looks both ways.

    Each of `dilation` interleaved sequences is a sliding window of its own, so time and memory are linear in the
    length. At the ends of a sequence there are fewer neighbours; they are not made up for on the other side.

    On a grid of patches (`layout: image`) each one attends `window` by `window` patches around it, at its borders the
    square that is nearest, and the first tokens.

    Paper: https://arxiv.org/abs/2209.15001
    """

    options: NeighborhoodOptions

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """An image in a causal layer, or a window that has no middle."""
        if options.layout == "sequence":
            return None
        if geometry.causal:
            return "layout: image looks both ways, so it cannot serve a causal layer, which must not look ahead"
        if options.window % 2 == 0:
            return f"window must be odd for images, so that a patch is in the middle; it is {options.window}"
        return None

    @classmethod
    def why_unsupported_tokens(cls, options: Any, image_tokens: int | None) -> str | None:
        """An image layout for what is no image, or not of the grid, or smaller than a window."""
        if options.layout == "sequence":
            return None
        first, otherwise = options.prefix_tokens, "grid to the rows and columns of patches"
        why = why_no_grid(image_tokens, first, options.grid, otherwise=otherwise)
        grid = None if image_tokens is None else find_grid(image_tokens, first, options.grid)
        if grid is None:
            return why
        span = options.window * options.dilation
        if span <= min(grid):
            return None
        return (
            f"window={options.window} at dilation={options.dilation} spans {span} patches, but the image has "
            f"{grid[0]} rows and {grid[1]} columns of them: choose less"
        )

    @property
    def tail_tokens(self) -> int:
        """From the farthest neighbour of the next token on."""
        return (self.options.window - 1) * self.options.dilation

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        first = self.options.prefix_tokens
        if self.options.layout == "image":
            return torch.where(rank > first, first + self.options.window**2, total)
        most, dilation = self.options.window - 1, self.options.dilation
        behind = ((rank - 1) // dilation).clamp_max(most)
        return behind + 1 if self.geometry.causal else behind + 1 + ((total - rank) // dilation).clamp_max(most)

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        keys, values = self._repeated(call)
        logits = call.query @ keys.transpose(-1, -2) * (call.scaling * LOG2E)
        numerator, denominator, _ = softmax_terms(logits, self._visible(call), values)
        return numerator / denominator.clamp_min(torch.finfo(numerator.dtype).tiny)

    def _visible(self, call: Call) -> Tensor:
        """`[B or 1, 1, T, S]` bool: which tokens each query attends."""
        options, tokens, device = self.options, call.tokens, call.query.device
        if options.layout == "image":
            grid = self._grid(call)
            return seen_on_grid(grid, options.prefix_tokens, options.window, options.dilation, device)[None, None]
        query = torch.arange(call.past, tokens.length, device=device)
        distance = query[:, None] - torch.arange(tokens.length, device=device)
        near = (distance.abs() < options.window * options.dilation) & (distance % options.dilation == 0)
        near = near & (distance >= 0) if self.geometry.causal else near
        return (near & tokens.real[:, None, :])[:, None]

    def _repeated(self, call: Call) -> tuple[Tensor, Tensor]:
        """Keys and values of each query head."""
        groups, tokens = self.geometry.num_groups, call.tokens
        return tokens.keys.repeat_interleave(groups, 1), tokens.values.repeat_interleave(groups, 1)

    def _grid(self, call: Call) -> Grid:
        """Rows and columns of an image's patches.

        Raises:
            ValueError: the tokens are none.
        """
        why = self.why_unsupported_tokens(self.options, call.tokens.length)
        grid = find_grid(call.tokens.length, self.options.prefix_tokens, self.options.grid)
        if why is not None or grid is None:
            raise ValueError(why)
        refuse_padding(call.tokens.valid)
        return grid

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        """Windows of interleaved sequences, counted from the newest token, which all rows end with."""
        if self.options.layout == "image":
            return self._attend_image(call)
        dilation, tokens = self.options.dilation, call.tokens
        valid = None if tokens.valid is None and tokens.length % dilation == 0 else tokens.real
        if valid is not None:
            valid = _interleaved(valid[:, None, :, None], dilation)[:, 0, :, 0]
        apart = Tokens(_interleaved(tokens.keys, dilation), _interleaved(tokens.values, dilation), valid)
        numerator, denominator, _ = windowed_softmax(
            call.over(_interleaved(call.query, dilation), apart),
            window=self.options.window,
            causal=self.geometry.causal,
        )
        out = numerator / denominator.clamp_min(torch.finfo(numerator.dtype).tiny)
        together: Tensor = out.unflatten(0, (dilation, -1)).movedim(0, 3).flatten(2, 3)
        return together[:, :, together.shape[2] - call.length :]

    def _attend_image(self, call: Call) -> Tensor:
        """The first tokens over all, patches in tiles."""
        options, grid, (keys, values) = self.options, self._grid(call), self._repeated(call)
        first, patches = call.query.tensor_split([options.prefix_tokens], 2)
        of_patches = attend_grid(
            patches, keys, values, grid, window=options.window, dilation=options.dilation, scaling=call.scaling
        )
        of_first = F.scaled_dot_product_attention(first, keys, values, scale=call.scaling)
        return torch.cat([of_first, of_patches], 2)


def _interleaved(tensor: Tensor, dilation: int) -> Tensor:
    """`[B, heads, S, D]` → `[dilation * B, heads, S / dilation, D]`, with nothing in front where S is no multiple."""
    length = tensor.shape[2]
    tensor = F.pad(tensor, (0, 0, -length % dilation, 0))
    apart: Tensor = tensor.unflatten(2, (-1, dilation)).movedim(3, 0).flatten(0, 1)
    return apart
