"""LoLCATs: exact softmax inside a sliding window, linear attention before it, one shared normaliser."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..contract import Memory
from ..geometry import Geometry
from ..kernels.decode_step.decode import decode_step, step_problem
from ..kernels.selection import needs_package, use_triton
from ..kernels.window_linear.fused import fused_problem, hedgehog_window_linear
from ..kernels.window_linear.hybrid import hybrid_window_linear
from ..padding import padding_before
from ..registry import register
from ..sinks import Sinks, filled_sinks, first_tokens, sink_shapes, sink_tokens
from ..state import AttentionState, Mixed
from ..tokens import Call, Tokens
from ..weights import Statistic, share_outside
from ..window import (
    LOG2E,
    SoftmaxTerms,
    absolute_factors,
    divide,
    softmax_terms,
    tokens_in_window,
    window_mask,
    windowed_softmax,
)
from .base import LinearAttentionModule, LinearOptions, causal_mask
from .chunked import SEGMENT, Terms, causal_linear, memory_terms

# Absolute terms span many orders of magnitude: their factor is learned as its logarithm, in steps ten times as large
# as those of the feature maps, so that one learning rate suits both.
LOG_STEP = 10.0


class HybridOptions(LinearOptions):
    """Options of a method with softmax terms beside linear ones.

    Attributes:
        window: newest tokens attended exactly, itself included; when not causal, as many on either side.
        mixing: start of the factor γ on the softmax terms, in (0, 1); learned per head.
        window_terms: what linear terms stand beside. `relative`: softmax terms over the largest of each query's window,
            as published; a query that looks past its window can say so only as far as its features overlap more.
            `absolute`: softmax terms as they are, `e^{s q·k}`; what is inside the window then leaves the weights of
            what is before it alone, as in softmax, and the feature maps learn far better; γ may exceed 1.
    """

    window: int = Field(64, ge=1)
    mixing: float = Field(0.1, gt=0, lt=1)
    window_terms: Literal["relative", "absolute"] = "relative"


class LolcatsOptions(HybridOptions):
    """Options of `lolcats`.

    Attributes:
        num_sinks: first tokens of the sequence that keep their softmax terms for ever instead of becoming linear ones.
            Many heads rest on the first token: exact, it leaves the feature maps a far easier task. 0 as published;
            Triton kernels serve 0 only.
    """

    num_sinks: int = Field(0, ge=0)


@register(
    name="lolcats",
    options=LolcatsOptions,
    paper="https://arxiv.org/abs/2410.10254",
    summary="exact softmax in a sliding window, linear attention before it, one normaliser",
)
class LolcatsAttention(LinearAttentionModule):
    """Sliding form: softmax terms of the window W (the last w tokens) and linear terms of all tokens P before it.

    With `num_sinks` the first tokens count as part of W wherever it stands (https://arxiv.org/abs/2309.17453).

    `y_i = [γ Σ_W e^{s q·k - c_i} v + Σ_P φ(q)·φ(k) v] / [γ Σ_W e^{s q·k - c_i} + Σ_P φ(q)·φ(k)]`, `c_i` = max over W,
    or 0 with absolute window terms.

    Paper: https://arxiv.org/abs/2410.10254
    """

    implementations: ClassVar[tuple[str, ...]] = ("auto", "naive", "torch", "triton")
    paths: ClassVar[tuple[str, ...]] = ("window", "linear")

    options: HybridOptions

    def __init__(self, geometry: Geometry, options: HybridOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        self.window = options.window
        self.num_sinks = options.num_sinks if isinstance(options, LolcatsOptions) else 0
        self.mixing = nn.Parameter(torch.empty(geometry.num_heads))
        self._reset_mixing()

    @torch.no_grad()
    def _reset_mixing(self) -> None:
        start = self.options.mixing
        self.mixing.fill_(math.log(start) / LOG_STEP if self.is_absolute else math.log(start / (1 - start)))

    def reset_parameters(self) -> None:
        """Start the feature maps and the mixing factors again."""
        super().reset_parameters()
        self._reset_mixing()

    @property
    def tail_tokens(self) -> int:
        """With the next token these fill the window."""
        return self.window - 1

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Running sums, and the sinks."""
        sinks = sink_shapes(self.geometry, self.num_sinks) if self.num_sinks else {}
        return {**super().memory_shapes(), **sinks}

    def absorb(self, tokens: Tokens, memory: Memory) -> Memory:
        """Keep the sinks, add other tokens to the running sums."""
        sums, sinks, far = self._without_sinks(tokens, memory)
        sums = super().absorb(far, sums)
        return sums if sinks is None else {**sums, **sinks.to_memory()}

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        tokens, num_keys = call.tokens, call.tokens.length
        keys_repeated, values_repeated = self.repeat_values(tokens.keys), self.repeat_values(tokens.values)
        device = call.query.device
        inside = window_mask(call.length, num_keys, self.window, causal=self.geometry.causal, device=device)
        exact = inside | sink_tokens(self.num_sinks, memory, tokens)[:, None, None, :]
        before = ~exact
        if self.geometry.causal:
            behind = causal_mask(call.length, num_keys, device)
            exact, before = exact & behind, before & behind
        visible = exact & tokens.real[:, None, None, :]
        features, weights = self.naive_products(call)
        weights = weights.masked_fill(~before, 0.0)
        seen = keys_repeated, values_repeated, visible
        if memory and self.num_sinks:
            seen = self._naive_sinks(memory, *seen)
        logits = call.query @ seen[0].transpose(-1, -2) * (call.scaling * LOG2E)
        window_terms = softmax_terms(logits, seen[2], seen[1])
        past_terms = weights @ values_repeated, weights.sum(-1, keepdim=True)
        if memory:
            remembered = memory_terms(features, memory)
            past_terms = past_terms[0] + remembered[0], past_terms[1] + remembered[1]
        return self._mix(window_terms, past_terms)

    def attend_torch(self, call: Call, memory: Memory) -> Tensor | Mixed:
        """Both terms in blocks, a segment of queries at a time."""
        query, tokens, offset, window = call.query, call.tokens, call.past, self.window
        memory, sinks, far = self._without_sinks(tokens, memory)
        if not self.geometry.causal:
            window_terms = windowed_softmax(call, window=window, causal=False, sinks=sinks)
            return self._mix(window_terms, self._outside_window(query, far))
        # Tokens that are out of the window of even the first query.
        gone = max(offset - window, 0)
        if gone:
            memory = super().absorb(far.part(0, gone), memory)
        outs = []
        for start in range(0, call.length, SEGMENT):
            part = query[:, :, start : start + SEGMENT]
            near, stop = max(offset + start - window + 1, 0), offset + start + part.shape[2]
            seen = Call(part, tokens.part(near, stop), call.scaling)
            moved = sinks and replace(sinks, index=sinks.index - near)
            window_terms = windowed_softmax(seen, window=window, causal=True, sinks=moved)
            terms, memory = self._before_window(part, far.part(0, stop), memory)
            outs.append(self._mix(window_terms, terms))
        # One token less than what leaves the tail: the newest query's window still holds it.
        folded = max(tokens.length - window, 0)
        if memory and sinks is not None:
            memory = {**memory, **replace(sinks, valid=sinks.valid & (sinks.index < folded)).to_memory()}
        return Mixed(torch.cat(outs, 2) if len(outs) > 1 else outs[0], memory, folded)

    def decode_torch(self, call: Call, state: AttentionState) -> Tensor | None:
        """The ring is the window: what leaves it with the next token goes into the sums."""
        query, tokens = call.query, call.tokens
        ring = state.ring(self.window, tokens)
        ring.put(tokens)
        memory = self.memory_of(state, query)
        rows = (query * (call.scaling * LOG2E)).unflatten(1, (tokens.keys.shape[1], -1)).squeeze(3)
        logits = rows @ ring.keys.to(query.dtype).transpose(-1, -2)
        near, visible = ring.values.to(query.dtype), ring.filled
        if self.num_sinks:
            logits = torch.cat([rows @ memory["sink_keys"].transpose(-1, -2), logits], -1)
            near = torch.cat([memory["sink_values"], near], 2)
            visible = torch.cat([filled_sinks(memory), visible], 1)
        terms = softmax_terms(logits, visible[:, None, None], near)
        window_terms = SoftmaxTerms(*(term.flatten(1, 2).unsqueeze(2) for term in terms))
        out = self._mix(window_terms, memory_terms(self.query_map(query), memory))
        self.absorb_in_place(ring.leaving(tokens.valid).to(query.dtype), memory)
        return out

    def absorb_in_place(self, tokens: Tokens, memory: Memory) -> None:
        """Add one token of every row to the sinks or to the running sums."""
        _, sinks, far = self._without_sinks(tokens, memory)
        super().absorb_in_place(far, memory)
        if sinks is not None:
            for name, tensor in sinks.to_memory().items():
                memory[name].copy_(tensor)

    @needs_package
    def decode_triton(self, call: Call, state: AttentionState) -> Tensor | None:
        """One launch, with the published map inside."""
        if self.implementation != "triton" and call.query.device.type != "cuda":
            return None
        call = call.in_one_dtype()
        tensors = call.query, call.tokens.keys, call.tokens.values
        problem = self.without_kernels()
        if problem is None and self.query_map.name != "hedgehog":
            problem = f"single tokens are mapped by 'hedgehog' in the kernel, not by {self.query_map.name!r}"
        problem = problem or step_problem(*tensors, self.query_map.weight)
        # Where Triton was asked for, the kernels that take chunks serve what they can of this, and refuse the rest.
        if self.implementation == "triton" and problem is not None:
            return None
        if not use_triton(self.implementation, problem, call.query.device):
            return None
        ring = state.ring(self.window, call.tokens)
        memory = self.memory_of(state, call.query.float())
        sums = memory["key_values"], memory["normalizer"]
        weights = self.query_map.weight, self.key_map.weight, self._gamma(torch.float32)
        read = *tensors, ring, *sums, *weights, call.tokens.valid
        return decode_step(*read, scaling=call.scaling, absolute=self.is_absolute)

    @needs_package
    def attend_triton(self, call: Call, memory: Memory) -> Tensor | None:
        """Both terms in one kernel, the published map inside where it fits, else on features mapped before."""
        call = call.in_one_dtype()
        if self.left_out or not self.runs_in_triton(call):
            return None
        query, exact = call.query, torch.promote_types(call.query.dtype, torch.float32)
        gone = max(call.past - self.window, 0)
        if gone:
            memory = self.absorb(call.tokens.part(0, gone).to(exact), memory)
        tokens = call.tokens.part(gone)
        weights: tuple[Tensor, Tensor] = self.query_map.weight, self.key_map.weight
        is_fused = self.query_map.name == "hedgehog" and fused_problem(query, tokens.values, weights[0]) is None
        if not is_fused:
            weights = self.query_map(query.to(exact)), self.key_features(tokens.to(exact))
        attend = hedgehog_window_linear if is_fused else hybrid_window_linear
        return attend(
            query,
            tokens.keys,
            tokens.values,
            *weights,
            self._gamma(torch.float32),
            scaling=call.scaling,
            window=self.window,
            absolute=self.is_absolute,
            start=padding_before(tokens.valid),
            memory=(memory["key_values"], memory["normalizer"]) if memory else None,
        )

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        if "window" in self.left_out:
            return torch.zeros_like(rank)
        return tokens_in_window(rank, total, self.window, self.num_sinks, causal=self.geometry.causal)

    def statistics(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scaling: float,
        padding_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> Mapping[str, Statistic]:
        """How much of what the heads look at goes through the linear path."""
        rows = self.weights_by_row(query, key, scaling=scaling, padding_mask=padding_mask)
        causal, num_sinks = self.geometry.causal, self.num_sinks
        outside = share_outside(rows, self.window, causal=causal, num_sinks=num_sinks)
        meaning = "share of the normaliser's mass that goes through the linear path, mean over queries"
        share = Statistic("linear share", meaning, "head", "percent", outside)
        return {share.name: share}

    def without_kernels(self) -> str | None:
        """As for every linear method, and with sinks; no property, for torch.compile cannot follow `super()` to one."""
        return super().without_kernels() or ("sinks are kept beside the window" if self.num_sinks else None)

    def _without_sinks(self, tokens: Tokens, memory: Memory) -> tuple[Memory, Sinks | None, Tokens]:
        """The running sums of a memory, the sinks of memory and tokens, and the tokens that become linear."""
        if not self.num_sinks:
            return memory, None, tokens
        sums = {name: memory[name] for name in super().memory_shapes()} if memory else {}
        far = tokens.having(tokens.real & ~sink_tokens(self.num_sinks, memory, tokens))
        return sums, first_tokens(self.num_sinks, memory, tokens), far

    def _naive_sinks(
        self, memory: Memory, keys: Tensor, values: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of all heads, and what of them is visible, with the sinks of a memory before them."""
        keys = torch.cat([self.repeat_values(memory["sink_keys"]), keys], 2)
        values = torch.cat([self.repeat_values(memory["sink_values"]), values], 2)
        filled = filled_sinks(memory)[:, None, None].expand(-1, -1, visible.shape[2], -1)
        return keys, values, torch.cat([filled, visible.expand(len(filled), -1, -1, -1)], -1)

    def _before_window(self, query: Tensor, tokens: Tokens, memory: Memory) -> tuple[Terms | None, Memory]:
        """Linear terms of the tokens that left each query's window; None while there are none.

        Query `t` of T adds the token `window` before it; what is older is in `memory`.
        """
        length, reach = query.shape[2], tokens.length - self.window
        if reach <= 0:
            return memory_terms(self.query_map(query), memory) if memory else None, memory
        leaving = tokens.part(max(reach - length, 0), reach)
        # Queries at the very start have nothing behind their window.
        missing = (0, 0, length - leaving.length, 0)
        features, values = (F.pad(t, missing) for t in (self.key_features(leaving), leaving.values))
        return causal_linear(self.query_map(query), features, values, memory)

    def _outside_window(self, query: Tensor, tokens: Tokens) -> Terms:
        """Linear terms behind and ahead of a window that looks both ways."""
        behind, _ = self._before_window(query, tokens, {})
        mirrored = None if tokens.valid is None else tokens.valid.flip(1)
        ahead, _ = self._before_window(query.flip(2), Tokens(tokens.keys.flip(2), tokens.values.flip(2), mirrored), {})
        if behind is None or ahead is None:
            nothing = torch.zeros_like(query[..., :1])
            return nothing, nothing
        return behind[0] + ahead[0].flip(2), behind[1] + ahead[1].flip(2)

    def _mix(self, window_terms: SoftmaxTerms, past_terms: Terms | None) -> Tensor:
        numerator, denominator, peak = window_terms
        if "window" in self.left_out:
            numerator, denominator = torch.zeros_like(numerator), torch.zeros_like(denominator)
        if past_terms is None or "linear" in self.left_out:
            return divide(numerator, denominator)
        return self._fraction(SoftmaxTerms(numerator, denominator, peak), past_terms)

    def _fraction(self, window_terms: SoftmaxTerms, past_terms: Terms) -> Tensor:
        numerator, denominator, peak = window_terms
        gamma = self._gamma(peak.dtype)
        if self.is_absolute:
            near, far = (factor[..., None] for factor in absolute_factors(gamma, peak[..., 0]))
            past_terms = far * past_terms[0], far * past_terms[1]
        else:
            near = gamma[:, None, None]
        return divide(near * numerator + past_terms[0], near * denominator + past_terms[1])

    @property
    def is_absolute(self) -> bool:
        """Whether softmax terms are taken as they are."""
        return self.options.window_terms == "absolute"

    def _gamma(self, dtype: torch.dtype) -> Tensor:
        """`[num_heads]`: γ, or its logarithm to base 2 where window terms are absolute."""
        mixing = self.mixing.to(dtype)
        return mixing * (LOG_STEP * LOG2E) if self.is_absolute else mixing.sigmoid()
