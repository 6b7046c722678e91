"""Sparse attention with a linear remainder: what no choice sees one by one is seen through sums."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...contract import Memory
from ...geometry import Geometry
from ...linear.base import STRETCH
from ...linear.chunked import add_memory, linear_sums, memory_terms
from ...linear.feature_maps import FEATURE_MAPS, FeatureMap, FeatureMapName
from ...registry import register
from ...state import AttentionState
from ...tokens import Call
from ...window import divide
from ..base import SparseAttention
from ..options import ChoosingOptions
from ..slots.canvas import Canvas, with_values
from ..slots.scorers import Means
from ..slots.slots import Slots

# What a state calls the sums over the tokens that were not chosen.
REST = {"key_values": "rest_key_values", "normalizer": "rest_normalizer"}


class SparseLinearOptions(ChoosingOptions):
    """Options of `sparse_linear`.

    Attributes:
        query: whose queries choose for a block of them: those of the block before, so that a token's output hangs on
            nothing behind it and decoding chooses as prefill does; or its own, as published.
        feature_map: which φ of the linear part.
        feature_dim: columns of the projection inside φ; None = head_dim, for `taylor` 16.
        mixing: start of the linear part's share of the output, in (0, 1); learned per head.
    """

    query: Literal["previous", "block"] = "previous"
    feature_map: FeatureMapName = "hedgehog"
    feature_dim: int | None = Field(None, ge=1)
    mixing: float = Field(0.05, gt=0, lt=1)


@register(
    name="sparse_linear",
    options=SparseLinearOptions,
    paper="https://arxiv.org/abs/2509.24006",
    summary="exact softmax over chosen blocks and linear attention over all others, in learned shares",
)
class SparseLinearAttention(SparseAttention):
    """`(1 - m) · softmax over the chosen blocks + m · φ(q) Σ φ(k) vᵀ / φ(q) Σ φ(k)`, sums over the blocks not chosen.

    Blocks are chosen by the product of the means of queries and keys. The share `m = sigmoid(mixing)` of each head is
    that of SLA2 (https://arxiv.org/abs/2602.12675) instead of the projection behind the linear part of SLA, so that the
    output stays a mean of the values. As in SPLA (https://arxiv.org/abs/2601.22379) no block is left out of both parts.
    A query all of whose blocks were chosen has the exact part alone.

    Paper: https://arxiv.org/abs/2509.24006
    """

    options: SparseLinearOptions
    paths = ("blocks", "linear")

    def __init__(self, geometry: Geometry, options: SparseLinearOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        dim = options.feature_dim or FEATURE_MAPS[options.feature_map].default_dim or geometry.head_dim
        self.query_map, self.key_map = (
            FeatureMap(options.feature_map, heads, geometry.head_dim, dim, "identity")
            for heads in (geometry.num_heads, geometry.num_kv_heads)
        )
        self.mixing = nn.Parameter(torch.empty(geometry.num_heads))
        self._reset_mixing()

    def make_slots(self) -> Slots:
        return self.options.slots(scorer=Means(), selector=self.options.selector, by=self.options.query)

    @torch.no_grad()
    def _reset_mixing(self) -> None:
        self.mixing.fill_(math.log(self.options.mixing / (1 - self.options.mixing)))

    def reset_parameters(self) -> None:
        for part in (self.query_map, self.key_map):
            part.reset_parameters()
        self._reset_mixing()

    def state_multiply_adds(self) -> int:
        if "linear" in self.left_out:
            return 0
        return self.geometry.num_heads * self._features * (self.geometry.value_dim + 1)

    @property
    def _features(self) -> int:
        return self.key_map.output_dim

    def naive_with_rest(self, out: Tensor, call: Call, chosen: Tensor) -> Tensor:
        tokens = call.tokens
        behind = torch.ones(call.length, tokens.length, dtype=torch.bool, device=out.device).tril(call.past)
        rest = ~chosen & behind & tokens.real[:, None, None]
        keys, values, rest = (
            t.repeat_interleave(self.geometry.num_groups, 1) for t in (self.key_map(tokens.keys), tokens.values, rest)
        )
        weights = (self.query_map(call.query) @ keys.transpose(-1, -2)).masked_fill(~rest, 0.0)
        return self._mixed(out, weights @ values, weights.sum(-1, keepdim=True))

    def with_rest(self, out: Tensor, call: Call, canvas: Canvas, keep: Tensor) -> Tensor:
        """By sums of each block; letters: those of `canvas`, and `F` features."""
        call, canvas = with_values(call, canvas)
        column = torch.arange(canvas.num_blocks, device=keep.device)
        rest = ((column < canvas.number[..., None])[:, None] & ~keep).to(call.query.dtype)
        # `[B, KV, N, F, V]` and `[B, KV, N, F]`; only whole blocks are before that of a query.
        features = self.key_map(canvas.keys.flatten(2, 3)).unflatten(2, canvas.keys.shape[2:4])
        sums, normalizer = features.transpose(-1, -2) @ canvas.values, features.sum(-2)
        sums, normalizer = (rest @ sums.flatten(3)).unflatten(3, sums.shape[3:]), rest @ normalizer
        rows = canvas.query_blocks(self.query_map(call.query))
        terms = rows @ sums[:, :, :, None], rows @ normalizer[:, :, :, None, :, None]
        return self._mixed(out, *(canvas.unblock(term, call.length) for term in terms))

    def _mixed(self, out: Tensor, linear: Tensor, weight: Tensor) -> Tensor:
        """Both parts: `[B, heads, T, V]` each, the second still to be divided by `weight` `[B, heads, T, 1]`."""
        share = self.mixing.to(linear.dtype).sigmoid()[:, None, None]
        if "linear" in self.left_out:
            share = torch.zeros_like(share)
        if "blocks" in self.left_out:
            share, out = torch.ones_like(share), torch.zeros_like(out)
        share = share.masked_fill(weight == 0, 0.0)
        return ((1 - share) * out + share * divide(linear, weight)).to(out.dtype)

    @torch.no_grad()
    def _choice_of_one(self, call: Call, state: AttentionState, count: Tensor, number: Tensor) -> Tensor:
        """With the sums over the rest, which hold for as long as the choice: one look at all tokens for a block."""
        keep = super()._choice_of_one(call, state, count, number)
        dtype, tokens = torch.promote_types(call.query.dtype, torch.float32), call.tokens
        place = torch.arange(tokens.length, device=keep.device) - (tokens.length - count)[:, None]
        block = (place // self.slots.block).clamp_min(0)
        is_rest = ((place >= 0) & (block < number[:, None]))[:, None] & ~keep.squeeze(2).gather(
            -1, block[:, None].expand(-1, keep.shape[1], -1)
        )
        sums: Memory = {}
        for start in range(0, tokens.length, STRETCH):
            part = tokens.part(start, start + STRETCH).to(dtype)
            features = self.key_map(part.keys) * is_rest[:, :, start : start + STRETCH, None]
            sums = add_memory(sums, linear_sums(features, part.values))
        state.memory.update({REST[name]: total for name, total in sums.items()})
        return keep

    def one_with_rest(self, out: Tensor, call: Call, state: AttentionState) -> Tensor:
        sums = {name: state.memory[kept] for name, kept in REST.items()}
        return self._mixed(out, *memory_terms(self.query_map(call.query.to(sums["normalizer"].dtype)), sums))
