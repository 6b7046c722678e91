"""Native sparse attention: chosen blocks, what stands for all blocks, and a window, each behind a gate."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ...geometry import Geometry
from ...registry import register
from ...state import AttentionState
from ...tokens import Call
from ...window import LOG2E, divide, softmax_terms, window_mask, windowed_softmax
from ..base import CHOSEN, SparseAttention
from ..executors.masked import STRIP, attend_masked_naive
from ..learned import MOST_LOGITS
from ..options import ChoosingOptions
from ..slots.canvas import Canvas, with_values
from ..slots.scorers import Means
from ..slots.slots import By, Slots


class NativeOptions(ChoosingOptions):
    """Options of `native`.

    Attributes:
        query: whose queries choose: those of the block before for all of a block, with which prompts are computed by
            blocks; or each token for itself, as published.
        window: newest tokens that the third branch attends, the token itself included.
        gates: start of the gates of compressed blocks and of the window, in (0, 0.5); that of the chosen blocks starts
            at what both leave of 1.
    """

    query: By = "previous"
    window: int = Field(512, ge=1)
    gates: float = Field(0.02, gt=0, lt=0.5)


@register(
    name="native",
    options=NativeOptions,
    paper="https://arxiv.org/abs/2502.11089",
    summary="gated sum of attention to chosen blocks, to one compressed token for each block, and to a window",
)
class NativeSparseAttention(SparseAttention):
    """`Σ_b sigmoid(W_b x + c_b) · softmax_b`, b = chosen blocks, compressed blocks before the own one, window.

    A block is compressed to the mean of its keys and that of its values, weighted by learned weights for each place in
    it that start equal; the published MLP would start as nothing that a pretrained layer knows. Chosen blocks are those
    with the largest products of means. Gates read the layer's input, one for each branch and head.

    Paper: https://arxiv.org/abs/2502.11089
    """

    options: NativeOptions
    paths = ("blocks", "compressed", "window")

    def __init__(self, geometry: Geometry, options: NativeOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        heads, branches = geometry.num_heads, len(self.paths)
        self.gate_weight = nn.Parameter(torch.empty(branches, heads, geometry.hidden_size or 0))
        self.gate_bias = nn.Parameter(torch.empty(branches, heads))
        # Logits of the weights in a block's mean, of keys and of values.
        self.places = nn.Parameter(torch.empty(2, geometry.num_kv_heads, options.block))
        self.reset_parameters()

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Gates read the layer's input."""
        if geometry.hidden_size is None:
            return f"{cls.name!r} reads the layer's input, whose size is not known"
        return super().why_unsupported(geometry, options)

    def make_slots(self) -> Slots:
        return self.options.slots(scorer=Means(), selector=self.options.selector, by=self.options.query)

    @property
    def reads_hidden_states(self) -> bool:
        return True

    @property
    def is_normalized(self) -> bool:
        """Gates need not add up to 1."""
        return False

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        return torch.maximum(super().tokens_attended(rank, total), rank.clamp_max(self.options.window))

    def summary_multiply_adds(self) -> float:
        geometry = self.geometry
        return geometry.num_heads * (geometry.head_dim + geometry.value_dim) / self.slots.block

    @torch.no_grad()
    def reset_parameters(self) -> None:
        others = self.options.gates
        starts = torch.tensor([1 - 2 * others, others, others])
        self.gate_bias.copy_((starts / (1 - starts)).log()[:, None].expand_as(self.gate_bias))
        self.gate_weight.zero_()
        self.places.zero_()

    def naive_with_rest(self, out: Tensor, call: Call, chosen: Tensor) -> Tensor:
        tokens = call.tokens
        if self.counts_tokens:
            self._note_union(call, lambda start, stop: chosen[:, :, start:stop])
        inside = window_mask(call.length, tokens.length, self.options.window, causal=True, device=chosen.device)
        seen = (inside & tokens.real[:, None])[:, None].expand_as(chosen)
        return self._gated(call, [out, self._compressed_naive(call), attend_masked_naive(call, seen)])

    def _compressed_naive(self, call: Call) -> Tensor:
        """Row by row: how much each real token makes of what stands for each whole block, then who sees that."""
        block, outs = self.slots.block, []
        for row, real in enumerate(call.tokens.real):
            place = real.cumsum(0) - 1
            blocks = torch.arange(int(real.sum()) // block, device=place.device)
            is_inside = (place // block == blocks[:, None]) & real
            both = call.tokens.keys[row], call.tokens.values[row]
            weights = (part.to(both[0].dtype).softmax(-1)[:, place.clamp_min(0) % block] for part in self.places)
            stand_ins = ((weight[:, None] * is_inside) @ t for weight, t in zip(weights, both, strict=True))
            keys, values = (t.repeat_interleave(self.geometry.num_groups, 0) for t in stand_ins)
            before = blocks < place[call.past :, None] // block
            logits = call.query[row] @ keys.transpose(-1, -2) * call.scaling
            outs.append(logits.masked_fill(~before, -torch.inf).softmax(-1).nan_to_num(0.0) @ values)
        return torch.stack(outs)

    def with_rest(self, out: Tensor, call: Call, canvas: Canvas, keep: Tensor) -> Tensor:
        call, canvas = with_values(call, canvas)
        keys, values = (self._compress(t, part) for t, part in zip((canvas.keys, canvas.values), (0, 1), strict=True))
        own = canvas.positions(call.length).clamp_min(0) // self.slots.block
        near = divide(*windowed_softmax(call, window=self.options.window, causal=True)[:2])
        if self.counts_tokens:
            self._note_union(call, lambda start, stop: self._visible(call, canvas, keep, start, stop))
        far = self._attend_compressed(call.query, keys, values, own, call.scaling)
        return self._gated(call, [out, far, near])

    def _note_union(self, call: Call, chosen: Callable[[int, int], Tensor]) -> None:
        """Note, for `counting`, tokens that are chosen or inside the window; `chosen` as `_visible` by strips."""
        total, device, real = call.tokens.length, call.query.device, call.tokens.real[:, None, None]
        inside = window_mask(call.length, total, self.options.window, causal=True, device=device)
        counts = []
        for start in range(0, call.length, STRIP):
            seen = chosen(start, min(start + STRIP, call.length)) | inside[start : start + STRIP] & real
            counts.append(seen.sum(-1).double().mean(1))
        self.tokens_counted = torch.cat(counts, 1)

    def _compress(self, blocks: Tensor, part: int) -> Tensor:
        """`[B, KV, N, block, D]` → `[B, KV, N, D]`: of keys (0) or of values (1)."""
        weights = self.places[part].to(blocks.dtype).softmax(-1)
        return torch.einsum("bkntd,kt->bknd", blocks, weights)

    def _attend_compressed(self, query: Tensor, keys: Tensor, values: Tensor, own: Tensor, scaling: float) -> Tensor:
        """Softmax over what stands for the blocks before those in which the queries are, `own` `[B, T]`."""
        if not keys.shape[2]:
            return query.new_zeros(*query.shape[:3], values.shape[-1])
        rows = query.unflatten(1, (keys.shape[1], -1)) * (scaling * LOG2E)
        column, outs = torch.arange(keys.shape[2], device=keys.device), []
        strip = max(1, MOST_LOGITS // max(rows[:, :, :, 0, 0].numel() * keys.shape[2], 1))
        for start in range(0, query.shape[2], strip):
            stop = start + strip
            before = (column < own[:, start:stop, None])[:, None, None]
            logits = rows[:, :, :, start:stop] @ keys[:, :, None].transpose(-1, -2)
            outs.append(divide(*softmax_terms(logits, before, values[:, :, None])[:2]))
        return torch.cat(outs, 3).flatten(1, 2)

    def _gated(self, call: Call, branches: list[Tensor]) -> Tensor:
        """Their sum, each `[B, heads, T, V]` times its gate."""
        assert call.hidden_states is not None
        hidden = call.hidden_states
        weight, bias = self.gate_weight.to(hidden.dtype), self.gate_bias.to(hidden.dtype)
        gates = (torch.einsum("bth,nkh->nbkt", hidden, weight) + bias[:, None, :, None]).sigmoid()[..., None]
        named = zip(self.paths, gates, branches, strict=True)
        total = torch.stack([gate * branch for name, gate, branch in named if name not in self.left_out]).sum(0)
        return total.to(branches[0].dtype)

    def _most_pages(self, call: Call) -> int | None:
        """Pages by themselves are half of what a token attends."""
        return None

    def one_with_rest(self, out: Tensor, call: Call, state: AttentionState) -> Tensor:
        block, window = self.slots.block, self.options.window
        query = call.query.to(torch.promote_types(call.query.dtype, torch.float32))

        def stand_ins(part: int, of: str) -> Tensor:
            return state.summaries(of, block, lambda held: self._compress(held.to(query.dtype), part), of=of)

        tokens, count = call.tokens, call.tokens.real.sum(-1)
        if self.counts_tokens:
            place = tokens.real.cumsum(-1) - 1
            chosen = (place[:, None, :, None] // block == state.memory[CHOSEN][:, :, 0, None]).any(-1)
            self._note_union(call, lambda start, stop: (chosen & tokens.real[:, None])[:, :, None])
        keys, values = stand_ins(0, "keys"), stand_ins(1, "values")
        far = self._attend_compressed(query, keys, values, (count[:, None] - 1).clamp_min(0) // block, call.scaling)
        seen = tokens.part(max(tokens.length - window, 0)).to(query.dtype)
        near = divide(*windowed_softmax(call.over(query, seen), window=window, causal=True)[:2])
        return self._gated(call, [out, far, near])
