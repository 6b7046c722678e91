"""The one attention function through which every converted module runs."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...attention_modules.base import AttentionModule
from ...attention_modules.counting import current_counter
from ...attention_modules.heads.gate import ChosenHeads
from ...attention_modules.packing import Documents, Group, attend_documents
from ...attention_modules.tokens import Surroundings
from ...attention_modules.weights import Statistic, response_weights
from ...errors import PlanError
from .calls import CallContext, foreign_call
from .masks import new_token_mask, packed_documents, tokens_seen
from .surroundings import surroundings

ATTENTION = "attnconv"
CONTEXT = "attnconv_context"


@dataclass
class AttentionCall:
    """One attention call of one converted module, as a hook sees it (no cache involved).

    Attributes:
        name: the module's name in the model.
        core: its attention module.
        query: `[batch, num_heads, T, head_dim]`.
        key: `[batch, num_kv_heads, T, head_dim]`.
        value: `[batch, num_kv_heads, T, value_dim]`.
        padding_mask: `[batch, T]` bool or None.
        scaling: factor on query-key products.
        hidden_states: `[batch, T, hidden]` or None.
        around: what else the method reads.
        documents: which tokens belong together in packed rows; None where each row is one sequence.
    """

    name: str
    core: AttentionModule
    query: Tensor
    key: Tensor
    value: Tensor
    padding_mask: Tensor | None
    scaling: float
    hidden_states: Tensor | None
    around: Surroundings
    documents: Documents | None
    _base: Callable[[Tensor], Tensor] = field(repr=False)

    def student(self) -> Tensor:
        """The converted attention's output `[batch, num_heads, T, value_dim]`, with gradients to its core only."""
        hidden_states = None if self.hidden_states is None else self.hidden_states.detach()
        mixed = self.teacher() if self.core.keeps_softmax else None
        return self._run(self.query.detach(), self.key.detach(), self.value.detach(), hidden_states, mixed)

    def converted(self) -> Tensor:
        """The converted attention's output with gradients to everything."""
        mixed = self._base(self.value) if self.core.keeps_softmax else None
        return self._run(self.query, self.key, self.value, self.hidden_states, mixed)

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor | None, mixed: Tensor | None
    ) -> Tensor:
        given: dict[str, Any] = {"scaling": self.scaling, "hidden_states": hidden_states, "around": self.around}
        if mixed is not None:
            # The model's own attention keeps documents apart by itself.
            given["mixed"] = mixed
        elif self.documents is not None:
            return attend_documents(self.core, self.documents, query, key, value, **given)
        out: Tensor = self.core(query, key, value, padding_mask=self.padding_mask, **given)
        return out

    def rows(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Surroundings]]:
        """Every sequence by itself: query and key `[1, heads, T, dim]`, input `[1, T, hidden]` and surroundings."""
        for places in self._places():
            group = Group(places[None], None)
            hidden = None if self.hidden_states is None else group.take_rows(self.hidden_states)
            yield group.take(self.query), group.take(self.key), hidden, group.take_around(self.around)

    def _places(self) -> Iterable[Tensor]:
        """`[T]` places of each sequence's tokens in the flattened batch."""
        if self.documents is not None:
            return self.documents.one_by_one()
        batch, _, length, _ = self.query.shape
        rows = torch.arange(batch * length, device=self.query.device).view(batch, length)
        return list(rows) if self.padding_mask is None else [r[k] for r, k in zip(rows, self.padding_mask, strict=True)]

    @torch.no_grad()
    def teacher(self) -> Tensor:
        """The original attention's output, softcaps, sinks and biases included: `[batch, num_heads, T, value_dim]`."""
        return self._base(self.value)

    @torch.no_grad()
    def student_weights(self) -> Tensor:
        """What each key weighs in the converted attention's output: `[batch, num_heads, T, T]`, fp32 or fp64."""
        if self.core.keeps_softmax:
            return self.teacher_weights()
        if self.documents is None:
            return self.core.attention_weights(
                self.query,
                self.key,
                scaling=self.scaling,
                padding_mask=self.padding_mask,
                hidden_states=self.hidden_states,
                value=self.value,
                around=self.around,
            )
        batch, heads, length, _ = self.query.shape
        weights = self.query.new_zeros(batch, heads, length, length, dtype=torch.float32)
        for places in self.documents.one_by_one():
            group, at = Group(places[None], None), places % length
            hidden = None if self.hidden_states is None else group.take_rows(self.hidden_states)
            query, key, value = (group.take(t) for t in (self.query, self.key, self.value))
            given: dict[str, Any] = {"hidden_states": hidden, "value": value, "around": group.take_around(self.around)}
            own = self.core.attention_weights(query, key, scaling=self.scaling, **given)
            weights[int(places[0]) // length, :, at[:, None], at[None]] = own[0].to(weights.dtype)
        return weights

    @torch.no_grad()
    def statistics(self) -> Mapping[str, Statistic]:
        """What the converted attention tells about itself."""
        query, key, mask, hidden_states = self.query, self.key, self.padding_mask, self.hidden_states
        if self.documents is not None:
            group = self.documents.joined()
            query, key, mask = group.take(query), group.take(key), group.valid
            hidden_states = None if hidden_states is None else group.take_rows(hidden_states)
        given = {"padding_mask": mask, "hidden_states": hidden_states}
        return self.core.statistics(query, key, scaling=self.scaling, **given)

    @torch.no_grad()
    def teacher_weights(self) -> Tensor:
        """The same of the original attention, as exact as the model's dtype; rows of padding mean nothing."""
        return response_weights(self._base, self.value)


AttentionHook = Callable[[AttentionCall], Tensor]


@contextmanager
def attention_hook(model: nn.Module, hook: AttentionHook) -> Iterator[None]:
    """Inside, every converted module's attention is `hook(call)`; what it returns flows on through the model.

    Keep it active until backward has run if the model recomputes activations.
    """
    modules = [module for _, module in model.named_modules() if is_converted(module)]
    for module in modules:
        module.__dict__["_attnconv_hook"] = hook
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("_attnconv_hook", None)


def is_converted(module: nn.Module) -> bool:
    """Whether a module's attention was replaced."""
    return hasattr(type(module), "_attnconv_original")


def core_of(module: nn.Module) -> AttentionModule:
    """The attention module inside a converted module, or what an adapter library put around it."""
    return cast(AttentionModule, module.attnconv)


def attnconv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that transformers calls: shapes as in its attention interface, output `[batch, T, heads, dim]`.

    Raises:
        PlanError: what is asked for cannot be computed exactly; nothing ever falls back to dense attention.
    """
    if not is_converted(module):
        raise PlanError(f"{type(module).__name__} was not converted, so attn_implementation='attnconv' cannot serve it")
    core = core_of(module)
    context = _context_of(module, kwargs)
    hook = module.__dict__.get("_attnconv_hook")
    if core.keeps_softmax and hook is None:
        given = {"scaling": scaling, "dropout": dropout, **kwargs}
        return _acting_on_heads(module, core, context, (query, key, value, attention_mask), given)
    _refuse_unsupported(kwargs)
    _refuse_split_sequences()
    length, layer = query.shape[2], context.layer
    if layer is not None and key.shape[2] > length:
        # The model kept earlier keys itself; ours are in the state.
        key, value = key[:, :, -length:], value[:, :, -length:]
    if key.shape[2] != length:
        raise PlanError(
            f"{module.__dict__.get('_attnconv_name')} received {key.shape[2]} keys for {length} queries: "
            "cross-attention and foreign caches cannot run through a converted layer"
        )
    context.attended = True
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    seen = 0 if layer is None else layer.get_seq_length()
    _refuse_lost_tokens(context, kwargs.get("position_ids"), length, seen)
    sizes = query.shape[0], length, seen
    padding_mask = new_token_mask(attention_mask, *sizes)
    # Chunks of attention (Llama 4) are no documents, though their masks look alike.
    is_chunked = getattr(getattr(module, "config", None), "attention_chunk_size", None) is not None
    documents = packed_documents(kwargs, None if is_chunked else attention_mask, padding_mask, *sizes)
    around = surroundings(module, core, query, key, kwargs.get("position_ids"), context.embeddings)
    if hook is not None:

        def base(values: Tensor) -> Tensor:
            function = _own_function(module)
            out = function(module, query, key, values, attention_mask, scaling=scaling, dropout=0.0, **kwargs)[0]
            return out.transpose(1, 2)

        name = module.__dict__["_attnconv_name"]
        tensors = query, key, value, padding_mask, scaling, context.hidden_states
        return hook(AttentionCall(name, core, *tensors, around, documents, base)).transpose(1, 2).contiguous(), None
    out = None
    given = {"scaling": scaling, "hidden_states": context.hidden_states, "around": around}
    if documents is not None:
        out = attend_documents(core, documents, query, key, value, **given)
        # What comes next continues the last document of a row.
        padding_mask = documents.last
    state = None
    if layer is not None:
        layer.device = query.device  # type: ignore[assignment]
        state = layer.take_over(core)
    if out is None or state is not None:
        continued = core(query, key, value, padding_mask=padding_mask, state=state, **given)
        out = continued if out is None else out
    return out.transpose(1, 2).contiguous(), None


def _acting_on_heads(
    module: nn.Module, core: AttentionModule, context: CallContext, call: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """A call whose values the model's own function mixes, with whatever cache, mask and kernel it does that."""
    query, key, value, attention_mask = call
    weights = None
    chosen = _chosen_heads(module, core, context, call, kwargs)
    if chosen is None or chosen.mixed is None:
        mixed, weights = _own_function(module)(module, *call, **kwargs)
    else:
        mixed = chosen.mixed.transpose(1, 2)
    wanted = query.shape[0], query.shape[2], query.shape[1], core.geometry.value_dim
    if tuple(mixed.shape) != wanted:
        raise foreign_call(context.name, f"got heads of shape {tuple(mixed.shape)} from its attention, not {wanted}")
    scaling = kwargs["scaling"]
    given: dict[str, Any] = {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "hidden_states": context.hidden_states,
        "mixed": mixed.transpose(1, 2),
    }
    if chosen is not None:
        given["gates"] = chosen.gates
    if current_counter() is not None:
        given["held"] = key.nbytes + value.nbytes if context.has_cache else 0
        given["seen"] = tokens_seen(attention_mask, query.shape[0], query.shape[2], key.shape[2], core.geometry.causal)
    out = core(query, key, value, **given)
    context.attended = True
    return out.transpose(1, 2).contiguous(), weights


# Arguments that do not change what plain attention gives.
_HARMLESS = ("scaling", "dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "is_causal")


def _chosen_heads(
    module: nn.Module, core: AttentionModule, context: CallContext, call: tuple[Any, ...], kwargs: dict[str, Any]
) -> ChosenHeads | None:
    """The heads that a gate chose; None where the model's own function is to do all, whatever it chooses."""
    query, key, value, mask = call
    (config,) = module.__dict__["_attnconv_config"]
    is_plain = config._attn_implementation == "sdpa" and mask is None and core.geometry.causal
    is_plain = is_plain and not kwargs.get("dropout") and kwargs.get("is_causal") in (None, True)
    is_plain = is_plain and getattr(module, "is_causal", True) and not kwargs.get("output_attentions")
    is_plain = is_plain and all(value is None or name in _HARMLESS for name, value in kwargs.items())
    # Of gates on heads alone.
    attend: Callable[..., ChosenHeads | None] | None = getattr(core, "chosen_heads", None)
    if attend is None or not is_plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    scaling = query.shape[-1] ** -0.5 if kwargs["scaling"] is None else kwargs["scaling"]
    return attend(query, key, value, scaling=scaling, hidden_states=context.hidden_states)


def _own_function(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function that a converted module's model uses."""
    (config,) = module.__dict__["_attnconv_config"]
    return original_function(module, config)


def _context_of(module: nn.Module, kwargs: dict[str, Any]) -> CallContext:
    """What the module noted; nothing where the function is called by itself."""
    noted = module.__dict__.get("_attnconv_context")
    given = kwargs.pop(CONTEXT, None)
    if given is not None:
        given.came_as_argument = True
        return cast(CallContext, given)
    if noted is None and torch.compiler.is_compiling():
        raise PlanError(
            f"{module.__dict__.get('_attnconv_name')} does not hand its arguments on to the attention function; "
            "run the model once before it is compiled, so that attnconv sees it"
        )
    return noted or CallContext(name=str(module.__dict__.get("_attnconv_name")))


def _refuse_lost_tokens(context: CallContext, position_ids: Any, length: int, seen: int) -> None:
    """Refuse a token whose position says that others came before it, of which the state knows nothing.

    A prompt may begin anywhere, but a single token is the next of a text that is being generated. With a state, the
    positions cannot run ahead of the tokens seen; reading them costs a wait for the device, so it is done on the CPU.
    """
    if torch.compiler.is_compiling() or not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
        return
    is_next = length == 1 and seen == 0
    is_cheap = context.layer is not None and position_ids.device.type == "cpu"
    if not (is_next or is_cheap) or position_ids.device.type == "meta":
        return
    first = int(position_ids[:, 0].min())
    if first > seen:
        raise foreign_call(
            context.name, f"is at position {first} of a text, but {seen} tokens before it are in its state"
        )


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    if kwargs.get("cache") is not None:
        raise PlanError("converted layers keep a state, which paged caches (continuous batching) cannot hold")


def _refuse_split_sequences() -> None:
    """Context and sequence parallelism hand each process a part of every sequence; a state needs all that came before.

    accelerate says so in its state, torch by having replaced the function whose calls it splits.
    """
    accelerate_state = sys.modules.get("accelerate.state")
    shared = {} if accelerate_state is None else accelerate_state.AcceleratorState._shared_state
    parallelism = shared.get("parallelism_config")
    sizes = [getattr(parallelism, name, None) or 1 for name in ("cp_size", "sp_size")]
    function = F.scaled_dot_product_attention
    split = isinstance(function, FunctionType) and "context_parallel" in function.__module__
    if split or max(sizes) > 1:
        raise PlanError(
            "context or sequence parallelism (cp_size, sp_size) splits sequences, which a converted layer cannot see; "
            "use data or fully sharded parallelism"
        )


def original_function(module: nn.Module, config: Any) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function that a module would use by itself, given its own configuration."""
    name = config._attn_implementation
    if name in (None, "eager", ATTENTION):
        for owner in type(module).__mro__:
            eager: Callable[..., tuple[Tensor, Any]] | None = getattr(
                sys.modules.get(owner.__module__), "eager_attention_forward", None
            )
            if eager is not None:
                return eager
        name = "sdpa"
    function: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[name]
    return function
