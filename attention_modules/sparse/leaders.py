"""Sparse methods that choose every so many tokens, for the tokens until the next time."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..geometry import Geometry
from ..padding import take_tokens
from ..state import AttentionState
from ..tokens import Call
from .base import CHOSEN, SparseAttention
from .options import BlockOptions
from .slots.canvas import Canvas
from .slots.scorers import PrefixScorer, Rows, block_shares

LEADER = "leader"


class LeaderOptions(BlockOptions):
    """Options of methods that choose every so many tokens.

    Attributes:
        interval: tokens of which the first, the leader, chooses for all, counted from each row's first real token.
    """

    interval: int = Field(4, ge=1)


class LeaderAttention(SparseAttention):
    """Each token attends to what its leader chose, and to all since its leader.

    A choice hangs on the leader and the keys up to it, so prompts, chunks and decoding agree; decoding keeps it. The
    first token of every `interval` leads it, unless a method says otherwise.
    """

    options: LeaderOptions
    # Whether leaders attend to all tokens, whatever they choose for those behind them.
    leads_dense: ClassVar[bool] = False

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Intervals begin where blocks do."""
        if options.block > 1 and options.block % options.interval:
            return f"interval={options.interval} does not divide block={options.block}"
        return super().why_unsupported(geometry, options)

    @property
    def earlier_queries(self) -> int:
        return self.options.interval - 1

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        """As many as the leader, and those since."""
        since = (rank - 1) % self.options.interval
        attended = super().tokens_attended(rank - since, total) + since
        return torch.where(since == 0, rank, attended) if self.leads_dense else attended

    def _most_pages(self, call: Call) -> int | None:
        """None: the short way is for tokens that choose anew each."""
        return None

    def _keep(self, call: Call, canvas: Canvas, columns: Tensor | None) -> Tensor:
        assert columns is not None
        position = canvas.positions(call.length).clamp_min(0)
        leader, led_by = self._leaders(call, position, canvas.count)
        shares = self._shares(leader, call, canvas, columns)
        keep = self._keep_by(shares, leader // self.slots.block, canvas.num_blocks)
        return self._with_since(take_tokens(keep, led_by), position, leader.gather(1, led_by))

    def _leaders(self, call: Call, position: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Who chooses.

        Args:
            call: of the layer.
            position: `[B, T]` int64, where its queries stand in their rows; 0 where they are padding.
            count: `[B]` int64, real tokens of each row.

        Returns:
            `[B, R]` int64, positions of tokens that choose; `[B, T]` int64, which of them leads each query.
        """
        interval = self.options.interval
        first = position[:, :1] // interval
        # As many as a row can touch.
        leaders = min((call.length - 2) // interval + 2, -(-call.tokens.length // interval))
        leader = (first + torch.arange(leaders, device=position.device)) * interval
        return torch.minimum(leader, (count[:, None] - 1).clamp_min(0)), position // interval - first

    def _shares(self, leader: Tensor, call: Call, canvas: Canvas, columns: Tensor) -> Tensor:
        """What each block is thought to hold by leaders at these positions `[B, R]`: `[B, KV, R, N]`."""
        scorer, blocks = self.slots.scorer, canvas.num_blocks
        assert scorer is not None
        rows = self._rows_of(leader, call, canvas)
        return block_shares(scorer, rows, columns, scaling=call.scaling, most=blocks, num_blocks=blocks)

    def _rows_of(self, leader: Tensor, call: Call, canvas: Canvas) -> Rows:
        """Leaders at these positions `[B, R]`, as the scorer sees them."""
        scorer, block = self.slots.scorer, self.slots.block
        assert scorer is not None
        queries = call.query if call.queries is None else call.queries.to(call.query.dtype)
        held = queries.shape[2]
        taken = take_tokens(queries.detach(), (leader + (held - canvas.count)[:, None]).clamp(0, held - 1))
        grouped = taken.unsqueeze(-2).unflatten(1, (self.geometry.num_kv_heads, -1)).transpose(2, 3)
        entries = scorer.of_queries(grouped)
        if not isinstance(scorer, PrefixScorer):
            return Rows(entries, leader // block, within=leader % block)
        own = take_tokens(scorer.of_prefixes(canvas.keys.detach()).flatten(2, 3), leader)
        return Rows(entries, leader // block - 1, own)

    def _with_since(self, keep: Tensor, position: Tensor, leader: Tensor) -> Tensor:
        """What leaders chose `[B, KV, T, N]`, with the blocks since them."""
        block = self.slots.block
        column = torch.arange(keep.shape[-1], device=keep.device)
        start = torch.where(position == leader, 0, leader) if self.leads_dense else leader
        number, start = ((t // block)[:, None, :, None] for t in (position, start))
        return keep | (column >= start) & (column <= number)

    def _choice_kept(self, call: Call, state: AttentionState) -> tuple[Tensor, Tensor]:
        tokens = call.tokens
        total = torch.full((len(call.query),), tokens.length, device=call.query.device)
        count = total if tokens.valid is None else tokens.valid.sum(-1).clamp_min(1)
        position = count - 1
        leaders, led_by = self._leaders(call, position[:, None], count)
        leader = leaders.gather(1, led_by)[:, 0]
        chosen, led = state.memory.get(CHOSEN), state.memory.get(LEADER)
        # A leader chooses, though one at its place did before: that one may have been taken back.
        if chosen is None or led is None or not _is_kept(led.flatten(), leader, position):
            keep = self._choice_of_leader(call, state, count, leader)
            column = torch.arange(keep.shape[-1], device=keep.device)
            chosen = torch.where(keep, column, -1).sort(-1, descending=True).values
            if chosen.device.type == "cpu":
                chosen = chosen[..., : int(keep.sum(-1).max())]
            state.memory[CHOSEN], state.memory[LEADER] = chosen, leader[:, None, None, None]
        indices = self._indices_since(chosen, position, leader, -(-tokens.length // self.slots.block))
        if self.counts_tokens:
            self._note((indices[:, :, 0] >= 0).sum(-1)[..., None] - 1, position[:, None])
        return indices, count

    def _indices_since(self, chosen: Tensor, position: Tensor, leader: Tensor, num_blocks: int) -> Tensor:
        """What leaders chose `[B, KV, 1, K]`, with the blocks since them, for tokens at these positions `[B]`."""
        block, number = self.slots.block, position // self.slots.block
        # The newest first, as far as they are not the leader's own block, which it chose.
        since = number[:, None] - torch.arange(-(-self.options.interval // block), device=number.device)
        since = since.masked_fill(since <= (leader // block)[:, None], -1)
        indices = torch.cat([since[:, None, None].expand(-1, chosen.shape[1], -1, -1), chosen], -1)
        if not self.leads_dense or (position.device.type == "cpu" and not bool((position == leader).any())):
            return indices
        everything = torch.arange(num_blocks, device=number.device)
        everything = everything.masked_fill(everything > number[:, None], -1)[:, None, None]
        width = max(everything.shape[-1], indices.shape[-1])
        everything, indices = (F.pad(t, (0, width - t.shape[-1]), value=-1) for t in (everything, indices))
        return torch.where((position == leader)[:, None, None, None], everything, indices)

    @torch.no_grad()
    def _choice_of_leader(self, call: Call, state: AttentionState, count: Tensor, leader: Tensor) -> Tensor:
        """What leaders at these positions `[B]` choose, `[B, KV, 1, N]`."""
        scorer, block = self.slots.scorer, self.slots.block
        assert scorer is not None
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        if isinstance(scorer, PrefixScorer) and _are_like(leader, count - 1):
            # The token leads itself, so that nothing but what is kept of whole blocks has to be looked at.
            number, blocks = leader // block, -(-call.tokens.length // block)
            columns = self._kept_columns(state, dtype).unflatten(-1, (scorer.columns, -1))
            rows = self._rows_of_one(call.over(call.query.to(dtype), call.tokens), count, number)
            shares = block_shares(scorer, rows, columns, scaling=call.scaling, most=blocks, num_blocks=blocks)
            return self._keep_by(shares, number[:, None], blocks)
        call = call.to(dtype)
        canvas = Canvas.of(call, block)
        shares = self._shares(leader[:, None], call, canvas, scorer.of_keys(canvas.keys))
        return self._keep_by(shares, leader[:, None] // block, canvas.num_blocks)


def _are_like(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal; on other devices than CPUs nobody waits for the answer."""
    return first.device.type == "cpu" and torch.equal(first, second)


def _is_kept(led: Tensor, leader: Tensor, position: Tensor) -> bool:
    """Whether what was chosen at `led` is what tokens at these positions attend, which do not lead themselves."""
    return _are_like(led, leader) and not bool((position == leader).any())
