"""Sparse methods that look at a few queries in full every so often, for all tokens until the next time."""

from abc import abstractmethod
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..geometry import Geometry
from ..state import AttentionState
from ..tokens import Call
from .base import SparseAttention
from .options import BlockOptions
from .slots.canvas import Canvas
from .slots.lines import Witnesses


class SegmentOptions(BlockOptions):
    """Options of methods that look at a few queries in full.

    Attributes:
        refresh: tokens until the lines are looked for anew, in whole blocks; the first so many attend to all.
        query: whose queries tell where the lines are: the last block of them before each `refresh` tokens, so that a
            token's output hangs on nothing behind it; or those that end the prompt, as published, for all of it.
    """

    refresh: int = Field(1024, ge=1)
    query: Literal["refresh", "prompt"] = "refresh"


class SegmentAttention(SparseAttention):
    """Blocks chosen by what the last block of queries before a segment saw."""

    options: SegmentOptions

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Segments are whole blocks."""
        if options.refresh % options.block:
            return f"block={options.block} does not divide refresh={options.refresh}"
        if options.query == "prompt" and options.decode == "sparse":
            return "query: prompt chooses by the end of a prompt, so it needs decode: dense"
        return super().why_unsupported(geometry, options)

    @property
    def earlier_queries(self) -> int:
        """Those of the last block before the segment in which a token stands."""
        return 0 if self.options.query == "prompt" else self.options.refresh + self.options.block - 1

    @property
    def blocks_first(self) -> int:
        """Blocks that a row begins with which attend to all before them."""
        options = self.options
        return max(options.dense_len, options.refresh if options.query == "refresh" else 0) // options.block

    @abstractmethod
    def _keep_segment(self, call: Call, canvas: Canvas, seen: Witnesses, by_blocks: Tensor | None) -> Tensor:
        """What all blocks of queries attend if they see what these queries saw: `[B, KV, R, N]` bool.

        Args:
            call: of the layer.
            canvas: of the call.
            seen: the queries before the segment.
            by_blocks: what each block of queries chooses by itself, if the method has a scorer.
        """

    def _keep(self, call: Call, canvas: Canvas, columns: Tensor | None) -> Tensor:
        options, block = self.options, self.slots.block
        by_blocks = None if columns is None else super()._keep(call, canvas, columns)
        queries = call.query if call.queries is None else call.queries.to(call.query.dtype)
        if options.query == "prompt":
            seen = Witnesses.before(canvas.count, queries, canvas, number=block)
            return self._with_forced(self._keep_segment(call, canvas, seen, by_blocks), canvas)
        length = options.refresh // block
        segment = canvas.number // length
        # As many as a row can touch; without padding all rows begin at the same place.
        offset = call.past // block % length if call.tokens.valid is None else length - 1
        shape = len(call.query), self.geometry.num_kv_heads, canvas.num_rows, canvas.num_blocks
        keep = torch.zeros(shape, dtype=torch.bool, device=call.query.device)
        for step in range((offset + canvas.num_rows - 1) // length + 1):
            own = segment[:, :1] + step
            seen = Witnesses.before(own[:, 0] * options.refresh, queries, canvas, number=block)
            found = self._keep_segment(call, canvas, seen, by_blocks)
            keep = torch.where((segment == own)[:, None, :, None], found, keep)
        return self._with_forced(keep, canvas)

    def _with_forced(self, keep: Tensor, canvas: Canvas) -> Tensor:
        number = canvas.number[:, None, :, None]
        column = torch.arange(canvas.num_blocks, device=keep.device)
        forced = self.slots.forced.of(canvas.number, canvas.num_blocks)
        return (keep | (number < self.slots.dense_blocks)) & (column <= number) | forced

    def _choice_of_one(self, call: Call, state: AttentionState, count: Tensor, number: Tensor) -> Tensor:
        call = call.to(torch.promote_types(call.query.dtype, torch.float32))
        canvas = Canvas.of(call, self.slots.block)
        return self._keep(call, canvas, self._columns(call, canvas))
