"""Whether a converted model runs what its config says, judged by what its layers did in a forward and what it gave.

A layer whose attention module was not called ran something else. One that was called may still compute softmax
attention over all tokens, because a function underneath was exchanged: a module whose method looks at fewer tokens is
given random ones, of which most are out of its sight, and its output must not be that of dense attention.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...attention_modules.base import AttentionModule
from ...attention_modules.calls import new_tokens
from ...attention_modules.counting import counting
from ...attention_modules.counts import AttentionCounts, Counts
from ...attention_modules.tokens import Surroundings, Tokens
from ...errors import PlanError
from ...files.own_files import SECTION
from ..planning.plan import Plan
from ..surgery.swap import CORE, converted_modules
from .reload import resolve_names

# Lengths at which a method may show that it looks at fewer tokens; those between the powers of two are for images,
# whose patches are a square besides a few first tokens.
LENGTHS = (*range(64, 130), *(2**power for power in range(8, 15)))
# Up to this length there is a query at each token; beyond it only so many at the end, which costs far less. Methods
# that need all queries are not tried beyond the last of these.
ALL_QUERIES, LAST_QUERIES, LONGEST_WHOLE = 1024, 16, 4096
# Of the largest number of dense attention's output: what rounding may come to, TF32 included.
NOISE = 1e-3
NAMED = 3


@torch.no_grad()
def check_executed(model: PreTrainedModel, *forwards: Callable[[], object]) -> AttentionCounts:
    """Insist that each layer of a converted model runs what the model's config says.

    Args:
        model: a converted model on any device but meta; it runs in evaluation mode.
        forwards: run the model on one row each; as many of them are called as it takes for each layer to have run.

    Returns:
        what the layers did meanwhile.

    Raises:
        PlanError: the model is not converted, a layer ran something else than its method, or it computes dense
            attention although its method looks at fewer tokens.
    """
    methods = _methods(model)
    modules = converted_modules(model)
    _refuse([name for name in methods if name not in modules], methods, "are not converted in this model")
    cores = {name: modules[name].get_submodule(CORE) for name in methods}
    with _evaluating(model):
        given: dict[str, Any] = {"dtype": model.dtype, "device": model.device, "board": {}}
        dense = [name for name, core in cores.items() if computes_dense(core, **given)]
        _refuse(dense, methods, "compute dense softmax attention, although their methods look at fewer tokens")
        with counting(model) as counter:
            for forward in forwards:
                forward()
                counts = {name: counter.by_module.get(f"{name}.{CORE}", Counts()) for name in methods}
                idle = [name for name, found in counts.items() if not found.calls]
                if not idle:
                    break
    _refuse(idle, methods, "ran something else, for their attention modules were not called")
    return AttentionCounts(max(found.queries // found.calls for found in counts.values()), counts)


@torch.no_grad()
def computes_dense(
    core: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    board: dict[str, Tensor] | None = None,
) -> bool:
    """Whether an attention module gives softmax attention over all tokens though its method looks at fewer.

    False for methods that look at all tokens one by one, and where no length within bounds shows a difference.

    Args:
        core: the attention module.
        dtype: what queries, keys and values come in.
        device: where they are; None means the CPU.
        board: what layers before it wrote when they were asked; see `Surroundings`.
    """
    if isinstance(core, AttentionModule) and core.parts:
        return any(computes_dense(part, dtype=dtype, device=device, board=board) for part in core.parts)
    if not isinstance(core, AttentionModule) or (length := _telling_length(core)) is None:
        return False
    geometry = core.geometry
    queries = length if length <= ALL_QUERIES or not _serves_few_queries(core) else LAST_QUERIES
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(device, dtype)

    query = draw(geometry.num_heads, queries, geometry.head_dim)
    key = draw(geometry.num_kv_heads, length, geometry.head_dim)
    value = draw(geometry.num_kv_heads, length, geometry.value_dim)
    hidden = draw(queries, geometry.hidden_size) if core.reads_hidden_states and geometry.hidden_size else None
    positions = torch.arange(length, device=device)[None]
    around = Surroundings(positions, (query, key), board={} if board is None else board)
    scaling = geometry.head_dim**-0.5
    given: dict[str, Any] = {"scaling": scaling, "around": around}
    outs = []
    if "prefill" not in core.dense_in:
        if core.chooser is not None:
            core.chooser(query, key, value, hidden_states=hidden, **given)
        outs.append(core(query, key, value, hidden_states=hidden, **given))
        # What follows the mixture, such as a norm, would hide that the mixture is dense.
        outs.append(core._run(query, key, value, scaling, None, None, hidden, around, finish=False))
    if geometry.causal and "decode" not in core.dense_in:
        if queries == length:
            outs.append(_last_token(core, query, key, value, hidden, given))
        elif core.tail_tokens is None and not core.reprojects:
            outs.append(_last_of_many(core, query, key, value, given))
    dense = _dense(query, key, value, scaling, causal=geometry.causal)
    noise = max(NOISE, 4 * torch.finfo(dtype).eps) * float(dense.abs().max())
    for out in outs:
        last = out[:, :, -LAST_QUERIES:].to(dense.dtype)
        if float((last - dense[:, :, -last.shape[2] :]).abs().max()) <= noise:
            return True
    return False


def _last_token(
    core: AttentionModule, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, given: Mapping[str, Any]
) -> Tensor:
    """`[1, num_heads, 1, value_dim]` of the last token after a state of those before it."""
    cores = _choosing_first(core)
    states = [one.new_state() for one in cores]
    around: Surroundings = given["around"]
    for part in (slice(None, -1), slice(-1, None)):
        near = replace(
            around,
            positions=None if around.positions is None else around.positions[:, part],
            unrotated=(query[:, :, part], key[:, :, part]),
            board={},
        )
        tensors = [tensor[:, :, part] for tensor in (query, key, value)]
        own = None if hidden is None else hidden[:, part]
        for one, state in zip(cores, states, strict=True):
            out: Tensor = one(*tensors, hidden_states=own, state=state, **{**given, "around": near})
    return out


def _last_of_many(core: AttentionModule, query: Tensor, key: Tensor, value: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The same for methods whose states are the tokens themselves, which are put there without their queries."""
    around: Surroundings = given["around"]
    assert around.positions is not None
    board: dict[str, Tensor] = {}
    for one in _choosing_first(core):
        state = one.new_state()
        before = Surroundings(around.positions[:, :-1], (query[:, :, :0], key[:, :, :-1]), board={})
        state.append(new_tokens(one, Tokens(key[:, :, :-1], value[:, :, :-1]), None, before))
        near = Surroundings(around.positions[:, -1:], (query[:, :, -1:], key[:, :, -1:]), board=board)
        tensors = (tensor[:, :, -1:] for tensor in (query, key, value))
        out: Tensor = one(*tensors, state=state, **{**given, "around": near})
    return out


