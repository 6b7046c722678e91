"""One decoding step of the hybrid as one launch: a ring of exact tokens and fp32 sums, both updated in place."""

import torch
from torch import Tensor

from ...ring import Ring
from ...window import LOG2E
from ..launching import launch, power_of_two
from ..selection import problem_with

# State entries that one program of 8 warps holds, by compiling for GPUs: see benchmarks/kernels_static.py.
MAX_TILE = 128 * 128


def step_problem(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot take a step, or None.

    Args:
        query: `[batch, num_heads, 1, head_dim]`.
        key: `[batch, num_kv_heads, 1, head_dim]`.
        value: `[batch, num_kv_heads, 1, value_dim]`.
        weight: `[heads, head_dim, feature_dim]`.
    """
    return problem_with(query, key, value, dims=(query.shape[-1], value.shape[-1], weight.shape[-1]))


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring: Ring,
    sums: Tensor,
    norm: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    gamma: Tensor,
    valid: Tensor | None = None,
    *,
    scaling: float,
    absolute: bool = False,
) -> Tensor:
    """Attend from one new token and take it into the ring; the token that the window loses next goes into the sums.

    φ is LoLCATs' hedgehog map. Ring and sums change in place.

    Args:
        query: `[batch, num_heads, 1, head_dim]`.
        key: `[batch, num_kv_heads, 1, head_dim]`.
        value: `[batch, num_kv_heads, 1, value_dim]`.
        ring: the window's tokens, with as many slots as it has.
        sums: `[batch, state_heads, 2 * feature_dim, value_dim]`, fp32: Σ φ(k) vᵀ of all tokens before the window.
        norm: `[batch, state_heads, 2 * feature_dim]`, fp32: Σ φ(k) of them.
        query_weight: `[num_heads, head_dim, feature_dim]`.
        key_weight: `[state_heads, head_dim, feature_dim]`.
        gamma: `[num_heads]`, factor on the softmax terms; if these are absolute, its logarithm to base 2.
        valid: `[batch, 1]` bool, rows whose token is real, or None when all are; the others give anything.
        scaling: factor on query-key products.
        absolute: take the softmax terms as they are, instead of relative to the largest.

    Returns:
        `[batch, num_heads, 1, value_dim]` in the dtype of `value`.

    Raises:
        ValueError: the kernel does not take such tensors.
    """
    problem = step_problem(query, key, value, query_weight)
    if problem is not None:
        raise ValueError(f"the kernel cannot decode: {problem}")
    weights = query_weight, key_weight, gamma.float()
    read = *weights, ring.count, valid, scaling, absolute
    out: Tensor = _step(query, key, value, ring.keys, ring.values, sums, norm, *read)
    ring.advance(valid)
    return out


@torch.library.custom_op("attnconv::decode_step", mutates_args=("ring_keys", "ring_values", "sums", "norm"))
def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring_keys: Tensor,
    ring_values: Tensor,
    sums: Tensor,
    norm: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    gamma: Tensor,
    count: Tensor,
    valid: Tensor | None,
    scaling: float,
    absolute: bool = False,
) -> Tensor:
    from .kernels import decode_hybrid

    batch, heads, _, head_dim = query.shape
    state_heads, window = sums.shape[1], ring_keys.shape[2]
    features, width = query_weight.shape[-1], value.shape[-1]
    out = value.new_empty((batch, heads, 1, width))
    read = {"q": query, "k": key, "v": value, "query_weight": query_weight, "key_weight": key_weight, "gamma": gamma}
    sizes = {"H": heads, "HS": state_heads, "HV": key.shape[1], "D": head_dim, "F": features, "V": width}
    blocks = {"BD": power_of_two(head_dim), "BF": power_of_two(features), "BW": 16}
    blocks["BV"] = min(power_of_two(width), MAX_TILE // blocks["BF"])
    launch(
        decode_hybrid,
        (batch * state_heads,),
        {
            **{name: tensor.contiguous() for name, tensor in read.items()},
            "ring_keys": ring_keys,
            "ring_values": ring_values,
            "sums": sums,
            "norm": norm,
            "count": count,
            "valid": None if valid is None else valid.to(torch.int32).contiguous(),
            "out": out,
            "scale": scaling * LOG2E,
        },
        {
            **sizes,
            **blocks,
            "WINDOW": window,
            "MEMBERS": 1 << (heads // state_heads - 1).bit_length(),
            "HAS_VALID": valid is not None,
            "ABSOLUTE": absolute,
        },
        num_warps=8,
    )
    return out


@_step.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring_keys: Tensor,
    ring_values: Tensor,
    sums: Tensor,
    norm: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    gamma: Tensor,
    count: Tensor,
    valid: Tensor | None,
    scaling: float,
    absolute: bool = False,
) -> Tensor:
    return value.new_empty((*query.shape[:3], value.shape[-1]))
