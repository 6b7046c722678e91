"""What the chunk kernels' launches share: sizes, blocks, room for sums, and the pass that fills them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launching import block, launch, precision, state_dtype

Terms = tuple[Tensor, Tensor]
# With a gate for each channel more of a chunk is held at a time.
VECTOR_CHUNK = 32


class Layout:
    """Sizes, constants and flags that the launches over one set of tensors share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: Tensor | None,
        start: Tensor | None,
        chunk: int,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        self.batch, self.heads, self.length, self.features = query.shape
        self.width, self.num_keys = value.shape[-1], key.shape[2]
        self.state_heads = max(key.shape[1], 0 if gates is None else gates.shape[1])
        self.num_chunks, self.sequences = -(-self.length // chunk), self.batch
        self.bounds: Tensor | None = None
        offsets = None
        if cu_seqlens is not None:
            self.sequences = cu_seqlens.shape[0] - 1
            self.bounds, offsets = packed_chunks(cu_seqlens, self.length, chunk)
            self.num_chunks = self.bounds.shape[0]
        self.chunk = chunk
        self.chunks = {"bounds": self.bounds, "num_chunks": self.num_chunks}
        self.walks = {**self.chunks, "offsets": offsets}
        self.dtype = query.dtype
        sizes = {"HS": self.state_heads, "K": self.features, "V": self.width, "CHUNK": chunk}
        blocks = {"BK": block(self.features, query.dtype), "BV": block(self.width, query.dtype)}
        self.shared = {**sizes, **blocks, "HAS_GATES": gates is not None, **precision(query.dtype)}
        self.vector = {"VECTOR": gates is not None and gates.ndim == 4}
        self.starts = {"HAS_START": start is not None}
        self.key_heads = {"HK": key.shape[1]}
        self.value_heads = {"HV": value.shape[1]}
        self.query_heads = {"H": self.heads}
        self.blocks_k = -(-self.features // blocks["BK"])
        self.blocks_v = -(-self.width // blocks["BV"])
        self.states = self.batch * self.state_heads

    def sums(self, like: Tensor) -> Terms:
        """Room for the sums at every chunk."""
        shape = self.states, self.num_chunks, self.features, self.width
        return like.new_empty(shape, dtype=state_dtype(like.dtype)), like.new_empty(shape[:3], dtype=torch.float32)

    def last(self, like: Tensor) -> Terms:
        """Room for one set of sums of every sequence, fp32."""
        shape = self.sequences, self.state_heads, self.features, self.width
        return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape[:3], dtype=torch.float32)


def packed_chunks(cu_seqlens: Tensor, length: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Where the chunks of packed sequences start and end `[num_chunks, 2]`, and each one's first chunk, int32.

    As many chunks as there can be at most, so that no number has to come from the device; those too many are empty.
    """
    counts = -(-cu_seqlens.diff() // chunk)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    index = torch.arange(length // chunk + counts.shape[0], device=cu_seqlens.device)
    owner = torch.searchsorted(offsets[1:], index, right=True).clamp_max(counts.shape[0] - 1)
    end = cu_seqlens[owner + 1]
    first = torch.minimum(cu_seqlens[owner] + (index - offsets[owner]) * chunk, end)
    return torch.stack([first, torch.minimum(first + chunk, end)], -1).int(), offsets.int()


def packed_sequences(cu_seqlens: Tensor | None) -> int:
    """How many there are, 0 without packing."""
    return 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def owners(cu_seqlens: Tensor, length: int) -> Tensor:
    """`[length]` which of packed sequences each token belongs to."""
    return torch.searchsorted(cu_seqlens[1:], torch.arange(length, device=cu_seqlens.device), right=True)


def summed_gates(gates: Tensor | None, layout: Layout) -> Tensor | None:
    """Log decays `[batch, state_heads, T]` or `[..., feature_dim]` summed up inside each chunk, fp32."""
    if gates is None:
        return None
    if layout.bounds is None:
        behind = (0, 0) * (gates.ndim - 3) + (0, -layout.length % layout.chunk)
        padded = F.pad(gates.float(), behind).unflatten(2, (-1, layout.chunk))
        sums: Tensor = padded.cumsum(3).flatten(2, 3)[:, :, : layout.length]
        return sums.contiguous()
    index = layout.bounds[:, :1] + torch.arange(layout.chunk, device=gates.device)
    taken = gates.float()[:, :, index.clamp_max(layout.length - 1)]
    outside = (index >= layout.bounds[:, 1:]).view(*index.shape, *[1] * (gates.ndim - 3))
    by_chunk = taken.masked_fill(outside, 0.0).cumsum(3)
    tokens = torch.arange(layout.length, device=gates.device)
    owner = torch.searchsorted(layout.bounds[:, 0].contiguous(), tokens, right=True) - 1
    return by_chunk[:, :, owner, tokens - layout.bounds[owner, 0]].contiguous()


def run_states(
    layout: Layout, arguments: dict[str, Any], first_sums: Tensor | None, first_norm: Tensor | None
) -> tuple[Terms, Terms]:
    """Sums before every chunk, and after the last."""
    from .chunk_kernels import chunk_states

    (sums, norms), (last_sums, last_norm) = layout.sums(arguments["k"]), layout.last(arguments["k"])
    written = {"sums": sums, "norms": norms, "last_sums": last_sums, "last_norm": last_norm}
    launch(
        chunk_states,
        (layout.blocks_k, layout.blocks_v, layout.sequences * layout.state_heads),
        {**arguments, **layout.walks, "first_sums": first_sums, "first_norm": first_norm, **written},
        {
            **layout.shared,
            **layout.starts,
            **layout.key_heads,
            **layout.value_heads,
            **layout.vector,
            "HAS_FIRST": first_sums is not None,
        },
        num_warps=8,
    )
    return (sums, norms), (last_sums, last_norm)


def chunk_weights(layout: Layout, query: Tensor, keys: dict[str, Any]) -> Tensor | None:
    """With gates for each channel, what the keys of each chunk weigh for its queries; else None."""
    from .vector_kernels import vector_weights

    if not layout.vector["VECTOR"]:
        return None
    rows = layout.batch * layout.heads
    weights = query.new_empty((rows, layout.num_chunks, layout.chunk, layout.chunk), dtype=state_dtype(query.dtype))
    names = ("HS", "K", "CHUNK", "BK", "COMPUTE", "PRECISION")
    arguments = {name: keys[name] for name in ("k", "gates", "start")}
    launch(
        vector_weights,
        (layout.num_chunks, rows),
        {"q": query, **arguments, **layout.chunks, "weights": weights, "length": layout.length},
        {**{name: layout.shared[name] for name in names}, **layout.starts, **layout.query_heads, **layout.key_heads},
        num_warps=8,
        num_stages=1,
    )
    return weights


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor as the kernels read it: row after row."""
    if tensor is None:
        return None
    rows: Tensor = tensor.contiguous()
    return rows