def _choosing_first(core: AttentionModule) -> list[AttentionModule]:
    """A module behind the one that chooses for it, if another does."""
    chooser = core.chooser
    return [core] if chooser is None else [chooser, core]


def _dense(query: Tensor, key: Tensor, value: Tensor, scaling: float, *, causal: bool) -> Tensor:
    """`[1, num_heads, LAST_QUERIES, value_dim]` softmax attention of the last queries, written out."""
    exact = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    query = query[:, :, -LAST_QUERIES:].to(exact)
    key, value = (t.to(exact).repeat_interleave(groups, 1) for t in (key, value))
    logits = query @ key.transpose(-1, -2) * scaling
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(~seen.tril(key.shape[2] - query.shape[2]), float("-inf"))
    return logits.softmax(-1) @ value


def _telling_length(core: AttentionModule) -> int | None:
    """The least length at which the last token sees no more than half of the tokens, or what shows with the method."""
    for length in LENGTHS:
        rank = torch.tensor([[length]])
        too_long = length > LONGEST_WHOLE and not _serves_few_queries(core)
        fits = core.why_unsupported_tokens(core.options, length) is None and not too_long
        most = int((1 - core.telling_share) * length)
        if fits and int(core.tokens_attended(rank, rank).sum()) <= most:
            return int(length)
    return None


def _serves_few_queries(core: AttentionModule) -> bool:
    """Whether there may be more tokens than queries."""
    return core.geometry.causal and not core.reads_hidden_states and not core.earlier_queries


def _methods(model: PreTrainedModel) -> dict[str, str]:
    """The method of each layer that the model's config says is converted, by the layer's name in this model."""
    section = getattr(model.config, SECTION, None)
    if section is None:
        raise PlanError(f"{type(model).__name__} is not converted: its config says nothing of attnconv")
    plan = Plan.from_config(section)
    present = (name for name, _ in model.named_modules())
    names = resolve_names([entry.name for entry in plan.entries], present, model.base_model_prefix)
    return {(entry.name if names is None else names[entry.name]): entry.method for entry in plan.entries}


def _refuse(names: Sequence[str], methods: Mapping[str, str], what: str) -> None:
    """Raise if there are names, which are those of layers that did something else than they should."""
    if names:
        listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        raise PlanError(
            f"{len(names)} of {len(methods)} layers that the model's config calls converted {what}: {listed}; "
            "load the model again without whatever exchanges its attention, and run `attnconv doctor`"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
