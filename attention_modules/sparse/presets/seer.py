"""SeerAttention: gates on pooled queries and keys, trained to foretell where a frozen layer looks."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ...geometry import Geometry
from ...registry import register
from ..learned import LearnedChoice
from ..options import ChoosingOptions
from ..slots.selectors import TopBlocks, TopMass
from ..slots.slots import By, Slots


class SeerOptions(ChoosingOptions):
    """Options of `seer`.

    Attributes:
        mass: share of what the gate gives to blocks that are not attended anyway, which the chosen ones hold together.
        query: whose queries choose for a block of them: those of the block before, so that a token's output hangs on
            nothing behind it and decoding chooses as prefill does; its own, as published for prompts; its first; or
            each token for itself, as published for decoding.
        gate_dim: entries of a gate's queries and keys, an even number.
        rope_theta: base of the rotary embedding of a gate's queries and keys, best that of the model.
    """

    query: By = "previous"
    gate_dim: int = Field(64, ge=2)
    rope_theta: float = Field(10_000.0, gt=1)


@register(
    name="seer",
    options=SeerOptions,
    paper="https://arxiv.org/abs/2410.13276",
    summary="blocks chosen by trained gates on pooled queries and keys, which foretell where a frozen layer looks",
)
class SeerAttention(LearnedChoice):
    """`logit = s · R(W_q [mean q of each head]) · R(W_k [max k, min k, mean k])`, one gate for a KV head.

    Queries and keys are taken before their rotary embedding; R is one of the gate's own, at the places of blocks. The
    gate starts as the product of the means. SeerAttention-R (https://arxiv.org/abs/2506.08889) is `query: token`.

    Paper: https://arxiv.org/abs/2410.13276
    """

    reads_unrotated = True
    summarized = "unrotated_keys"
    options: SeerOptions

    def __init__(self, geometry: Geometry, options: SeerOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        heads, dim = geometry.num_kv_heads, geometry.head_dim
        self.gate_query = nn.Parameter(torch.empty(heads, geometry.num_groups * dim, options.gate_dim))
        self.gate_key = nn.Parameter(torch.empty(heads, 3 * dim, options.gate_dim))
        # The logarithm of the factor on a gate's products, besides the layer's scaling.
        self.gate_scale = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Gates turn pairs of entries."""
        if options.gate_dim % 2:
            return f"gate_dim={options.gate_dim} is odd, and a rotary embedding turns pairs"
        return super().why_unsupported(geometry, options)

    def make_slots(self) -> Slots:
        options = self.options
        selector = TopMass(0.9 if options.mass is None else options.mass, of_rest=True)
        chosen = selector if options.density is None else TopBlocks(density=options.density)
        return options.slots(selector=chosen, by=options.query)

    def state_bytes(self, batch: int, length: int, dtype: torch.dtype) -> int:
        """Keys before their rotary embedding, besides."""
        unrotated = batch * length * self.geometry.num_kv_heads * self.geometry.head_dim * dtype.itemsize
        return super().state_bytes(batch, length, dtype) + unrotated

    @torch.no_grad()
    def reset_parameters(self) -> None:
        dim, width = self.geometry.head_dim, self.options.gate_dim
        for parameter in (self.gate_query, self.gate_key):
            parameter.normal_(std=0.02 / math.sqrt(parameter.shape[1]))
        # The mean of the group's queries, and the mean key.
        start = torch.eye(dim, width, device=self.gate_query.device)
        self.gate_query.add_(start.repeat(self.geometry.num_groups, 1) / self.geometry.num_groups)
        self.gate_key[:, 2 * dim :].add_(start)
        self.gate_scale.zero_()

    def of_queries(self, queries: Tensor, places: Tensor, scaling: float) -> Tensor:
        mixed = torch.einsum("bkrgd,kgde->bkre", queries.mean(-2), self._query_weights(queries.dtype))
        scale = self.gate_scale.to(queries.dtype).exp()[:, None, None] * scaling
        return (self._turned(mixed, places) * scale).unsqueeze(3)

    def _query_weights(self, dtype: torch.dtype) -> Tensor:
        """`[KV, G, D, E]`."""
        weights: Tensor = self.gate_query.to(dtype).unflatten(1, (self.geometry.num_groups, -1))
        return weights

    def of_keys(self, blocks: Tensor) -> Tensor:
        pooled = torch.cat([blocks.amax(-2), blocks.amin(-2), blocks.mean(-2)], -1)
        return pooled @ self.gate_key.to(blocks.dtype)

    def at_places(self, columns: Tensor) -> Tensor:
        block = self.slots.block
        places = torch.arange(columns.shape[2], device=columns.device).float() * block + (block - 1) / 2
        return self._turned(columns, places[None])

    def logits(self, rows: Tensor, columns: Tensor) -> Tensor:
        return rows.squeeze(3) @ columns.transpose(-1, -2)

    def _turned(self, vectors: Tensor, places: Tensor) -> Tensor:
        """`[B, KV, any, E]` with the rotary embedding of `places` `[B or 1, any]`."""
        half = self.options.gate_dim // 2
        powers = torch.arange(half, device=vectors.device) / half
        angles = places[:, None, :, None] * self.options.rope_theta**-powers
        cos, sin = (t.to(vectors.dtype) for t in (angles.cos(), angles.sin()))
        first, second = vectors[..., :half], vectors[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
