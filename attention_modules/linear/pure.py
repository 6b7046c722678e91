"""Linear attention without exact tokens beside it: `hedgehog` and `linear`."""

from abc import abstractmethod

import torch
from torch import Tensor

from ..contract import Memory
from ..kernels.chunk_linear.forward import chunk_linear
from ..kernels.selection import needs_package
from ..padding import padding_before
from ..state import AttentionState, Mixed
from ..tokens import Call
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

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        features, weights = self.naive_products(call)
        if self.geometry.causal:
            weights = weights.masked_fill(~causal_mask(call.length, call.tokens.length, weights.device), 0.0)
        numerator, denominator = weights @ self.repeat_values(call.tokens.values), weights.sum(-1, keepdim=True)
        if memory:
            past_numerator, past_denominator = memory_terms(features, memory)
            numerator, denominator = numerator + past_numerator, denominator + past_denominator
        return self.combine(numerator, denominator)

    def attend_torch(self, call: Call, memory: Memory) -> Tensor | Mixed:
        """A segment of queries at a time, each in chunks."""
        query, tokens, past = call.query, call.tokens, call.past
        if not self.geometry.causal:
            memory = linear_sums(self.key_features(tokens), tokens.values)
            return self.combine(*memory_terms(self.query_map(query), memory))
        if past:
            memory = self.absorb(tokens.part(0, past), memory)
        outs = []
        for start in range(0, call.length, SEGMENT):
            now = tokens.part(past + start, past + start + SEGMENT)
            features = self.query_map(query[:, :, start : start + SEGMENT])
            terms, memory = causal_linear(features, self.key_features(now), now.values, memory)
            outs.append(self.combine(*terms))
        return Mixed(torch.cat(outs, 2), memory, tokens.length)

    def decode_torch(self, call: Call, state: AttentionState) -> Tensor:
        """Sums are added to, then read."""
        state.ring(0, call.tokens).advance(call.tokens.valid)
        memory = self.memory_of(state, call.query)
        self.absorb_in_place(call.tokens.to(call.query.dtype), memory)
        return self.combine(*memory_terms(self.query_map(call.query), memory))

    @needs_package
    def attend_triton(self, call: Call, memory: Memory) -> Mixed | None:
        """Chunked, on features mapped before it."""
        call = call.in_one_dtype()
        if not self.runs_in_triton(call):
            return None
        query, folded = call.query, call.tokens.length
        exact = torch.promote_types(query.dtype, torch.float32)
        if call.past:
            memory = self.absorb(call.tokens.part(0, call.past).to(exact), memory)
        tokens = call.tokens.part(call.past)
        (numerator, denominator), (sums, normalizer) = chunk_linear(
            self.query_map(query.to(exact)).to(query.dtype),
            self.key_features(tokens.to(exact)).to(query.dtype),
            tokens.values,
            start=padding_before(tokens.valid),
            memory=(memory["key_values"], memory["normalizer"]) if memory else None,
            implementation="triton",
        )
        out = self.combine(numerator.to(exact), denominator[..., None])
        return Mixed(out, {"key_values": sums, "normalizer": normalizer}, folded)
