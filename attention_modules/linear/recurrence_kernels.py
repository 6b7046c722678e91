"""The recurrences in Triton, for heads that need not be repeated.

- `queries` `[batch, num_heads, T, key_dim]` and `keys` `[batch, num_kv_heads, T, key_dim]`, activated,
- `values` `[batch, num_kv_heads, T, value_dim]`,
- `log_decay` `[batch, state_heads, T, 1 or key_dim]` and `beta` `[batch, state_heads, T, 1]`,
- `start` `[batch]` int32, tokens of padding that every row begins with, or None,
- `state` `[batch, state_heads, key_dim, value_dim]` before the first token, or None; the one they return is in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.chunk_linear.forward import chunk_linear
from ..kernels.delta_rule.forward import delta_rule


def decayed_kernels(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor,
    start: Tensor | None,
    state: Tensor | None,
    *,
    ones: bool,
) -> tuple[Tensor, Tensor]:
    """The mixture of values, with `ones` with one more column for the sum of weights; and the next state, likewise."""
    memory = None
    if state is not None:
        width = values.shape[-1]
        # The kernels keep that column in any case.
        state = F.pad(state, (0, width + 1 - state.shape[-1]))
        memory = state[..., :width], state[..., width]
    (numerator, denominator), (sums, normalizer) = chunk_linear(
        queries,
        keys,
        values,
        log_gates=log_decay.squeeze(-1) if log_decay.shape[-1] == 1 else log_decay,
        start=start,
        memory=memory,
        implementation="triton",
    )
    numerator = numerator.to(denominator.dtype)
    if not ones:
        return numerator, sums
    return torch.cat([numerator, denominator[..., None]], -1), torch.cat([sums, normalizer[..., None]], -1)


def delta_kernels(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    start: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the queries read from the states of the gated delta rule, and the state after the last token."""
    gates, strengths = log_decay.squeeze(-1), beta.squeeze(-1)
    out, last = delta_rule(queries, keys, values, gates, strengths, start=start, state=state)
    return out.float(), last
