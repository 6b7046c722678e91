"""The first tokens of a sequence, which stay visible behind a window: attention sinks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import Geometry
from .padding import take_tokens
from .tokens import Tokens


@dataclass(frozen=True)
class Sinks:
    """Tokens that stay visible behind the window; real ones first.

    Attributes:
        keys: `[batch, num_kv_heads, num_sinks, head_dim]`.
        values: `[batch, num_kv_heads, num_sinks, value_dim]`.
        index: `[batch, num_sinks]` key position of each sink, below zero for one that is older than all keys.
        valid: `[batch, num_sinks]` bool, False where no token stands yet.
    """

    keys: Tensor
    values: Tensor
    index: Tensor
    valid: Tensor

    def to_memory(self) -> dict[str, Tensor]:
        """As accumulators of a state, with the number of real tokens beside them."""
        filled = self.valid.sum(-1).to(self.keys.dtype)
        return {"sink_keys": self.keys, "sink_values": self.values, "sink_filled": filled}


def sink_shapes(geometry: Geometry, num_sinks: int) -> dict[str, tuple[int, ...]]:
    """The shapes of `Sinks.to_memory` for one sequence."""
    heads = geometry.num_kv_heads
    return {
        "sink_keys": (heads, num_sinks, geometry.head_dim),
        "sink_values": (heads, num_sinks, geometry.value_dim),
        "sink_filled": (),
    }


def filled_sinks(memory: Mapping[str, Tensor]) -> Tensor:
    """`[batch, num_sinks]` bool: which sinks of a memory hold a token."""
    filled = memory["sink_filled"][:, None]
    return torch.arange(memory["sink_keys"].shape[2], device=filled.device) < filled


def sink_tokens(num_sinks: int, memory: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
    """`[batch, S]` bool: which tokens are among the first `num_sinks` real ones, those of a memory counted.

    Args:
        num_sinks: how many there may be.
        memory: sinks of all tokens before, may be empty.
        tokens: those asked about.
    """
    real = tokens.real
    rank = real.cumsum(-1)
    if "sink_filled" in memory:
        rank = rank + memory["sink_filled"][:, None]
    return real & (rank <= num_sinks)


def first_tokens(num_sinks: int, memory: Mapping[str, Tensor], tokens: Tokens) -> Sinks:
    """The first `num_sinks` real tokens of a memory and of new tokens; arguments as for `sink_tokens`."""
    keys, values = tokens.keys, tokens.values
    batch, heads, num_keys, _ = keys.shape
    if not memory:
        shape = batch, heads, num_sinks
        memory = {
            "sink_keys": keys.new_zeros(*shape, keys.shape[-1]),
            "sink_values": values.new_zeros(*shape, values.shape[-1]),
            "sink_filled": keys.new_zeros(batch),
        }
    real = torch.cat([filled_sinks(memory), tokens.real], 1)
    keys, values = torch.cat([memory["sink_keys"], keys], 2), torch.cat([memory["sink_values"], values], 2)
    # Those of the memory are older than every key: outside of all windows to come.
    index = torch.arange(-num_sinks, num_keys, device=keys.device)
    index = torch.where(index < 0, -num_keys, index).expand(batch, -1)
    first = torch.argsort((~real).to(torch.uint8), dim=-1, stable=True)[:, :num_sinks]
    return Sinks(
        keys=take_tokens(keys, first),
        values=take_tokens(values, first),
        index=index.gather(1, first),
        valid=real.gather(1, first),
    )
