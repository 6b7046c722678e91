"""The gated delta rule, `S_t = α_t S_{t-1} (I - β_t k_t k_tᵀ) + β_t k_t v_tᵀ` and `y_t = q_t S_t`.

Before a token adds its value under its key, what the state would answer to that key is taken away. Arguments are those
of `recurrence.py` with one decay per head (`log_decay`, the logarithm of α) and

- `beta` `[batch, heads, T, 1]` in [0, 1], 0 where padding stands.
"""

import torch
from torch import Tensor

from .recurrence import SCALAR_CHUNK, empty_state, in_chunks, pairwise_decay


def delta_steps(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    state = empty_state(keys, values, state)
    outs = []
    tokens = keys.unbind(2), values.unbind(2), log_decay.exp().unbind(2), beta.unbind(2), queries.unbind(3)
    for key, value, decay, strength, query in zip(*tokens, strict=True):
        state = state * decay[..., None]
        answer = (key[..., None, :] @ state).squeeze(-2)
        state = state + key[..., None] * (strength * (value - answer))[..., None, :]
        outs.append(query @ state)
    return torch.stack(outs, 3), state


def delta_chunks(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In chunks: what each token of a chunk really adds is found by solving one triangular system."""
    length = keys.shape[2]
    chunk = min(SCALAR_CHUNK, length)
    befores, added, state = _walk(keys, values, log_decay, beta, state, chunk)
    queries, keys, log_decay = (in_chunks(t, chunk) for t in (queries, keys, log_decay))
    inside = log_decay.cumsum(-2)
    weights = (queries @ keys[:, :, None].transpose(-1, -2)) * pairwise_decay(inside)[:, :, None]
    out = (queries * inside.exp()[:, :, None]) @ befores[:, :, None] + weights @ added[:, :, None]
    return out.flatten(3, 4)[:, :, :, :length], state


def delta_state(keys: Tensor, values: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None) -> Tensor:
    """The state after the last token alone, without any outputs."""
    return _walk(keys, values, log_decay, beta, state, min(SCALAR_CHUNK, keys.shape[2]))[2]


def _walk(
    keys: Tensor, values: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From chunk to chunk.

    Token i of a chunk adds `u_i = β_i (v_i - e^{c_i} k_i S - Σ_{j<i} e^{c_i-c_j} (k_i·k_j) u_j)` under its key, where c
    sums up the log decays since the chunk's start and S is the state there. All u of a chunk are the solution of a
    triangular system that is linear in S, so that it is solved once for all chunks and S is put in on the way.

    Returns:
        the states before each chunk `[batch, heads, num_chunks, key_dim, value_dim]`, what each token adds
        `[batch, heads, num_chunks, chunk, value_dim]`, and the state after the last chunk.
    """
    state = empty_state(keys, values, state)
    keys, values, log_decay, beta = (in_chunks(t, chunk) for t in (keys, values, log_decay, beta))
    inside = log_decay.cumsum(-2)
    system = ((beta * keys) @ keys.transpose(-1, -2) * pairwise_decay(inside)).tril(-1)
    right = torch.cat([beta * values, beta * inside.exp() * keys], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, answers = solved.split([values.shape[-1], keys.shape[-1]], -1)
    total = inside[..., -1:, :]
    fading = (keys * (total - inside).exp()).transpose(-1, -2)
    befores, added = [], []
    for index in range(keys.shape[2]):
        befores.append(state)
        added.append(own[:, :, index] - answers[:, :, index] @ state)
        state = state * total[:, :, index].exp() + fading[:, :, index] @ added[-1]
    return torch.stack(befores, 2), torch.stack(added, 2), state
