"""Decaying running sums, `S_t = G_t S_{t-1} + k_t v_tᵀ` and `y_t = q_t S_t`.

Three forms of one function: token by token, with every weight written out, and in chunks. They share these arguments:

- `queries` `[batch, heads, groups, T, key_dim]`: `groups` query heads read the state of one of `heads`,
- `keys` `[batch, heads, T, key_dim]`, zero where padding stands,
- `values` `[batch, heads, T, value_dim]`,
- `log_decay` `[batch, heads, T, 1 or key_dim]`: the logarithm of the diagonal of `G_t`, at most 0, and 0 where padding
  stands; its batch may be 1,
- `state` `[batch, heads, key_dim, value_dim]` before the first token, None for zeros,

and give the outputs `[batch, heads, groups, T, value_dim]` and the state after the last token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# A gate that is closed to this degree forgets all that fp32 can tell; sums of lower logarithms would lose their digits.
MIN_LOG_DECAY = -20.0
SCALAR_CHUNK = 64
# With a gate for each channel a chunk costs its length times as much as its keys.
VECTOR_CHUNK = 16


def empty_state(keys: Tensor, values: Tensor, state: Tensor | None) -> Tensor:
    """The state, zeros for None."""
    return keys.new_zeros(*keys.shape[:2], keys.shape[-1], values.shape[-1]) if state is None else state


def decayed_steps(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    state = empty_state(keys, values, state)
    outs = []
    tokens = keys.unbind(2), values.unbind(2), log_decay.exp().unbind(2), queries.unbind(3)
    for key, value, decay, query in zip(*tokens, strict=True):
        state = state * decay[..., None] + key[..., None] * value[..., None, :]
        outs.append(query @ state)
    return torch.stack(outs, 3), state


def decayed_products(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(Q Kᵀ ⊙ D) V` with every entry of `D` written out, for one decay per head."""
    total = log_decay.cumsum(2)
    weights = (queries @ keys[:, :, None].transpose(-1, -2)) * pairwise_decay(total)[:, :, None]
    out = weights @ values[:, :, None]
    if state is not None:
        out = out + (queries * total.exp()[:, :, None]) @ state[:, :, None]
    return out, decayed_sums(keys, values, log_decay, state)


def decayed_sums(keys: Tensor, values: Tensor, log_decay: Tensor, state: Tensor | None) -> Tensor:
    """The state after the last token alone, without any outputs."""
    remaining = log_decay.flip(2).cumsum(2).flip(2)
    sums = (keys * (remaining - log_decay).exp()).transpose(-1, -2) @ values
    return sums if state is None else sums + state * remaining[:, :, 0].exp()[..., None]


def decayed_chunks(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights written out inside each chunk, states carried between chunks; all exponents are at most 0."""
    length = keys.shape[2]
    chunk = min(SCALAR_CHUNK if log_decay.shape[-1] == 1 else VECTOR_CHUNK, length)
    queries, keys, values, log_decay = (in_chunks(t, chunk) for t in (queries, keys, values, log_decay))
    inside = log_decay.cumsum(-2)
    total = inside[..., -1:, :]
    sums = (keys * (total - inside).exp()).transpose(-1, -2) @ values
    running = [sums.new_zeros(sums[:, :, 0].shape) if state is None else state]
    for more, decay in zip(sums.unbind(2), total.exp().transpose(-1, -2).unbind(2), strict=True):
        running.append(running[-1] * decay + more)
    before = torch.stack(running[:-1], 2)
    weights = (
        _scalar_weights(queries, keys, inside) if inside.shape[-1] == 1 else _vector_weights(queries, keys, inside)
    )
    out = weights @ values[:, :, None] + (queries * inside.exp()[:, :, None]) @ before[:, :, None]
    return out.flatten(3, 4)[:, :, :, :length], running[-1]


def in_chunks(tensor: Tensor, chunk: int) -> Tensor:
    """`[..., T, dim]` → `[..., num_chunks, chunk, dim]`, zeros behind the end."""
    padded = F.pad(tensor, (0, 0, 0, -tensor.shape[-2] % chunk))
    return padded.reshape(*padded.shape[:-2], -1, chunk, padded.shape[-1])


def pairwise_decay(total: Tensor) -> Tensor:
    """`[..., T, 1]` sums of log decays → `[..., T, T]` what is left of token j at token i, 0 where j comes later."""
    # Clamped, since what comes later would overflow before it is set to zero.
    return (total - total.transpose(-1, -2)).clamp_max(0.0).exp().tril()


def _scalar_weights(queries: Tensor, keys: Tensor, inside: Tensor) -> Tensor:
    return (queries @ keys[:, :, None].transpose(-1, -2)) * pairwise_decay(inside)[:, :, None]


def _vector_weights(queries: Tensor, keys: Tensor, inside: Tensor) -> Tensor:
    """`[batch, heads, groups, num_chunks, chunk, chunk]`."""
    chunk = keys.shape[-2]
    earlier = torch.ones(chunk, chunk, dtype=torch.bool, device=keys.device).tril()[..., None]
    gap = (inside[..., :, None, :] - inside[..., None, :, :]).clamp_max(0.0)
    left = keys[..., None, :, :] * gap.exp().masked_fill(~earlier, 0.0)
    # Each query position has its own view of the keys.
    rows = queries.permute(0, 1, 3, 4, 2, 5) @ left.transpose(-1, -2)
    return rows.permute(0, 1, 4, 2, 3, 5)
