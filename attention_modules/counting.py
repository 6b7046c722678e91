"""What attention modules really did, counted while they run: tokens attended, state, multiply-adds.

Counts come from the number of real tokens before each query, so that they cost time in proportion to the length, and
nothing at all where nobody counts. Modules that are traced by torch.compile do not count.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .contract import AttentionContract
from .counts import Counts, summed
from .state import AttentionState


@dataclass
class Counter:
    """Counts of some attention modules by their names.

    Attributes:
        by_module: those of each module; all zero as long as it has not run.
    """

    by_module: dict[str, Counts]
    _counts: dict[AttentionContract, Counts] = field(repr=False)

    @property
    def total(self) -> Counts:
        """All modules together; states add up, for they are there at the same time."""
        return summed(self.by_module.values())

    def counts(self, core: AttentionContract) -> bool:
        """Whether a module is among those that are counted."""
        return core in self._counts

    def places(
        self, core: AttentionContract, query: Tensor, key: Tensor, valid: Tensor | None, state: AttentionState | None
    ) -> "Places | None":
        """Where the queries of a call stand, to be asked before it runs; None for a module that is not counted."""
        return Places.of(query, key, valid, state) if core in self._counts else None

    def add(
        self,
        core: AttentionContract,
        places: "Places",
        state: AttentionState | None,
        hidden_states: Tensor | None = None,
        serving: Tensor | None = None,
        held: int = 0,
    ) -> None:
        """Count a call that ran.

        Args:
            core: the attention module.
            places: where its queries stand.
            state: its state after the call.
            hidden_states: `[batch, T, hidden]`, the layer's input, if the caller has it.
            serving: `[batch, num_heads, T]` bool, heads that a query got an answer from, where others were worked out
                too; None where these are the same.
            held: bytes of keys and values that are kept elsewhere than in `state`.
        """
        counts, geometry = self._counts[core], core.geometry
        seen = places.rank if geometry.causal else places.total.expand_as(places.rank)
        at = places.real
        queries, dense = int(at.sum()), int(seen[at].sum())
        served = [_served(part, places, seen, hidden_states) for part in core.parts or (core,)]
        counts.calls += 1
        counts.queries += queries
        counts.exact_pairs += round(sum(one.share * one.exact for one in served) / geometry.num_heads)
        counts.summarized_pairs += round(sum(one.share * one.summarized for one in served) / geometry.num_heads)
        counts.dense_pairs += dense
        counts.head_queries += sum(o.heads for o in served) if serving is None else int((serving & at[:, None]).sum())
        counts.head_slots += queries * geometry.num_heads
        counts.multiply_adds += sum(one.multiply_adds for one in served)
        counts.dense_multiply_adds += dense * geometry.num_heads * (geometry.head_dim + geometry.value_dim)
        counts.state_bytes = max(counts.state_bytes, held if state is None else state.nbytes)


class _Served(NamedTuple):
    """What a module that serves `share` heads did in a call; pairs are counted once for all of them."""

    share: int
    exact: int
    summarized: int
    heads: int
    multiply_adds: int


def _served(core: AttentionContract, places: "Places", seen: Tensor, hidden_states: Tensor | None) -> _Served:
    geometry, at = core.geometry, places.real
    attended = core.tokens_counted
    if attended is None:
        attended = core.tokens_attended(places.rank, places.total)
    rest, through_state = (seen - attended)[at], core.state_multiply_adds()
    through_summaries = core.summary_multiply_adds()
    # One number for all queries or one for each.
    heads = torch.as_tensor(core.heads_used(hidden_states), device=attended.device).expand_as(attended)
    products = int((attended * heads)[at].sum()) * (geometry.head_dim + geometry.value_dim)
    return _Served(
        share=geometry.num_heads,
        exact=round(float(attended[at].sum())),
        summarized=int(rest.sum()) if through_state or through_summaries else 0,
        heads=int(heads[at].sum()),
        multiply_adds=products + int((rest > 0).sum()) * through_state + int(rest.sum() * through_summaries),
    )


@dataclass(frozen=True)
class Places:
    """Where the queries of a call stand among the real tokens of their rows.

    Attributes:
        rank: `[batch, T]` int64, real tokens up to each query, itself included.
        total: `[batch, 1]` int64, real tokens of each row, or `[batch, T]`, those that each query sees.
        real: `[batch, T]` bool, False for queries that are padding.
    """

    rank: Tensor
    total: Tensor
    real: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, valid: Tensor | None, state: AttentionState | None) -> "Places":
        """Those of a call; arguments as for `AttentionModule.forward`."""
        batch, length = query.shape[0], query.shape[2]
        real = torch.ones(batch, key.shape[2], dtype=torch.bool, device=query.device) if valid is None else valid
        rank = real.cumsum(1)
        if state is not None:
            rank = rank + state.note_real(real, is_padded=valid is not None)[:, None]
        start = key.shape[2] - length
        return cls(rank[:, start:], rank[:, -1:], real[:, start:])


_COUNTER: ContextVar[Counter | None] = ContextVar("counter", default=None)


def current_counter() -> Counter | None:
    """The counter of the innermost `counting`; None outside, and under torch.compile."""
    return None if torch.compiler.is_compiling() else _COUNTER.get()


@contextmanager
def counting(modules: nn.Module | Iterable[nn.Module]) -> Iterator[Counter]:
    """Inside, attention modules count what they do.

    A state with padding has to be counted from its first call on. Layers that a plan leaves as they are do not count.

    Args:
        modules: a converted model, an attention module, or several of either.

    Returns:
        the counter, to be read at any time.

    Raises:
        ValueError: there is no attention module among them.
    """
    if isinstance(modules, nn.Module):
        named = dict(modules.named_modules())
    else:
        named = {
            f"{number}.{name}".rstrip("."): module
            for number, part in enumerate(modules)
            for name, module in part.named_modules()
        }
    cores = {name: module for name, module in named.items() if isinstance(module, AttentionContract)}
    # What serves some heads of a module is counted with the whole.
    inner = {part for core in cores.values() for part in core.parts}
    cores = {name: core for name, core in cores.items() if core not in inner}
    if not cores:
        raise ValueError("there is no attention module to count: give a converted model or an attention module")
    by_module = {name: Counts() for name in cores}
    counter = Counter(by_module, {core: by_module[name] for name, core in cores.items()})
    token = _COUNTER.set(counter)
    try:
        yield counter
    finally:
        _COUNTER.reset(token)
