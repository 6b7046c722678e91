"""LoLA: LoLCATs with a small cache of exact tokens that the linear state would recall worst."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..base import NOTHING
from ..contract import Memory
from ..geometry import Geometry
from ..padding import restore_tokens, right_align_order, take_tokens
from ..registry import register
from ..state import Mixed
from ..tokens import Call, Surroundings, Tokens
from ..weights import Statistic
from ..window import LOG2E, SoftmaxTerms, divide, softmax_terms
from .chunked import Terms, causal_linear, linear_sums, memory_terms
from .lolcats import HybridOptions, LolcatsAttention
from .recall import Pool, folding_steps

# Queries handled at a time: each step looks at the cache and at all tokens that leave the window meanwhile.
CACHE_BLOCK = 32


class LolaOptions(HybridOptions):
    """Options of `lola`.

    Attributes:
        cache_size: tokens behind the window that each key/value head keeps exactly; 0 is `lolcats`.
    """

    cache_size: int = Field(64, ge=0)


@register(
    name="lola",
    options=LolaOptions,
    paper="https://arxiv.org/abs/2505.23666",
    summary="LoLCATs with a cache of exact tokens that the linear state would recall worst",
)
class LolaAttention(LolcatsAttention):
    """The formula of `lolcats` with three kinds of tokens: softmax terms of window and cache, linear terms of the rest.

    The token that leaves the window joins the cache. If that holds more than `cache_size` tokens then, the one that the
    linear state recalls best is folded into it, for ever: the one with the least self-recall error
    `|φ(k)ᵀS / φ(k)ᵀz - v|²` of all in the cache, given the sums `S = Σ φ(k) vᵀ` and `z = Σ φ(k)` of what was folded
    before (an empty state recalls zero). Tokens are chosen one by one in the order of time, and padding is no token, so
    that a prefill, one in parts and decoding are the same function; the published prefill decides for a chunk at a
    time. Each key/value head has a cache of its own; where query heads with key maps of their own share it, their mean
    error decides. Gradients do not pass through the choice.

    Parameters have the names and shapes of those of `lolcats`. A choice for each token is a step for each token: a
    prefill takes longer than that of `lolcats`, by the same time for every token.

    Paper: https://arxiv.org/abs/2505.23666
    """

    implementations = ("auto", "naive", "torch")
    paths = ("window", "linear", "cache")

    # What is recalled is compared.
    rounds_products = False
    options: LolaOptions

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """A layer that looks both ways."""
        if geometry.causal:
            return None
        return "lola chooses tokens in the order of time, but this layer is bidirectional; `lolcats` can serve it"

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Running sums, and the cache with the number of its tokens."""
        geometry, size = self.geometry, self.options.cache_size
        return {
            **super().memory_shapes(),
            "cache_keys": (geometry.num_kv_heads, size, geometry.head_dim),
            "cache_values": (geometry.num_kv_heads, size, geometry.value_dim),
            "cache_filled": (),
        }

    def absorb(self, tokens: Tokens, memory: Memory) -> Memory:
        """Pass tokens through the cache into the running sums."""
        memory = self._begun(memory, tokens.keys)
        for start in range(0, tokens.length, CACHE_BLOCK):
            pool = self._pool(tokens.part(start, start + CACHE_BLOCK), memory)
            sums = linear_sums(*pool.folded())
            memory = {**pool.cache(), **{name: memory[name] + total for name, total in sums.items()}}
        return memory

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        """All weights written out, and every recall computed anew."""
        if call.tokens.values.shape[-1] != self.geometry.value_dim:
            raise ValueError("lola chooses tokens by their values, so others cannot stand in: use attention_weights")
        return self._naive(call, call.tokens.values, memory)

    def attend_torch(self, call: Call, memory: Memory) -> Mixed:
        """A block of queries at a time, with the cache and what was in its window beside it."""
        tokens, gone = call.tokens, max(call.past - self.window, 0)
        memory = self.absorb(tokens.part(0, gone), memory)
        # From here on query `t` stands `window` behind the token that leaves with it, which may have to be made up.
        made_up, near = call.length + self.window - (tokens.length - gone), tokens.part(gone)
        keys, values = (F.pad(t, (0, 0, made_up, 0)) for t in (near.keys, near.values))
        near = Tokens(keys, values, F.pad(near.real, (made_up, 0), value=False))
        outs = []
        for start in range(0, call.length, CACHE_BLOCK):
            part = call.query[:, :, start : start + CACHE_BLOCK]
            seen = near.part(start, start + part.shape[2] + self.window)
            out, memory = self._block(Call(part, seen, call.scaling), memory)
            outs.append(out)
        return Mixed(torch.cat(outs, 2), memory, max(tokens.length - self.window, 0))

    def attend_triton(self, *args: Any, **kwargs: Any) -> None:
        """There are no kernels for the cache."""
        return

    def decode_torch(self, *args: Any, **kwargs: Any) -> None:
        """A token is a call like others."""
        return

    def decode_triton(self, *args: Any, **kwargs: Any) -> None:
        """There are no kernels for the cache."""
        return

    def attention_weights(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scaling: float,
        padding_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
        value: Tensor | None = None,
        around: Surroundings = NOTHING,
    ) -> Tensor:
        """As for every method, with the values by which tokens are chosen."""
        if value is None:
            raise ValueError("lola chooses tokens by their values, so its weights need them: give value")
        dtype = torch.promote_types(key.dtype, torch.float32)
        query, key, value = (t.to(dtype) for t in (query, key, value))
        order = None if padding_mask is None else right_align_order(padding_mask)
        if order is not None and padding_mask is not None:
            query, key, value = (take_tokens(t, order) for t in (query, key, value))
            padding_mask = padding_mask.gather(1, order)
        length = key.shape[2]
        units = torch.eye(length, dtype=dtype, device=key.device).expand(*key.shape[:2], -1, -1)
        weights = self._naive(Call(query, Tokens(key, value, padding_mask), scaling), units, {})
        if order is None or padding_mask is None:
            return weights
        weights = weights.masked_fill(~padding_mask[:, None, :, None], 0.0)
        return restore_tokens(restore_tokens(weights, order).transpose(-1, -2), order).transpose(-1, -2)

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        cached = (rank - self.window).clamp(0, self.options.cache_size)
        return super().tokens_attended(rank, total) + (0 if "cache" in self.left_out else cached)

    def statistics(self, *args: Any, **kwargs: Any) -> Mapping[str, Statistic]:
        """Nothing that could be told without values; `paths` show what window, cache and state are worth."""
        return {}

    def _begun(self, memory: Memory, like: Tensor) -> Memory:
        """The memory, or an empty one in the dtype of `like` `[batch, ...]`."""
        shapes = self.memory_shapes()
        return memory or {name: like.new_zeros(len(like), *shape) for name, shape in shapes.items()}

    def _pool(self, tokens: Tokens, memory: Memory) -> Pool:
        """The cache, and tokens that join it."""
        size = self.options.cache_size
        filled = torch.arange(size, device=tokens.keys.device) < memory["cache_filled"][:, None]
        keys = torch.cat([memory["cache_keys"], tokens.keys], 2)
        values = torch.cat([memory["cache_values"], tokens.values], 2)
        real = torch.cat([filled, tokens.real], 1)
        features = self.key_features(Tokens(keys, values, real))
        return Pool(keys, values, features, real, size, folding_steps(features, values, real, memory, size))

    def _block(self, call: Call, memory: Memory) -> tuple[Tensor, Memory]:
        """Outputs of some queries, and the memory behind them; query `t` stands at token `window + t`."""
        query, length, size = call.query, call.length, self.options.cache_size
        pool, rest = self._pool(call.tokens.part(0, length), memory), call.tokens.part(length)
        keys, values = torch.cat([pool.keys, rest.keys], 2), torch.cat([pool.values, rest.values], 2)
        real = torch.cat([pool.real, rest.real], 1)
        folded_at = F.pad(pool.folded_at, (0, self.window), value=length)
        step = torch.arange(length, device=query.device)[:, None]
        place = torch.arange(-size, length + self.window, device=query.device)
        visible = real[:, None, None] & (step < folded_at[:, :, None]) & self._exact(place, step, step + self.window)
        rows = (query * (call.scaling * LOG2E)).unflatten(1, (keys.shape[1], -1))
        exact = softmax_terms(rows @ keys[:, :, None].transpose(-1, -2), visible[:, :, None], values[:, :, None])
        linear, sums = causal_linear(self.query_map(query), *pool.folded(), memory)
        out = self._mix(SoftmaxTerms(*(term.flatten(1, 2) for term in exact)), linear)
        return out, {**pool.cache(), **sums}

    def _exact(self, place: Tensor, left: Tensor, now: Tensor) -> Tensor:
        """Which places take part exactly as long as their token is not folded: those up to `now`.

        Args:
            place: `[places]`, negative for the cache.
            left: `[T, 1]` last place that has left each query's window.
            now: `[T, 1]` place of each query.
        """
        exact = place <= now
        if "window" in self.left_out:
            exact = exact & (place <= left)
        if "cache" in self.left_out:
            exact = exact & (place > left)
        return exact

    def _mix(self, window_terms: SoftmaxTerms, past_terms: Terms | None) -> Tensor:
        """Those of window and cache, of which what is left out is hidden already, and the linear ones."""
        if past_terms is None or "linear" in self.left_out:
            return divide(window_terms.numerator, window_terms.denominator)
        return self._fraction(window_terms, past_terms)

    def _naive(self, call: Call, mixed: Tensor, memory: Memory) -> Tensor:
        """The definition: tokens are chosen by their values, and `mixed` `[batch, num_kv_heads, S, dim]` attended."""
        query, tokens, size, num_groups = call.query, call.tokens, self.options.cache_size, self.geometry.num_groups
        began = self._begun(memory, tokens.keys)
        filled = torch.arange(size, device=query.device) < began["cache_filled"][:, None]
        real = torch.cat([filled, tokens.real], 1)
        slots = began["cache_values"] if memory else mixed.new_zeros(*mixed.shape[:2], size, mixed.shape[-1])
        mixed = self.repeat_values(torch.cat([slots, mixed], 2))
        keys = torch.cat([began["cache_keys"], tokens.keys], 2)
        all_tokens = Tokens(keys, torch.cat([began["cache_values"], tokens.values], 2), real)
        folded_at = self._naive_choice(all_tokens, began).repeat_interleave(num_groups, 1)
        place = torch.arange(-size, tokens.length, device=query.device)
        now = torch.arange(call.past, tokens.length, device=query.device)[:, None]
        is_folded = folded_at[:, :, None] <= now
        visible = real[:, None, None] & ~is_folded & self._exact(place, now - self.window, now)
        logits = query @ keys.repeat_interleave(num_groups, 1).transpose(-1, -2) * (call.scaling * LOG2E)
        features, products = self.naive_products(Call(query, all_tokens, call.scaling))
        products = products.masked_fill(~is_folded, 0.0)
        linear = products @ mixed, products.sum(-1, keepdim=True)
        if memory:
            remembered = memory_terms(features, memory)
            linear = linear[0] + remembered[0], linear[1] + remembered[1]
        return self._mix(softmax_terms(logits, visible, mixed), linear)

    @torch.no_grad()
    def _naive_choice(self, tokens: Tokens, memory: Memory) -> Tensor:
        """`[batch, num_kv_heads, size + S]`: the place of the query with which each token is folded, or S."""
        values, real, size = tokens.values, tokens.real, self.options.cache_size
        num_kv_heads, length = values.shape[1], tokens.length - size
        features = self.key_features(tokens).unflatten(1, (num_kv_heads, -1))
        sums, normalizer = (memory[name].unflatten(1, (num_kv_heads, -1)) for name in ("key_values", "normalizer"))
        cached = real[:, None].repeat(1, num_kv_heads, 1)
        cached[:, :, size:] = False
        folded = torch.zeros_like(cached)
        folded_at = torch.full_like(cached, length, dtype=torch.int64)
        for left in range(length - self.window):
            cached[:, :, size + left] = real[:, None, size + left]
            among = cached.to(torch.uint8).topk(size + 1, -1).indices
            rows = features.gather(3, among[:, :, None, :, None].expand(*features.shape[:3], -1, features.shape[-1]))
            weights = (rows @ features.transpose(-1, -2)).masked_fill(~folded[:, :, None, None], 0.0)
            recalled = weights @ values[:, :, None] + rows @ sums
            mass = weights.sum(-1, keepdim=True) + rows @ normalizer[..., None]
            own = values.gather(2, among[..., None].expand(-1, -1, -1, values.shape[-1]))
            error = (divide(recalled, mass) - own[:, :, None]).square().sum(-1).mean(2)
            error = error.masked_fill(~cached.gather(-1, among), torch.inf)
            best = among.gather(-1, error.argmin(-1, keepdim=True))
            leaves = torch.zeros_like(cached).scatter(-1, best, True) & (cached.sum(-1, keepdim=True) > size)
            cached, folded = cached & ~leaves, folded | leaves
            folded_at = folded_at.masked_fill(leaves, left + self.window)
        return folded_at
