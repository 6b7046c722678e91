"""Other attention for other KV heads of one layer: a layer made of several methods, each with a state of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from ..base import NOTHING, AttentionModule
from ..contract import AttentionContract, AttentionOptions, Memory
from ..geometry import Geometry
from ..registry import MethodInfo, get_method, register
from ..state import AttentionState
from ..tokens import Call, Surroundings, Tokens
from ..weights import Statistic
from .joint_state import JointState


class ByHeadOptions(AttentionOptions):
    """Options of `by_head`.

    Attributes:
        parts: what serves which KV heads, each `{groups, method, options}`; groups are numbers of KV heads, null all
            that no other part names.
    """

    parts: list[dict[str, Any]] = Field([])


class _HeadPart(NamedTuple):
    """What serves some KV heads, as options say it; `groups` is None for all others."""

    groups: list[int] | None
    method: MethodInfo
    options: AttentionOptions


class _HeadShare(NamedTuple):
    """One part of the heads: numbers of its KV heads and query heads, and what serves them."""

    groups: list[int]
    heads: list[int]
    core: AttentionModule


@register(
    name="by_head",
    options=ByHeadOptions,
    paper="https://arxiv.org/abs/2410.10819",
    summary="KV heads of one layer with attentions of their own, such as full beside streaming ones",
)
class ByHeadAttention(AttentionModule):
    """Each part of the KV heads, with the query heads that share them, runs a method of its own.

    A rule of a recipe that names `heads` makes such layers. There are as many states as parts, so what is cached is
    what each part needs. Methods that leave attention to the model, or make queries and keys of their own, cannot be
    parts.

    Paper: https://arxiv.org/abs/2410.10819
    """

    options: ByHeadOptions

    def __init__(self, geometry: Geometry, options: ByHeadOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        self.cores = nn.ModuleList()
        self.shares: list[_HeadShare] = []
        parts = _parsed_parts(options)
        for part, groups in zip(parts, _groups_of_parts(parts, geometry.num_kv_heads), strict=True):
            module_class = part.method.module_class
            own = implementation if implementation in module_class.implementations else "auto"
            core = module_class(_part_geometry(geometry, groups), part.options, own)
            self.cores.append(core)
            self.shares.append(_HeadShare(groups, _heads_of_groups(geometry, groups), core))
        # Where each head stands among those of all parts, one after another.
        stacked = [head for share in self.shares for head in share.heads]
        self.order = [stacked.index(head) for head in range(geometry.num_heads)]
        self.is_recurrent = all(core.is_recurrent for core in self.parts)
        self.reads_positions = any(core.reads_positions for core in self.parts)
        self.reads_unrotated = any(core.reads_unrotated for core in self.parts)
        self.reads_board = any(core.reads_board for core in self.parts)

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """All KV heads must be served, each by one part, and by a method that can be one."""
        try:
            parts = _parsed_parts(options)
        except ValueError as error:
            return str(error)
        named = [group for part in parts for group in part.groups or ()]
        count = geometry.num_kv_heads
        missing = [group for group in named if not 0 <= group < count]
        if missing:
            return f"there is no KV head {missing[0]}: the layer has {count}, numbered from 0"
        twice = [group for group in named if named.count(group) > 1]
        if twice:
            return f"two parts name the KV head {twice[0]}"
        served = _groups_of_parts(parts, count)
        left = sorted(set(range(count)) - {group for groups in served for group in groups})
        if left or not all(served):
            return f"no part serves the KV head {left[0]}" if left else "there is no KV head for one of the parts"
        for part, groups in zip(parts, served, strict=True):
            module_class = part.method.module_class
            if module_class.keeps_softmax or module_class.reprojects or issubclass(module_class, cls):
                return f"{part.method.name!r} is about a whole layer, so it cannot serve some of its heads"
            why = module_class.why_unsupported(_part_geometry(geometry, groups), part.options)
            if why is not None:
                return why
        return None

    @classmethod
    def why_unsupported_tokens(cls, options: Any, image_tokens: int | None) -> str | None:
        parts = _parsed_parts(options)
        reasons = [part.method.module_class.why_unsupported_tokens(part.options, image_tokens) for part in parts]
        return next((why for why in reasons if why is not None), None)

    @property
    def parts(self) -> tuple[AttentionContract, ...]:
        return tuple(share.core for share in self.shares)

    @property
    def reads_hidden_states(self) -> bool:
        return any(core.reads_hidden_states for core in self.parts)

    @property
    def is_normalized(self) -> bool:
        return all(core.is_normalized for core in self.parts)

    @property
    def tail_tokens(self) -> int | None:
        """Those that all parts keep."""
        tails = [core.tail_tokens for core in self.parts if core.tail_tokens is not None]
        return min(tails) if tails else None

    @property
    def earlier_queries(self) -> int:
        """The most that a part reads; each keeps those of its own heads."""
        return max(core.earlier_queries for core in self.parts)

    def reset_parameters(self) -> None:
        for core in self.parts:
            core.reset_parameters()

    def new_state(self) -> AttentionState:
        return JointState([share.core.new_state() for share in self.shares])

    def state_bytes(self, batch: int, length: int, dtype: torch.dtype) -> int:
        return sum(share.core.state_bytes(batch, length, dtype) for share in self.shares)

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        """As many as the part with the most."""
        return torch.stack([core.tokens_attended(rank, total) for core in self.parts]).amax(0)

    def heads_used(self, hidden_states: Tensor | None) -> int | Tensor:
        return sum((core.heads_used(hidden_states) for core in self.parts), start=0)

    def state_multiply_adds(self) -> int:
        return sum(core.state_multiply_adds() for core in self.parts)

    def summary_multiply_adds(self) -> float:
        return sum(core.summary_multiply_adds() for core in self.parts)

    def _run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        padding_mask: Tensor | None,
        state: AttentionState | None,
        hidden_states: Tensor | None,
        around: Surroundings = NOTHING,
        *,
        finish: bool,
    ) -> Tensor:
        states: Sequence[AttentionState | None] = [None] * len(self.shares)
        if isinstance(state, JointState):
            state.begin(is_padded=padding_mask is not None)
            states = state.parts
        outs = []
        for share, own in zip(self.shares, states, strict=True):
            # What a state keeps of some heads must not keep the others alive.
            tensors = (
                _take_heads(query, share.heads),
                _take_heads(key, share.groups, copy=own is not None),
                _take_heads(value, share.groups, copy=own is not None),
            )
            near = _surroundings_of(around, share)
            outs.append(share.core._run(*tensors, scaling, padding_mask, own, hidden_states, near, finish=finish))
            if around.board is not None and near.board is not None:
                around.board.update({f"{_mark_of(share)}{name}": tensor for name, tensor in near.board.items()})
        if isinstance(state, JointState):
            state.end()
        return self._in_order(outs)

    def signals(self, key: Tensor, hidden_states: Tensor | None) -> Memory:
        return {
            f"{_mark_of(share)}{name}": tensor
            for share in self.shares
            for name, tensor in share.core.signals(_take_heads(key, share.groups), hidden_states).items()
        }

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        return self._in_order([share.core.attend_naive(_call_of(call, share), {}) for share in self.shares])

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        outs = [share.core.attend_torch(_call_of(call, share), {}) for share in self.shares]
        return self._in_order([out if isinstance(out, Tensor) else out.out for out in outs])

    def _in_order(self, outs: Sequence[Tensor]) -> Tensor:
        """Heads `[batch, heads of a part, T, value_dim]` of all parts as the layer counts them."""
        joined = torch.cat(list(outs), 1)
        return joined if self.order == sorted(self.order) else torch.cat([joined[:, h : h + 1] for h in self.order], 1)

    def statistics(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scaling: float,
        padding_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> Mapping[str, Statistic]:
        """Those of the parts, 0 for heads of other parts."""
        found: dict[str, Statistic] = {}
        given: dict[str, Any] = {"scaling": scaling, "padding_mask": padding_mask, "hidden_states": hidden_states}
        for share in self.shares:
            own = share.core.statistics(_take_heads(query, share.heads), _take_heads(key, share.groups), **given)
            for name, statistic in own.items():
                if statistic.per != "head":
                    continue
                nothing = statistic.values.new_zeros(self.geometry.num_heads)
                values = found[name].values if name in found else nothing
                values[share.heads] = statistic.values
                found[name] = replace(statistic, values=values)
        return found


def _parsed_parts(options: ByHeadOptions) -> list[_HeadPart]:
    """The parts of a layer.

    Raises:
        ValueError: one has not the form of a part, or names a method or options that there are not.
    """
    found = []
    for part in options.parts:
        groups, own = part.get("groups"), part.get("options", {})
        numbers = groups is None or (isinstance(groups, list) and groups and all(type(one) is int for one in groups))
        if not set(part) <= {"groups", "method", "options"} or not numbers or not isinstance(own, dict):
            raise ValueError(f"parts are {{groups: [0], method: NAME, options: {{}}}}, got {part}")
        method = get_method(str(part.get("method")))
        try:
            parsed = method.options_class(**own)
        except ValidationError as error:
            problem = error.errors()[0]
            raise ValueError(
                f"options of {method.name!r} are wrong: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            ) from error
        found.append(_HeadPart(groups, method, parsed))
    if sum(part.groups is None for part in found) > 1:
        raise ValueError("only one part can be all other KV heads")
    return found


def _groups_of_parts(parts: Sequence[_HeadPart], num_kv_heads: int) -> list[list[int]]:
    """The KV heads of each part."""
    named = {group for part in parts for group in part.groups or ()}
    rest = [group for group in range(num_kv_heads) if group not in named]
    return [rest if part.groups is None else sorted(part.groups) for part in parts]


def _heads_of_groups(geometry: Geometry, groups: Sequence[int]) -> list[int]:
    """The query heads that share some KV heads."""
    size = geometry.num_groups
    return [head for group in groups for head in range(group * size, (group + 1) * size)]


def _part_geometry(geometry: Geometry, groups: Sequence[int]) -> Geometry:
    return replace(geometry, num_heads=len(groups) * geometry.num_groups, num_kv_heads=len(groups))


def _mark_of(share: _HeadShare) -> str:
    """What stands before the names of tensors that belong to some heads."""
    return f"{','.join(map(str, share.groups))} "


def _take_heads(tensor: Tensor, heads: Sequence[int], *, copy: bool = False) -> Tensor:
    """Some heads of `[batch, heads, ...]`; a view where they lie together, unless it must be a copy."""
    first, last = heads[0], heads[-1] + 1
    if len(heads) == last - first:
        part = tensor[:, first:last]
        # All of them are no part.
        return part.clone() if copy and len(heads) < tensor.shape[1] else part
    return torch.cat([tensor[:, head : head + 1] for head in heads], 1)


def _surroundings_of(around: Surroundings, share: _HeadShare) -> Surroundings:
    before, board = around.unrotated, around.board
    if before is not None:
        before = _take_heads(before[0], share.heads), _take_heads(before[1], share.groups)
    if board is not None:
        mark = _mark_of(share)
        board = {name.removeprefix(mark): tensor for name, tensor in board.items() if name.startswith(mark)}
    return replace(around, unrotated=before, board=board)


def _call_of(call: Call, share: _HeadShare) -> Call:
    tokens, mark = call.tokens, _mark_of(share)
    signals = {name.removeprefix(mark): t for name, t in tokens.signals.items() if name.startswith(mark)}
    keys, values = _take_heads(tokens.keys, share.groups), _take_heads(tokens.values, share.groups)
    own = Tokens(keys, values, tokens.valid, tokens.positions, signals)
    queries = None if call.queries is None else _take_heads(call.queries, share.heads)
    return replace(call, query=_take_heads(call.query, share.heads), tokens=own, queries=queries)
