"""The attention weights of any method, and what a method can tell about its own work."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .window import window_mask


@dataclass(frozen=True)
class Statistic:
    """Something that a method says about its own work in one call.

    Attributes:
        name: what tables and pictures call it.
        meaning: one clause for people who do not know it.
        per: what each value belongs to.
        style: `percent` prints 0.25 as 25 %.
        values: `[heads]`, `[experts]` or `[1]`.
    """

    name: str
    meaning: str
    per: Literal["head", "expert", "layer"]
    style: Literal["number", "percent"]
    values: Tensor


def response_weights(attend: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """The weights of an attention whose output is linear in its values: exactly its outputs for unit vectors.

    Args:
        attend: from values `[batch, num_kv_heads, S, value_dim]` to outputs `[batch, num_heads, T, value_dim]`.
        values: any values of that shape, whose dtype and device the unit vectors get.

    Returns:
        `[batch, num_heads, T, S]`, fp32 or fp64.
    """
    length, width = values.shape[-2:]
    columns = []
    for start in range(0, length, width):
        # Row `start + i` is the i-th unit vector: each column of the output is the weight of one key.
        units = torch.eye(length, width, dtype=values.dtype, device=values.device).roll(start, 0)
        out = attend(units.expand(values.shape).contiguous())
        columns.append(out[..., : length - start].to(torch.promote_types(out.dtype, torch.float32)))
    return torch.cat(columns, -1)


def share_outside(rows: Iterable[Tensor], window: int, *, causal: bool, num_sinks: int = 0) -> Tensor:
    """Mass of the weights on keys outside a sliding window, mean over the queries of all rows: `[heads]`.

    Args:
        rows: the weights `[heads, T, T]` of each row of a batch.
        window: newest tokens that are inside, the query itself included; when not causal, as many on either side.
        causal: whether keys after the query are hidden.
        num_sinks: first tokens that count as inside wherever the window stands.
    """
    masses = []
    for weights in rows:
        length = weights.shape[-1]
        inside = window_mask(length, length, window, causal=causal, device=weights.device)
        inside[:, :num_sinks] = True
        masses.append(weights.masked_fill(inside, 0.0).sum(-1))
    return torch.cat(masses, 1).mean(1)


def density(weights: Tensor, *, causal: bool) -> Statistic:
    """The share of the token pairs that may see each other at all which have a weight other than zero.

    Args:
        weights: `[batch, heads, T, T]`.
        causal: whether a token sees only itself and what came before.
    """
    length = weights.shape[-1]
    pairs = length * (length + 1) / 2 if causal else length * length
    share = (weights != 0).sum((-1, -2)).double().mean(0) / pairs
    return Statistic("density", "share of the visible pairs of tokens with any weight", "head", "percent", share)
