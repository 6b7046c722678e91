"""Which tokens a small cache keeps: those that a linear state would recall worst."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import Memory
from ..window import divide


@dataclass(frozen=True)
class Pool:
    """A cache of exact tokens, and tokens that join it one by one, each pushing one out once the cache is full.

    Attributes:
        keys: `[batch, num_kv_heads, size + steps, head_dim]`, the cache before the tokens that join it.
        values: `[batch, num_kv_heads, size + steps, value_dim]`.
        features: φ(k) `[batch, key_heads, size + steps, feature_dim]`, zero where no token is.
        real: `[batch, size + steps]` bool: where a token is.
        size: tokens that the cache holds at most.
        folded_at: `[batch, num_kv_heads, size + steps]` int64: the step at which each token is pushed out into the
            linear state; `steps` if it never is.
    """

    keys: Tensor
    values: Tensor
    features: Tensor
    real: Tensor
    size: int
    folded_at: Tensor

    @property
    def steps(self) -> int:
        """Tokens that join the cache, padding included."""
        return self.keys.shape[2] - self.size

    def folded(self) -> tuple[Tensor, Tensor]:
        """Features `[batch, key_heads, steps, feature_dim]` and values of the token folded at each step, or zeros."""
        steps = torch.arange(self.steps, device=self.keys.device)
        chosen = (self.folded_at[:, :, None] == steps[:, None]).to(self.features.dtype)
        repeats = self.features.shape[1] // self.keys.shape[1]
        return chosen.repeat_interleave(repeats, 1) @ self.features, chosen @ self.values

    def cache(self) -> Memory:
        """What is in the cache after all steps, the tokens first and then slots that stand for nothing."""
        kept = (self.folded_at == self.steps) & self.real[:, None]
        slots = torch.argsort((~kept).to(torch.uint8), dim=-1, stable=True)[..., : self.size, None]
        return {
            "cache_keys": self.keys.gather(2, slots.expand(-1, -1, -1, self.keys.shape[-1])),
            "cache_values": self.values.gather(2, slots.expand(-1, -1, -1, self.values.shape[-1])),
            # The same number for all heads of a row.
            "cache_filled": kept[:, 0].sum(-1).to(self.keys.dtype),
        }


@torch.no_grad()
def folding_steps(features: Tensor, values: Tensor, real: Tensor, memory: Memory, size: int) -> Tensor:
    """The steps at which tokens are pushed out of a cache: at each one the token with the least self-recall error.

    Recall is kept up to date with every token folded instead of being read from the state again.

    Args:
        features: as in `Pool`.
        values: as in `Pool`.
        real: as in `Pool`.
        memory: running sums before the first step.
        size: as in `Pool`.

    Returns:
        `folded_at` as in `Pool`.
    """
    num_kv_heads, length = values.shape[1:3]
    features = features.unflatten(1, (num_kv_heads, -1))
    products = features @ features.transpose(-1, -2)
    recalled = features @ memory["key_values"].unflatten(1, (num_kv_heads, -1))
    mass = features @ memory["normalizer"].unflatten(1, (num_kv_heads, -1))[..., None]
    column = torch.arange(length, device=values.device)
    cached = (real & (column < size))[:, None].repeat(1, num_kv_heads, 1)
    folded_at = torch.full_like(cached, length - size, dtype=torch.int64)
    for step in range(length - size):
        cached = cached | (real & (column == size + step))[:, None]
        error = (divide(recalled, mass) - values[:, :, None]).square().sum(-1).mean(2)
        best = error.masked_fill(~cached, torch.inf).argmin(-1, keepdim=True)
        leaves = (column == best) & (cached.sum(-1, keepdim=True) > size)
        folded_at = folded_at.masked_fill(leaves, step)
        cached = cached & ~leaves
        weight = products @ leaves.to(products.dtype)[:, :, None, :, None]
        value = values.gather(2, best[..., None].expand(-1, -1, 1, values.shape[-1]))
        recalled = recalled + weight * value[:, :, None]
        mass = mass + weight
    return folded_at
