"""Sparse attention whose choice is learned: small projections foretell where a frozen layer looks.

Letters in shapes: those of `slots.canvas`; `E` entries of what stands for queries and keys, `P` parts of a row.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..contract import Memory
from ..state import AttentionState
from ..tokens import Call
from ..window import MASKED
from .base import CHOSEN, SparseAttention
from .executors.masked import attend_masked
from .slots.canvas import Canvas, in_blocks
from .slots.slots import queries_before

# Logits of all KV heads that are held at a time: 64 MiB in fp32.
MOST_LOGITS = 1 << 24


class LearnedChoice(SparseAttention):
    """Blocks by logits that parameters make of queries and keys; the stage `gate` trains them.

    The own block is always attended, so the logits are of the blocks before it alone. A choice hands on no gradients:
    it is learned from the layer's own attention, not from the model's loss.
    """

    # What is summed up of a block: `keys`, or a signal of the tokens.
    summarized: ClassVar[str] = "keys"

    @property
    def earlier_queries(self) -> int:
        return queries_before(self.slots.by, self.slots.block)

    @property
    def queries_together(self) -> int:
        """Queries that share a choice."""
        return 1 if self.slots.by == "token" else self.slots.block

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        """As any module, but what was learned for other heads is answered in one sentence."""
        given = {
            name: state_dict[prefix + name] for name in dict(self.named_parameters()) if prefix + name in state_dict
        }
        others = [name for name, t in given.items() if t.shape != self.get_parameter(name).shape]
        if not others:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        name = others[0]
        # The last of what torch hands on: all errors are reported together.
        args[-1].append(
            f"{prefix}{name} was fitted on another model, or for other options: it is "
            f"{_by(given[name])}, and this layer's is {_by(self.get_parameter(name))}; fit {self.name!r} on this model "
            "(stage gate)"
        )

    @abstractmethod
    def of_queries(self, queries: Tensor, places: Tensor, scaling: float) -> Tensor:
        """What stands for rows of queries.

        Args:
            queries: `[B, KV, R, G, any, D]`, those that choose.
            places: `[B, R]` fp32, tokens before the middle of what they choose for.
            scaling: factor on query-key products.

        Returns:
            `[B, KV, R, P, E]`.
        """

    @abstractmethod
    def of_keys(self, blocks: Tensor) -> Tensor:
        """What stands for blocks of what is summed up: `[B, KV, N, block, D]` → `[B, KV, N, E]`."""

    def at_places(self, columns: Tensor) -> Tensor:
        """What stands for the first N blocks of each row, `[B, KV, N, E]`, told apart by where they are."""
        return columns

    @abstractmethod
    def logits(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`[B, KV, R, P, E]` and `[B, KV, N, E]`, as far as they go, → `[B, KV, R, N]`."""

    def stand_ins(self, call: Call) -> tuple[Tensor, Tensor]:
        """What stands for queries and for keys in a call, with gradients to parameters.

        Args:
            call: in fp32 or fp64.

        Returns:
            rows `[B, KV, R, P, E]` and columns `[B, KV, N, E]`.
        """
        canvas = Canvas.of(call, self.slots.block)
        return self._rows_of(call, canvas), self._columns(call, canvas)

    def _rows_of(self, call: Call, canvas: Canvas) -> Tensor:
        number, block = canvas.number.float(), self.slots.block
        if self.slots.by == "token":
            places = canvas.positions(call.length).clamp_min(0).float()
        else:
            places = number * block + (0 if self.slots.by == "first" else (block - 1) / 2)
        return self.of_queries(self._choosing(call, canvas), places, call.scaling)

    def _columns(self, call: Call, canvas: Canvas) -> Tensor:
        tokens = call.tokens
        held = tokens.keys if self.summarized == "keys" else tokens.signals[self.summarized]
        blocks = in_blocks(held.detach().to(call.query.dtype), tokens.valid, self.slots.block)
        return self.at_places(self.of_keys(blocks))

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        """Where each token chooses, by strips of queries, so that memory takes no queries by keys."""
        if self.slots.by != "token" or self._is_dense(call):
            return super().attend_torch(call, memory)
        memory.pop(CHOSEN, None)
        canvas = Canvas.of(call, self.slots.block)
        with torch.no_grad():
            rows, columns = self._rows_of(call, canvas), self._columns(call, canvas)
        position, counts = canvas.positions(call.length), []

        @torch.no_grad()
        def visible(start: int, stop: int) -> Tensor:
            number = position[:, start:stop].clamp_min(0) // self.slots.block
            shares = self._shares(rows[:, :, start:stop], columns, number, canvas.num_blocks)
            keep = self._keep_by(shares, number, canvas.num_blocks)
            counts.append(keep.sum(-1) - 1)
            return self._seen(call, canvas, keep, start, stop)

        out = attend_masked(call, visible)
        if self.counts_tokens:
            self._note(torch.cat(counts, -1), position)
        return out

    def _keep(self, call: Call, canvas: Canvas, columns: Tensor | None) -> Tensor:
        assert columns is not None
        number = canvas.number
        if self.slots.by == "token":
            number = canvas.positions(call.length).clamp_min(0) // self.slots.block
        shares = self._shares(self._rows_of(call, canvas), columns, number, canvas.num_blocks)
        return self._keep_by(shares, number, canvas.num_blocks)

    def _shares(self, rows: Tensor, columns: Tensor, number: Tensor, num_blocks: int) -> Tensor:
        """`[B, KV, R, N]`: softmax over the blocks before those in which rows stand, `number` `[B, R]`; 0 elsewhere."""
        earlier = torch.arange(columns.shape[2], device=number.device) < number[:, None, :, None]
        shares = rows.new_zeros(*rows.shape[:3], num_blocks)
        strip = max(1, MOST_LOGITS // max(rows[:, :, 0, 0, 0].numel() * num_blocks, 1))
        for start in range(0, rows.shape[2], strip):
            part, seen = slice(start, start + strip), earlier[:, :, start : start + strip]
            logits = self.logits(rows[:, :, part], columns).masked_fill(~seen, MASKED)
            shares[:, :, part, : columns.shape[2]] = logits.softmax(-1) * seen
        return shares

    @torch.no_grad()
    def _choice_of_one(self, call: Call, state: AttentionState, count: Tensor, number: Tensor) -> Tensor:
        dtype, block = torch.promote_types(call.query.dtype, torch.float32), self.slots.block
        call = call.over(call.query.to(dtype), call.tokens)
        # A canvas of which nothing but its place is asked.
        nothing = call.tokens.keys[:, :, :1, None]
        canvas = Canvas(block, count, count - 1, number[:, None], nothing, nothing)

        def summarize(blocks: Tensor) -> Tensor:
            return self.of_keys(blocks.to(dtype))

        columns = self.at_places(state.summaries("columns", block, summarize, of=self.summarized).to(dtype))
        num_blocks = -(-call.tokens.length // block)
        shares = self._shares(self._rows_of(call, canvas), columns, number[:, None], num_blocks)
        return self._keep_by(shares, number[:, None], num_blocks)


def _by(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
