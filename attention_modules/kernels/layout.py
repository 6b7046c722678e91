"""What the chunk kernels' launches share: sizes, blocks, room for sums, and the pass that fills them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .launching import block, launch, precision, state_dtype

Terms = tuple[Tensor, Tensor]


class Layout:
    """Sizes, constants and flags that the launches over one set of tensors share."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, gates: Tensor | None, start: Tensor | None, chunk: int
    ) -> None:
        self.batch, self.heads, self.length, self.features = query.shape
        self.width, self.num_keys = value.shape[-1], key.shape[2]
        self.state_heads = max(key.shape[1], 0 if gates is None else gates.shape[1])
        self.num_chunks = -(-self.length // chunk)
        self.dtype = query.dtype
        sizes = {"HS": self.state_heads, "K": self.features, "V": self.width, "CHUNK": chunk}
        blocks = {"BK": block(self.features, query.dtype), "BV": block(self.width, query.dtype)}
        self.shared = {**sizes, **blocks, "HAS_GATES": gates is not None, **precision(query.dtype)}
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
        """Room for one set of sums, fp32."""
        shape = self.batch, self.state_heads, self.features, self.width
        return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape[:3], dtype=torch.float32)


def summed_gates(gates: Tensor | None, chunk: int) -> Tensor | None:
    """Log decays summed up inside each chunk, fp32."""
    if gates is None:
        return None
    length = gates.shape[-1]
    padded = F.pad(gates.float(), (0, -length % chunk)).unflatten(-1, (-1, chunk))
    sums: Tensor = padded.cumsum(-1).flatten(-2)[..., :length]
    return sums.contiguous()


def run_states(
    layout: Layout, arguments: dict[str, Any], first_sums: Tensor | None, first_norm: Tensor | None
) -> tuple[Terms, Terms]:
    """Sums before every chunk, and after the last."""
    from .chunk_kernels import chunk_states

    (sums, norms), (last_sums, last_norm) = layout.sums(arguments["k"]), layout.last(arguments["k"])
    written = {"sums": sums, "norms": norms, "last_sums": last_sums, "last_norm": last_norm}
    launch(
        chunk_states,
        (layout.blocks_k, layout.blocks_v, layout.states),
        {**arguments, "first_sums": first_sums, "first_norm": first_norm, **written},
        {
            **layout.shared,
            **layout.starts,
            **layout.key_heads,
            **layout.value_heads,
            "HAS_FIRST": first_sums is not None,
        },
        num_warps=8,
    )
    return (sums, norms), (last_sums, last_norm)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor as the kernels read it: row after row."""
    if tensor is None:
        return None
    rows: Tensor = tensor.contiguous()
    return rows
