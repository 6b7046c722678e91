"""Sparse attention: exact softmax over blocks of tokens that are chosen for each block of queries.

What differs from method to method stands in its slots: what stands for a block of keys, how it is scored, how many are
chosen, whose queries choose. Here they are wired: prefill, chunks and decoding choose alike, from each row's first real
token on, and only what was chosen is computed.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import AttentionModule
from ..contract import AttentionOptions, Memory
from ..geometry import Geometry
from ..kernels.block_gather.decode import decode_blocks, decode_problem
from ..kernels.block_gather.gather import block_gather, gather_problem
from ..kernels.selection import needs_package, use_triton
from ..padding import padding_before, take_tokens
from ..softmax import attend_dense, attend_dense_naive, decode_dense
from ..state import AttentionState
from ..tokens import Call, Tokens
from .executors.gathered import attend_gathered
from .executors.masked import attend_masked, attend_masked_naive
from .executors.one_token import attend_one
from .executors.pages import attend_pages, choose_pages
from .slots.canvas import Canvas
from .slots.scorers import PrefixScorer, Rows, block_shares
from .slots.selectors import TopBlocks, TopMass, indices_of
from .slots.slots import Slots

CHOSEN = "chosen"


class SparseAttention(AttentionModule):
    """Softmax over chosen blocks; what is not chosen is not seen.

    A preset derives from this class and says which `slots` its options mean.
    """

    implementations: ClassVar[tuple[str, ...]] = ("auto", "naive", "torch", "triton")
    is_recurrent = False

    def __init__(self, geometry: Geometry, options: AttentionOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        self.slots = self.make_slots()
        dense = {"prefill": not self.slots.prefill, "decode": not self.slots.decode}
        self.dense_in = frozenset(name for name, is_dense in dense.items() if is_dense)
        self.telling_share = self.slots.selector.telling_share

    @abstractmethod
    def make_slots(self) -> Slots:
        """What the options mean."""

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Choices are made in the order of time, and one token is no block."""
        if getattr(options, "query", None) == "block" and options.decode == "sparse":
            return "query: block chooses for whole blocks of a prompt, so it needs decode: dense"
        if geometry.causal:
            return None
        return f"{cls.name!r} chooses in the order of time, so it cannot serve a bidirectional layer"

    @property
    def earlier_queries(self) -> int:
        return self.slots.earlier_queries

    def state_bytes(self, batch: int, length: int, dtype: torch.dtype) -> int:
        """Keys and values of all tokens, and the queries that the next choice looks at."""
        held = min(length, self.earlier_queries)
        queries = batch * held * self.geometry.num_heads * self.geometry.head_dim * dtype.itemsize
        return super().state_bytes(batch, length, dtype) + queries

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        """About as many as a choice among like keys attends; `counting` counts those that were."""
        block, slots = self.slots.block, self.slots
        number = (rank - 1).clamp_min(0) // block
        blocks, forced = slots.selector.expected(number), slots.forced.number_of(number)
        # Those that hold the mass may be others than those that are attended anyway.
        blocks = blocks + forced - 1 if isinstance(slots.selector, TopMass) else torch.maximum(blocks, forced)
        blocks = torch.where(number < slots.dense_blocks, number + 1, torch.minimum(blocks, number + 1))
        return (blocks - 1) * block + (rank - 1) % block + 1

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        memory.pop(CHOSEN, None)
        if self._is_dense(call):
            self._note_all(call)
            return attend_dense_naive(call, causal=True)
        canvas = Canvas.of(call, self.slots.block)
        chosen = self._visible(call, canvas, self._choice(call, canvas), 0, call.length)
        return self.naive_with_rest(attend_masked_naive(call, chosen), call, chosen)

    def naive_with_rest(self, out: Tensor, call: Call, chosen: Tensor) -> Tensor:
        """As `with_rest`, every weight written out, where `chosen` `[B, KV, T, S]` bool are attended."""
        return out

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        """By gathering on a CPU, where that pays for whole blocks of queries; else under a mask."""
        # What was chosen for a block holds for tokens that come one by one, until others come.
        memory.pop(CHOSEN, None)
        if self._is_dense(call):
            self._note_all(call)
            return attend_dense(call, causal=True)
        canvas = Canvas.of(call, self.slots.block)
        keep = self._choice(call, canvas)
        if self.slots.by == "token" or call.query.device.type != "cpu":
            out = attend_masked(call, lambda start, stop: self._visible(call, canvas, keep, start, stop))
            return self.with_rest(out, call, canvas, keep)
        indices = indices_of(keep, canvas.number, _width(keep))
        queries = canvas.query_blocks(call.query)
        blocks = attend_gathered(queries, canvas.keys, canvas.values, indices, scaling=call.scaling)
        return self.with_rest(canvas.unblock(blocks, call.length), call, canvas, keep)

    def with_rest(self, out: Tensor, call: Call, canvas: Canvas, keep: Tensor) -> Tensor:
        """What becomes of the outputs by way of the blocks that were not chosen: nothing, unless a method says so.

        Args:
            out: `[B, heads, T, V]`.
            call: queries and tokens.
            canvas: the same in blocks.
            keep: what was chosen, see `_choice`.
        """
        return out

    def one_with_rest(self, out: Tensor, call: Call, state: AttentionState) -> Tensor:
        """The same for one token, whose choice `_choice_of_one` has made."""
        return out

    @needs_package
    def attend_triton(self, call: Call, memory: Memory) -> Tensor | None:
        """By gathering, where whole blocks of queries choose."""
        if self._is_dense(call):
            return None
        call = call.in_one_dtype()
        tensors = call.query, call.tokens.keys, call.tokens.values
        problem = gather_problem(*tensors, self.slots.block)
        # One query is a block of them.
        if self.slots.by == "token" and call.length > 1:
            problem = f"with {self.name!r} each token chooses for itself, and the kernels gather for blocks of queries"
        if not use_triton(self.implementation, problem, call.query.device):
            return None
        # As in the torch form.
        memory.pop(CHOSEN, None)
        canvas, keep = self._exact_choice(call)
        indices, start = indices_of(keep, canvas.number, _width(keep)), padding_before(call.tokens.valid)
        out = block_gather(*tensors, indices, scaling=call.scaling, block=self.slots.block, start=start)[0]
        return self.with_rest(out, call, canvas, keep)

    @needs_package
    @torch.no_grad()
    def _exact_choice(self, call: Call) -> tuple[Canvas, Tensor]:
        """What `_choice` gives by queries and keys in full precision, as the torch form chooses, and its canvas."""
        dtype, tokens = torch.promote_types(call.query.dtype, torch.float32), call.tokens
        # No choice looks at values, which need not be laid out again.
        seen = Tokens(tokens.keys.to(dtype), tokens.values[..., :0], tokens.valid, tokens.positions, tokens.signals)
        call = call.over(call.query.to(dtype), seen)
        canvas = Canvas.of(call, self.slots.block)
        return canvas, self._choice(call, canvas)

    def decode_torch(self, call: Call, state: AttentionState) -> Tensor:
        """The chosen blocks alone are read; a choice is made where a block begins, or for each token."""
        tokens = state.append(call.tokens)
        call = call.over(call.query, tokens)
        if not self.slots.decode:
            self._note_all(call)
            return decode_dense(call)
        if (most := self._most_pages(call)) is not None:
            return self._attend_pages(call, state, most)
        indices, count = self._choice_kept(call, state)
        out = attend_one(call.query, tokens, indices, count, block=self.slots.block, scaling=call.scaling)
        return self.one_with_rest(out, call, state)

    @needs_package
    def decode_triton(self, call: Call, state: AttentionState) -> Tensor | None:
        """The chosen blocks by a kernel, out of the cache as it lies."""
        device = call.query.device
        if not self.slots.decode or (self.implementation != "triton" and device.type != "cuda"):
            return None
        problem = decode_problem(call.query, call.tokens.keys, call.tokens.values)
        # Where Triton was asked for, a call like others says why not.
        if self.implementation == "triton" and problem is not None:
            return None
        if not use_triton(self.implementation, problem, device):
            return None
        call = call.over(call.query, state.append(call.tokens))
        indices, _ = self._choice_kept(call, state)
        tensors, start = (call.query, call.tokens.keys, call.tokens.values), padding_before(call.tokens.valid)
        out = decode_blocks(*tensors, indices, scaling=call.scaling, block=self.slots.block, start=start)
        return self.one_with_rest(out, call, state)

    def _choice_kept(self, call: Call, state: AttentionState) -> tuple[Tensor, Tensor]:
        """What the token of a call attends, `[B, KV, 1, K]`, kept where it holds for a block; `[B]` real tokens."""
        tokens = call.tokens
        # A row of padding looks at whatever stands last.
        total = torch.full((len(call.query),), tokens.length, device=call.query.device)
        count = total if tokens.valid is None else tokens.valid.sum(-1).clamp_min(1)
        number = (count - 1) // self.slots.block
        indices = state.memory.get(CHOSEN)
        if indices is None or self.slots.by == "token" or not _is_of(indices, count - 1, self.slots.block):
            keep = self._choice_of_one(call, state, count, number)
            indices = indices_of(keep, number[:, None], _width(keep))
            state.memory[CHOSEN] = indices
        if self.counts_tokens:
            seen = (indices[:, :, 0] >= 0).sum(-1) - 1
            self._note(seen[..., None], (count - 1)[:, None])
        return indices, count

    def _most_pages(self, call: Call) -> int | None:
        """Pages that the one token of a call chooses for itself, its own included, if their number is certain."""
        slots, tokens, selector = self.slots, call.tokens, self.slots.selector
        if slots.by != "token" or not isinstance(selector, TopBlocks) or tokens.valid is not None:
            return None
        if not isinstance(slots.scorer, PrefixScorer) or call.query.device.type != "cpu":
            return None
        number = (tokens.length - 1) // slots.block
        # Where all are attended, so many pages lie beside one another that there is nothing to choose.
        return selector.number_in(number) if number >= slots.dense_blocks and slots.scorer.columns == 1 else None

    @torch.no_grad()
    def _attend_pages(self, call: Call, state: AttentionState, most: int) -> Tensor:
        slots = self.slots
        assert isinstance(slots.scorer, PrefixScorer)
        query = call.query.to(torch.promote_types(call.query.dtype, torch.float32))
        columns, block, scaling = self._kept_columns(state, query.dtype), slots.block, call.scaling
        pages = choose_pages(
            slots.scorer, query, call.tokens, columns, block=block, most=most, forced=slots.forced, scaling=scaling
        )
        if self.counts_tokens:
            position = torch.full((len(query), 1), call.tokens.length - 1, device=query.device)
            seen = torch.full((*pages.shape[:2], 1), pages.shape[2], device=query.device)
            self._note(seen, position)
        return attend_pages(call.query, call.tokens, pages, block=block, scaling=scaling)

    def _kept_columns(self, state: AttentionState, dtype: torch.dtype) -> Tensor:
        """What stands for each whole block of a state, `[B, KV, n, C * E]`; kept, so that each is made once."""
        scorer = self.slots.scorer
        assert scorer is not None

        def summarize(blocks: Tensor) -> Tensor:
            columns: Tensor = scorer.of_keys(blocks.to(dtype)).flatten(-2)
            return columns

        return state.summaries("columns", self.slots.block, summarize)

    def _is_dense(self, call: Call) -> bool:
        return not (self.slots.decode if call.length == 1 else self.slots.prefill)

    @torch.no_grad()
    def _choice(self, call: Call, canvas: Canvas) -> Tensor:
        """What is attended: `[B, KV, R, N]` bool by blocks of queries, or `[B, KV, T, N]` by each."""
        keep = self._keep(call, canvas, self._columns(call, canvas))
        if self.counts_tokens:
            position = canvas.positions(call.length)
            seen = keep.sum(-1)[..., None] - 1
            seen = seen if self.slots.by == "token" else canvas.spread(seen, call.length)
            self._note(seen[..., 0], position)
        return keep

    def _columns(self, call: Call, canvas: Canvas) -> Tensor | None:
        """What stands for each block of keys, `[B, KV, N, C, E]`."""
        return None if self.slots.scorer is None else self.slots.scorer.of_keys(canvas.keys.detach())

    def _keep(self, call: Call, canvas: Canvas, columns: Tensor | None) -> Tensor:
        """See `_choice`."""
        slots, number, most = self.slots, canvas.number, canvas.num_blocks - canvas.num_rows + 1
        if slots.by == "token":
            number, most = canvas.positions(call.length).clamp_min(0) // slots.block, canvas.num_blocks
        shares = None
        if slots.scorer is not None and columns is not None:
            rows, blocks = self._rows(call, canvas), canvas.num_blocks
            shares = block_shares(slots.scorer, rows, columns, scaling=call.scaling, most=most, num_blocks=blocks)
        return self._keep_by(shares, number, canvas.num_blocks)

    def _keep_by(self, shares: Tensor | None, number: Tensor, num_blocks: int) -> Tensor:
        """What is attended by queries in the blocks `number` `[B, R]`: `[B, KV, R, N]`."""
        slots, heads = self.slots, self.geometry.num_kv_heads
        if shares is None:
            shares = torch.zeros(len(number), heads, number.shape[1], num_blocks, device=number.device)
        forced = slots.forced.of(number, num_blocks)
        keep = slots.selector.keep(shares, number, forced)
        if slots.dense_blocks:
            column = torch.arange(num_blocks, device=number.device)
            number = number[:, None, :, None]
            keep = keep | (number < slots.dense_blocks) & (column <= number)
        return keep

    def _choosing(self, call: Call, canvas: Canvas) -> Tensor:
        """The queries that choose, `[B, KV, R, G, any, D]`; R are blocks of queries, or queries where each chooses."""
        query = call.unrotated_query if self.reads_unrotated else call.query
        assert query is not None
        query = query.detach().to(call.query.dtype)
        if self.slots.by == "token":
            each: Tensor = query.unsqueeze(-2).unflatten(1, (self.geometry.num_kv_heads, -1)).transpose(2, 3)
            return each
        if self.slots.by == "block":
            return canvas.query_blocks(query)
        queries = query if call.queries is None else call.queries.detach().to(query.dtype)
        if self.slots.by == "previous":
            return canvas.query_blocks(queries, back=1)
        return canvas.query_blocks(queries)[..., :1, :]

    def _rows(self, call: Call, canvas: Canvas) -> Rows:
        """The queries that choose, as the scorer sees them."""
        slots, scorer = self.slots, self.slots.scorer
        assert scorer is not None
        entries = scorer.of_queries(self._choosing(call, canvas))
        if slots.by == "token":
            position = canvas.positions(call.length).clamp_min(0)
            if not isinstance(scorer, PrefixScorer):
                return Rows(entries, position // slots.block, within=position % slots.block)
            own = take_tokens(scorer.of_prefixes(canvas.keys.detach()).flatten(2, 3), position)
            return Rows(entries, position // slots.block - 1, own)
        if slots.by == "block":
            return Rows(entries, canvas.number)
        if slots.by == "previous":
            return Rows(entries, canvas.number - 1)
        of_first = scorer.of_prefixes if isinstance(scorer, PrefixScorer) else scorer.of_keys
        own = take_tokens(of_first(canvas.keys.detach()[..., :1, :]).flatten(2, 3), canvas.number)
        return Rows(entries, canvas.number - 1, own)

    def _visible(self, call: Call, canvas: Canvas, keep: Tensor, start: int, stop: int) -> Tensor:
        """`[B, KV, stop - start, S]` bool: which tokens the queries from one to another attend."""
        kept = keep if self.slots.by == "token" else canvas.spread(keep, call.length)
        return self._seen(call, canvas, kept[:, :, start:stop], start, stop)

    def _seen(self, call: Call, canvas: Canvas, kept: Tensor, start: int, stop: int) -> Tensor:
        """The same of the blocks `kept` `[B, KV, stop - start, N]` of those queries."""
        position = canvas.positions(call.length)[:, start:stop]
        total = call.tokens.length
        place = torch.arange(total, device=kept.device) - (total - canvas.count)[:, None]
        block = (place // self.slots.block).clamp_min(0)[:, None, None]
        seen = kept.gather(-1, block.expand(-1, kept.shape[1], kept.shape[2], -1))
        seen = seen & (place[:, None] <= position[..., None])[:, None] & (place >= 0)[:, None, None]
        # Rows of padding look at themselves, so that no kernel divides zero by zero.
        own = torch.arange(call.past + start, call.past + stop, device=kept.device)[:, None]
        itself = torch.arange(total, device=kept.device) == own
        return seen | (itself & (position < 0)[..., None])[:, None]

    @torch.no_grad()
    def _choice_of_one(self, call: Call, state: AttentionState, count: Tensor, number: Tensor) -> Tensor:
        """What the token of a call attends, `[B, KV, 1, N]`."""
        scorer, block = self.slots.scorer, self.slots.block
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        num_blocks = -(-call.tokens.length // block)
        if scorer is None:
            return self._keep_by(None, number[:, None], num_blocks)
        if not scorer.is_compact:
            call = call.to(dtype)
            canvas = Canvas.of(call, block)
            return self._keep(call, canvas, self._columns(call, canvas))

        # The last block, where it is not whole, is the own one, which is not among them.
        columns = self._kept_columns(state, dtype).unflatten(-1, (scorer.columns, -1))
        rows = self._rows_of_one(call.over(call.query.to(dtype), call.tokens), count, number)
        shares = block_shares(scorer, rows, columns, scaling=call.scaling, most=num_blocks, num_blocks=num_blocks)
        return self._keep_by(shares, number[:, None], num_blocks)

    def _rows_of_one(self, call: Call, count: Tensor, number: Tensor) -> Rows:
        """As `_rows`, for one query: a canvas of which the own block alone is there."""
        block, total = self.slots.block, call.tokens.length
        at = number[:, None] * block + torch.arange(block, device=number.device)
        slots = (at + (total - count)[:, None]).clamp(0, total - 1)
        keys = take_tokens(call.tokens.keys, slots).unsqueeze(2).to(call.query.dtype)
        # As if the row began with that block.
        own = Canvas(
            block, count - number * block, count - 1 - number * block, torch.zeros_like(number)[:, None], keys, keys
        )
        rows = self._rows(call, own)
        return Rows(rows.entries, rows.last + number[:, None], rows.own)

    def _note_all(self, call: Call) -> None:
        """Note that each query attended all tokens up to its own."""
        if self.counts_tokens:
            self.tokens_counted = call.tokens.real.cumsum(-1)[:, call.past :].double()

    def _note(self, blocks_before: Tensor, position: Tensor) -> None:
        """Note how many tokens each query attended, for `counting`.

        Args:
            blocks_before: `[B, KV, T]`, blocks besides the own one.
            position: `[B, T]`.
        """
        own = position % self.slots.block + 1
        self.tokens_counted = blocks_before.double().mean(1) * self.slots.block + own


def _width(keep: Tensor) -> int:
    """As many choices as any row of `keep` `[B, KV, R, N]` has; on other devices than CPUs, which would wait, all."""
    return int(keep.sum(-1).max()) if keep.device.type == "cpu" else keep.shape[-1]


def _is_of(indices: Tensor, position: Tensor, block: int) -> bool:
    """Whether what was chosen was chosen for the blocks of tokens at these positions, which they do not begin.

    On other devices than CPUs nobody waits for the answer.
    """
    if indices.device.type != "cpu":
        return False
    return bool((indices[:, 0, 0, 0] == position // block).all() and (position % block > 0).all())
