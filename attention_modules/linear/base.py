"""What linear methods share: feature maps on queries and keys, and running sums as their memory."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..base import AttentionModule
from ..contract import AttentionOptions, Memory
from ..geometry import Geometry
from ..kernels.selection import needs_package, problem_with, use_chunks
from ..state import AttentionState
from ..tokens import Call, Tokens
from .chunked import add_memory, linear_sums
from .feature_maps import FEATURE_MAPS, FeatureMap, FeatureMapName, Initialization

# Tokens folded at a time: their features in fp32, several times as large as keys, are there together.
STRETCH = 4096


class LinearOptions(AttentionOptions):
    """Options of a method with feature maps.

    Attributes:
        feature_map: which φ; the two hedgehog forms are different functions.
        feature_dim: columns of the projection inside φ; None = head_dim, for `taylor` 16.
        state_per: `query_head` learns a key map and keeps a state per query head (the published form), `kv_head` one
            per key/value head, which divides the state by the number of heads that share one.
        initialization: start of the projections.
    """

    feature_map: FeatureMapName = "hedgehog"
    feature_dim: int | None = Field(None, ge=1)
    state_per: Literal["query_head", "kv_head"] = "query_head"
    initialization: Initialization = "identity"


class LinearAttentionModule(AttentionModule):
    """Base of the methods that keep `Σ φ(k) vᵀ` and `Σ φ(k)`."""

    rounds_products = True

    def __init__(
        self, geometry: Geometry, options: LinearOptions, implementation: str = "auto", *, projected: bool = True
    ) -> None:
        super().__init__(geometry, options, implementation)
        self.key_heads = geometry.num_heads if options.state_per == "query_head" else geometry.num_kv_heads
        feature_dim = geometry.head_dim
        if projected:
            feature_dim = options.feature_dim or FEATURE_MAPS[options.feature_map].default_dim or feature_dim

        def feature_map(heads: int) -> FeatureMap:
            sizes = heads, geometry.head_dim, feature_dim
            return FeatureMap(options.feature_map, *sizes, options.initialization, projected=projected)

        self.query_map = feature_map(geometry.num_heads)
        self.key_map = feature_map(self.key_heads)

    def reset_parameters(self) -> None:
        """Start the feature maps again."""
        self.query_map.reset_parameters()
        self.key_map.reset_parameters()

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Running sums of one sequence."""
        features = self.key_map.output_dim
        return {
            "key_values": (self.key_heads, features, self.geometry.value_dim),
            "normalizer": (self.key_heads, features),
        }

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        return torch.zeros_like(rank)

    def state_multiply_adds(self) -> int:
        if "linear" in self.left_out:
            return 0
        sums = self.key_map.output_dim * (self.geometry.value_dim + 1)
        return sums * (self.geometry.num_heads + self.key_heads)

    def key_features(self, tokens: Tokens) -> Tensor:
        """φ(k) `[batch, key_heads, S, feature_dim]`, zero where padding stands."""
        keys, valid = tokens.keys, tokens.valid
        repeats = self.key_heads // self.geometry.num_kv_heads
        features: Tensor = self.key_map(keys.repeat_interleave(repeats, 1) if repeats > 1 else keys)
        return features if valid is None else features.masked_fill(~valid[:, None, :, None], 0.0)

    def absorb(self, tokens: Tokens, memory: Memory) -> Memory:
        """Add tokens to the running sums, a stretch at a time."""
        for start in range(0, tokens.length, STRETCH):
            now = tokens.part(start, start + STRETCH)
            memory = add_memory(memory, linear_sums(self.key_features(now), now.values))
        return memory

    def absorb_in_place(self, tokens: Tokens, memory: Memory) -> None:
        """Add one token of every row to running sums that belong to nobody else; arguments as for `absorb`."""
        sums, normalizer = memory["key_values"], memory["normalizer"]
        features = self.key_features(tokens)
        rows = tokens.values.flatten(0, 1)
        sums.view(len(rows), -1, rows.shape[-1]).baddbmm_(features.reshape(len(rows), -1, 1), rows)
        normalizer.add_(features.squeeze(2))

    def memory_of(self, state: AttentionState, like: Tensor) -> Memory:
        """The running sums of a state, zeros in the dtype of `like` `[batch, ...]` while there are none."""
        if not state.memory:
            shapes = self.memory_shapes()
            state.memory = {name: like.new_zeros(len(like), *shape) for name, shape in shapes.items()}
        return state.memory

    @needs_package
    def runs_in_triton(self, call: Call) -> bool:
        """Whether the Triton kernels serve a call.

        Raises:
            ValueError: they were asked for and cannot.
        """
        dims = self.geometry.head_dim, self.geometry.value_dim
        tensors = call.query, call.tokens.keys, call.tokens.values
        problem = problem_with(*tensors, dims=dims, features=self.key_map.output_dim)
        return use_chunks(self.implementation, self.without_kernels() or problem, call.query)

    def without_kernels(self) -> str | None:
        """Why no kernel serves this layer whatever the call, or None."""
        return None if self.geometry.causal else "the layer looks both ways"

    def naive_products(self, call: Call) -> tuple[Tensor, Tensor]:
        """φ(q) `[batch, num_heads, T, feature_dim]` and all products φ(q)·φ(k) `[batch, num_heads, T, S]`."""
        features: Tensor = self.query_map(call.query)
        key_features = self.key_features(call.tokens)
        key_features = key_features.repeat_interleave(self.geometry.num_heads // self.key_heads, 1)
        return features, features @ key_features.transpose(-1, -2)

    def repeat_values(self, values: Tensor) -> Tensor:
        """`[batch, num_kv_heads, S, value_dim]` → `[batch, num_heads, S, value_dim]`, for the naive form only."""
        return values.repeat_interleave(self.geometry.num_groups, 1)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """`[num_queries, num_keys]` bool, queries standing at the right end of the keys."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
