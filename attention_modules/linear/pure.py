"""Linear attention without exact tokens beside it: `hedgehog` and `linear`."""

from abc import abstractmethod

import torch
from torch import Tensor

from ..contract import Memory
from ..kernels.chunk_linear.forward import chunk_linear
from ..kernels.selection import in_one_dtype, needs_package
from ..padding import padding_before
from ..state import AttentionState, Mixed
from .base import LinearAttentionModule, causal_mask
from .chunked import SEGMENT, causal_linear, linear_sums, memory_terms


class PureLinearModule(LinearAttentionModule):
    """`Σ φ(q_i)·φ(k_j) v_j` and `Σ φ(q_i)·φ(k_j)` over `j ≤ i`, or over all j when not causal."""

    implementations = ("auto", "naive", "torch", "triton")

    @property
    def tail_tokens(self) -> int:
        """Nothing is kept exactly."""
        return 0

    @abstractmethod
    def combine(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """What becomes of the two sums, `[..., T, value_dim]` and `[..., T, 1]`."""

    def attend_naive(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, memory: Memory
    ) -> Tensor:
        """All products written out."""
        features, weights = self.naive_products(query, keys, valid)
        if self.geometry.causal:
            weights = weights.masked_fill(~causal_mask(weights.shape[-2], weights.shape[-1], query.device), 0.0)
        numerator, denominator = weights @ self.repeat_values(values), weights.sum(-1, keepdim=True)
        if memory:
            past_numerator, past_denominator = memory_terms(features, memory)
            numerator, denominator = numerator + past_numerator, denominator + past_denominator
        return self.combine(numerator, denominator)

    def attend_torch(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, memory: Memory
    ) -> Tensor | Mixed:
        """Chunked."""
        if not self.geometry.causal:
            memory = linear_sums(self.key_features(keys, valid), values)
            return self.combine(*memory_terms(self.query_map(query), memory))
        past = keys.shape[2] - query.shape[2]
        if past:
            memory = self.absorb(
                memory, keys[:, :, :past], values[:, :, :past], None if valid is None else valid[:, :past]
            )
        outs = []
        for start in range(0, query.shape[2], SEGMENT):
            now = slice(past + start, past + start + SEGMENT)
            key_features = self.key_features(keys[:, :, now], None if valid is None else valid[:, now])
            features = self.query_map(query[:, :, start : start + SEGMENT])
            terms, memory = causal_linear(features, key_features, values[:, :, now], memory)
            outs.append(self.combine(*terms))
        return Mixed(torch.cat(outs, 2), memory, keys.shape[2])

    def decode_torch(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float, state: AttentionState
    ) -> Tensor:
        """Sums are added to, then read."""
        state.ring(0, key, value, valid).advance(valid)
        memory = self.memory_of(state, query)
        self.absorb_in_place(memory, key.to(query.dtype), value.to(query.dtype), valid)
        return self.combine(*memory_terms(self.query_map(query), memory))

    @needs_package
    def attend_triton(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        valid: Tensor | None,
        scaling: float,
        memory: Memory,
        **signals: Tensor,
    ) -> Mixed | None:
        """Chunked in Triton, on features mapped before it."""
        query, keys, values = in_one_dtype(query, keys, values)
        if not self.runs_in_triton(query, keys, values):
            return None
        exact = torch.promote_types(query.dtype, torch.float32)
        folded, past = keys.shape[2], keys.shape[2] - query.shape[2]
        if past:
            leaving = keys[:, :, :past].to(exact), values[:, :, :past].to(exact)
            memory = self.absorb(memory, *leaving, None if valid is None else valid[:, :past])
            keys, values, valid = keys[:, :, past:], values[:, :, past:], None if valid is None else valid[:, past:]
        (numerator, denominator), (sums, normalizer) = chunk_linear(
            self.query_map(query.to(exact)).to(query.dtype),
            self.key_features(keys.to(exact), valid).to(query.dtype),
            values,
            start=padding_before(valid),
            memory=(memory["key_values"], memory["normalizer"]) if memory else None,
            implementation="triton",
        )
        out = self.combine(numerator.to(exact), denominator[..., None])
        return Mixed(out, {"key_values": sums, "normalizer": normalizer}, folded)
