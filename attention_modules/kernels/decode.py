"""One decoding step of the hybrid as one launch: a ring of exact tokens and fp32 sums, both updated in place."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..window import LOG2E
from .launching import launch, power_of_two
from .selection import problem_with, use_triton

MAX_DECODE_DIM = 128


@dataclass
class DecodeState:
    """What the hybrid remembers between tokens.

    Attributes:
        keys: `[batch, num_kv_heads, window + 1, head_dim]`; the token at position p is in slot `p % (window + 1)`.
        values: `[batch, num_kv_heads, window + 1, value_dim]`.
        sums: `[batch, state_heads, 2 * feature_dim, value_dim]`, fp32: Σ φ(k) vᵀ of all tokens before the window.
        norm: `[batch, state_heads, 2 * feature_dim]`, fp32: Σ φ(k) of them.
        positions: `[batch]` int32, real tokens of every row since its ring began.
    """

    keys: Tensor
    values: Tensor
    sums: Tensor
    norm: Tensor
    positions: Tensor

    @classmethod
    def from_tail(
        cls, keys: Tensor, values: Tensor, valid: Tensor | None, sums: Tensor, norm: Tensor, window: int
    ) -> "DecodeState":
        """A state from the newest tokens and the sums over all before them.

        Args:
            keys: `[batch, num_kv_heads, tail, head_dim]`, with `tail` below `window`, or 0.
            values: `[batch, num_kv_heads, tail, value_dim]`.
            valid: `[batch, tail]` bool, padding before real tokens, or None.
            sums: over all tokens before the tail; copied.
            norm: the same of the keys alone; copied.
            window: tokens attended exactly.

        Raises:
            ValueError: the tail does not leave room for the next token.
        """
        batch, _, tail, _ = keys.shape
        if tail >= window:
            raise ValueError(f"a window of {window} leaves no room for a token behind {tail} others")
        real = torch.full((batch,), tail, device=keys.device) if valid is None else valid.sum(-1)
        # Rows count from their first real token; padding goes to the slots that are read last, and never are.
        slots = torch.arange(tail, device=keys.device) - (tail - real)[:, None]
        slots = torch.where(slots < 0, slots + window + 1, slots)[:, None, :, None]

        def ring(tensor: Tensor) -> Tensor:
            empty = tensor.new_zeros(*tensor.shape[:2], window + 1, tensor.shape[-1])
            return empty.scatter(2, slots.expand(tensor.shape), tensor)

        return cls(ring(keys), ring(values), sums.float().clone(), norm.float().clone(), real.to(torch.int32))


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: DecodeState,
    query_weight: Tensor,
    key_weight: Tensor,
    gamma: Tensor,
    *,
    scaling: float,
) -> Tensor:
    """Attend from one new token and take it into the state, which changes in place; φ is LoLCATs' hedgehog map.

    Args:
        query: `[batch, num_heads, 1, head_dim]`.
        key: `[batch, num_kv_heads, 1, head_dim]`.
        value: `[batch, num_kv_heads, 1, value_dim]`.
        state: the memory.
        query_weight: `[num_heads, head_dim, feature_dim]`.
        key_weight: `[state_heads, head_dim, feature_dim]`.
        gamma: `[num_heads]`, factor on the softmax terms.
        scaling: factor on query-key products.

    Returns:
        `[batch, num_heads, 1, value_dim]` in the dtype of `value`.

    Raises:
        ValueError: the kernel does not take such tensors.
    """
    widest = max(query.shape[-1], value.shape[-1], query_weight.shape[-1])
    problem = problem_with(query, key, value)
    if problem is None and widest > MAX_DECODE_DIM:
        problem = f"a vector has {widest} numbers, and decoding takes at most {MAX_DECODE_DIM}"
    use_triton("triton", problem, query.device)
    out: Tensor = _step(
        query,
        key,
        value,
        state.keys,
        state.values,
        state.sums,
        state.norm,
        query_weight,
        key_weight,
        gamma.float(),
        state.positions,
        scaling,
    )
    state.positions += 1
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
    positions: Tensor,
    scaling: float,
) -> Tensor:
    from .decode_kernels import decode_hybrid

    batch, heads, _, head_dim = query.shape
    state_heads, window = sums.shape[1], ring_keys.shape[2] - 1
    features, width = query_weight.shape[-1], value.shape[-1]
    out = value.new_empty((batch, heads, 1, width))
    read = {"q": query, "k": key, "v": value, "query_weight": query_weight, "key_weight": key_weight, "gamma": gamma}
    sizes = {"H": heads, "HS": state_heads, "HV": key.shape[1], "D": head_dim, "F": features, "V": width}
    blocks = {"BD": power_of_two(head_dim), "BF": power_of_two(features), "BV": power_of_two(width), "BW": 16}
    launch(
        decode_hybrid,
        (batch * state_heads,),
        {
            **{name: tensor.contiguous() for name, tensor in read.items()},
            "ring_keys": ring_keys,
            "ring_values": ring_values,
            "sums": sums,
            "norm": norm,
            "positions": positions,
            "out": out,
            "scale": scaling * LOG2E,
        },
        {**sizes, **blocks, "WINDOW": window, "MEMBERS": 1 << (heads // state_heads - 1).bit_length()},
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
    positions: Tensor,
    scaling: float,
) -> Tensor:
    return value.new_empty((*query.shape[:3], value.shape[-1]))
