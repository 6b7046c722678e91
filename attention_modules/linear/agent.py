"""Agent attention: a few pooled queries look at all tokens, and all tokens look at these few."""

import math
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..base import AttentionModule
from ..contract import AttentionOptions, Memory
from ..geometry import Geometry
from ..image_grid import refuse_padding, why_no_grid
from ..paths import leaving_out
from ..registry import register
from ..tokens import Call
from ..window import LOG2E, divide, softmax_terms


class AgentOptions(AttentionOptions):
    """Options of `agent`.

    Attributes:
        num_agents: pooled queries of each head; a square number for images, whose patches are pooled in as many tiles.
        layout: `sequence` for text, or `image` for a square grid of patches.
        prefix_tokens: first tokens of an image that are no patches, such as its class and register tokens; they attend
            and are attended, but are neither pooled nor convolved. No effect on a sequence.
        kernel_size: tokens that the convolution of the values reaches over, in each direction of the layout; odd, or 0
            for none.
    """

    num_agents: int = Field(49, ge=1)
    layout: Literal["sequence", "image"] = "sequence"
    prefix_tokens: int = Field(0, ge=0)
    kernel_size: int = Field(3, ge=0)


@register(
    name="agent",
    options=AgentOptions,
    paper="https://arxiv.org/abs/2312.08874",
    summary="bidirectional attention through a few pooled queries, with a depthwise convolution of the values",
)
class AgentAttention(AttentionModule):
    """`softmax(s Q Aᵀ) softmax(s A Kᵀ) V + conv(V)`, where the agents A are means of the queries over equal parts.

    The n tokens of a sequence are cut into `num_agents` runs (token r is in run `⌊r · num_agents / n⌋`), the patches of
    an image into `√num_agents` by `√num_agents` tiles; parts without a token have no agent. Padding is in no part. The
    depthwise convolution starts at zero. With an agent for each token this is still not softmax attention, for weights
    are then a product of two softmaxes. The agent biases of the published vision models, which belong to one image
    size, are left out.

    Paper: https://arxiv.org/abs/2312.08874
    """

    paths = ("agents", "convolution")

    options: AgentOptions
    kernel: nn.Parameter | None

    def __init__(self, geometry: Geometry, options: AgentOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        self.axes = 2 if options.layout == "image" else 1
        taps = (options.kernel_size,) * self.axes
        kernel = torch.zeros(geometry.num_heads, geometry.value_dim, *taps)
        self.register_parameter("kernel", nn.Parameter(kernel) if options.kernel_size else None)

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """A causal layer, or sizes that no layout has."""
        if geometry.causal:
            return "agent pools over the whole sequence, so it cannot serve a causal layer, which must not look ahead"
        if options.kernel_size and options.kernel_size % 2 == 0:
            return f"kernel_size must be odd, so that a token is in the middle, or 0; it is {options.kernel_size}"
        if options.layout == "image" and math.isqrt(options.num_agents) ** 2 != options.num_agents:
            return f"num_agents must be a square number for images, such as 49; it is {options.num_agents}"
        return None

    @classmethod
    def why_unsupported_tokens(cls, options: Any, image_tokens: int | None) -> str | None:
        """An image layout for what is no image, or not square."""
        if options.layout == "sequence":
            return None
        return why_no_grid(image_tokens, options.prefix_tokens)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The convolution starts at zero."""
        if self.kernel is not None:
            self.kernel.zero_()

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        """All weights written out, and the convolution as a sum of shifted values."""
        tokens = call.tokens
        values = self._repeat(tokens.values)
        out = torch.zeros_like(values)
        if "agents" not in self.left_out:
            units = torch.eye(tokens.length, dtype=values.dtype, device=values.device)
            first, second = self._softmaxes(call, units.expand(*call.query.shape[:2], -1, -1))
            out = second @ first @ values
        kernel = self._kernel(values)
        if kernel is not None:
            grid = self._grid(values, tokens.valid)
            reach, taps = self.options.kernel_size // 2, range(self.options.kernel_size)
            padded = F.pad(grid, (0, 0, *(reach,) * (2 * self.axes)))
            convolved = torch.zeros_like(grid)
            for number, offsets in enumerate(product(taps, repeat=self.axes)):
                part = padded
                for axis, offset in enumerate(offsets):
                    part = part.narrow(2 + axis, offset, grid.shape[2 + axis])
                weight = kernel.flatten(2)[..., number]
                convolved = convolved + part * weight.view(*weight.shape[:1], *(1,) * self.axes, -1)
            out = out + self._from_grid(convolved, values.shape[2])
        return out

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        """Agents first, so that no weights of all pairs of tokens exist."""
        values = self._repeat(call.tokens.values)
        out = torch.zeros_like(values)
        if "agents" not in self.left_out:
            seen, weights = self._softmaxes(call, values)
            out = weights @ seen
        kernel = self._kernel(values)
        if kernel is not None:
            grid = self._grid(values, call.tokens.valid).movedim(-1, 2).flatten(1, 2)
            convolve = F.conv2d if self.axes == 2 else F.conv1d
            taps = kernel.flatten(0, 1).unsqueeze(1)
            convolved = convolve(grid, taps, padding=self.options.kernel_size // 2, groups=len(taps))
            convolved = convolved.unflatten(1, kernel.shape[:2]).movedim(2, -1)
            out = out + self._from_grid(convolved, values.shape[2])
        return out

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        return torch.zeros_like(rank)

    def state_multiply_adds(self) -> int:
        """Each token is seen by the agents, and sees them."""
        agents = 0 if "agents" in self.left_out else 2 * self.options.num_agents
        return agents * self.geometry.num_heads * (self.geometry.head_dim + self.geometry.value_dim)

    def attention_weights(self, *args: Any, **kwargs: Any) -> Tensor:
        """Those of the agents; a convolution has other weights for each channel."""
        if self.kernel is None:
            return super().attention_weights(*args, **kwargs)
        with leaving_out(self, "convolution"):
            return super().attention_weights(*args, **kwargs)

    def _kernel(self, values: Tensor) -> Tensor | None:
        """The weights of the convolution in the dtype of the maths, unless there is none."""
        return None if self.kernel is None or "convolution" in self.left_out else self.kernel.to(values.dtype)

    def _repeat(self, tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(self.geometry.num_groups, 1)

    def _softmaxes(self, call: Call, values: Tensor) -> tuple[Tensor, Tensor]:
        """What each agent sees `[batch, heads, num_agents, dim]`, and each query's weights on the agents."""
        query, keys, valid = call.query, self._repeat(call.tokens.keys), call.tokens.valid
        members = self._parts(query, valid)
        counts = members.sum(-1, keepdim=True)
        agents = (members / counts.clamp_min(1))[:, None].to(query.dtype) @ query
        visible = torch.ones_like(members[:, None, :1], dtype=torch.bool) if valid is None else valid[:, None, None]
        numerator, denominator, *_ = softmax_terms(
            agents @ keys.transpose(-1, -2) * (call.scaling * LOG2E), visible, values
        )
        exists = (counts > 0).transpose(-1, -2)[:, None]
        logits = (query @ agents.transpose(-1, -2) * call.scaling).masked_fill(~exists, torch.finfo(query.dtype).min)
        return divide(numerator, denominator), logits.softmax(-1).masked_fill(~exists, 0.0)

    def _parts(self, query: Tensor, valid: Tensor | None) -> Tensor:
        """`[batch or 1, num_agents, T]` bool: which tokens each agent is the mean of."""
        length, number = query.shape[2], self.options.num_agents
        if self.options.layout == "image":
            side, tiles = self._side(length, valid), math.isqrt(number)
            tile = torch.arange(side, device=query.device) * tiles // side
            part = (tile[:, None] * tiles + tile).flatten()
            part = F.pad(part, (length - side * side, 0), value=-1)[None]
        elif valid is None:
            part = (torch.arange(length, device=query.device) * number // length)[None]
        else:
            rank = valid.cumsum(-1) - 1
            part = (rank * number // valid.sum(-1, keepdim=True).clamp_min(1)).masked_fill(~valid, -1)
        return part[:, None] == torch.arange(number, device=query.device)[:, None]

    def _side(self, length: int, valid: Tensor | None) -> int:
        """Patches along one side of the image."""
        why_unsupported = self.why_unsupported_tokens(self.options, length)
        if why_unsupported is not None:
            raise ValueError(why_unsupported)
        refuse_padding(valid)
        return math.isqrt(length - self.options.prefix_tokens)

    def _grid(self, values: Tensor, valid: Tensor | None) -> Tensor:
        """`[batch, heads, T, dim]` → `[batch, heads, T, dim]` or `[batch, heads, side, side, dim]`, without padding."""
        if self.options.layout == "image":
            side = self._side(values.shape[2], valid)
            patches: Tensor = values[:, :, -side * side :].unflatten(2, (side, side))
            return patches
        return values if valid is None else values.masked_fill(~valid[:, None, :, None], 0.0)

    def _from_grid(self, convolved: Tensor, length: int) -> Tensor:
        """Back to `[batch, heads, T, dim]`, zero at tokens that are no patches."""
        convolved = convolved.flatten(2, -2)
        padded: Tensor = F.pad(convolved, (0, 0, length - convolved.shape[2], 0))
        return padded
