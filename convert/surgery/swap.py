"""The surgery: chosen modules keep their class, names and parameters, and hand query, key and value to a core."""

import copy
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...attention_modules.base import AttentionModule
from ...attention_modules.registry import create
from ...errors import PlanError
from ..planning.plan import Plan, PlanEntry
from .attention_function import ATTENTION, CONTEXT, attnconv_attention, core_of, is_converted
from .calls import note_call, running
from .code_copies import Section
from .surroundings import keep_board

CORE = "attnconv"


class ConvertedMixin:
    """Put before a module's own class: notes the call's input and cache layer, then runs the original forward."""

    _attnconv_attention = staticmethod(attnconv_attention)
    _attnconv_original: type[Any]
    # Place (`self` not counted) and name of the argument that the layer's input is.
    _attnconv_input: tuple[int, str]
    # Whether `forward` hands its kwargs on to the attention function; None until the first call has shown it.
    _attnconv_forwards_kwargs: bool | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward; its attention call finds what was noted here.

        Raises:
            PlanError: the attention did not run in the core, or tokens were lost between it and the cache.
        """
        context = note_call(self, args, kwargs)
        if torch.compiler.is_compiling() and self._attnconv_forwards_kwargs is not False:
            # A graph is better without changes of the module; a context that gets lost is an error all the same.
            out = super().forward(*args, **{CONTEXT: context}, **kwargs)  # type: ignore[misc]
            context.check_end()
            return out
        self.__dict__["_attnconv_context"] = context
        try:
            with running(context):
                if self._attnconv_forwards_kwargs is not False:
                    kwargs = {**kwargs, CONTEXT: context}
                out = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__.pop("_attnconv_context", None)
        context.check_end()
        if self._attnconv_forwards_kwargs is None:
            type(self)._attnconv_forwards_kwargs = context.came_as_argument
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Dynamic classes cannot be imported by name, so copies are rebuilt from the original class."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("_attnconv_context", "_attnconv_hook")}
        return _rebuild, (self._attnconv_original,), state


def _input_argument(original: Any) -> tuple[int, str]:
    names = [name for name in inspect.signature(original.forward).parameters if name != "self"]
    name = "hidden_states" if "hidden_states" in names else names[0]
    return names.index(name), name


def _takes_kwargs(original: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(original.forward).parameters.values())


_CLASSES: dict[Any, Any] = {}


def converted_class(original: Any) -> Any:
    """The subclass of `original` whose attention runs in a core."""
    if original in _CLASSES:
        return _CLASSES[original]
    attributes = {
        "_attnconv_original": original,
        "_attnconv_input": _input_argument(original),
        "_attnconv_forwards_kwargs": None if _takes_kwargs(original) else False,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    _CLASSES[original] = type(f"AttnConv{original.__name__}", (ConvertedMixin, original), attributes)
    return _CLASSES[original]


def _rebuild(original: Any) -> Any:
    module_class = converted_class(original)
    return module_class.__new__(module_class)


def converted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every converted module of a model by name; its core is `module.attnconv`."""
    return {name: module for name, module in model.named_modules() if is_converted(module)}


def apply_plan(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Swap attention in place; modules that are converted already stay.

    Args:
        model: any transformers model, on any device (meta included).
        plan: names and methods, as made by `make_plan` or read from a saved config.

    Returns:
        the same model, its config carrying the plan.

    Raises:
        PlanError: a module of the plan is not in the model, or cannot be swapped.
    """
    modules = dict(model.named_modules())
    missing = [entry.name for entry in plan.converted if entry.name not in modules]
    if missing:
        raise PlanError(f"modules of the plan are not in {type(model).__name__}: {', '.join(missing[:3])}")
    for entry in plan.converted:
        if not is_converted(modules[entry.name]):
            _swap(modules[entry.name], entry)
    note_plan(model, plan)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and converted_modules(part):
            if not all(core_of(module).keeps_softmax for module in converted_modules(part).values()):
                _count_positions_from_mask(part)
            if any(core_of(module).reads_board for module in converted_modules(part).values()):
                keep_board(part)
    # Serving engines that bring their own key/value cache must not take a recurrent layer.
    if any(core_of(module).is_recurrent or core_of(module).parts for module in converted_modules(model).values()):
        model._supports_attention_backend = False
    return model


def note_plan(model: PreTrainedModel, plan: Plan) -> None:
    """Let a model's config carry the plan by which it was converted."""
    section = Section(plan.to_config())
    model.config.attnconv = section
    # Caches are built from the text config; an encoder-decoder builds that of cross-attention from it too.
    text_config = model.config.get_text_config(decoder=True)
    if text_config is not model.config and not model.config.is_encoder_decoder:
        text_config.attnconv = section


def undo_plan(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model in memory its own attention back, whatever plan was applied to it; weights of the cores are lost."""
    for module in converted_modules(model).values():
        (module.config,) = module.__dict__["_attnconv_config"]
        module.__class__ = type(module)._attnconv_original  # type: ignore[attr-defined]
        del module._modules[CORE]
        for name in [name for name in module.__dict__ if name.startswith("_attnconv_")]:
            del module.__dict__[name]
    for part in model.modules():
        hooks = part.__dict__.pop("_attnconv_positions", None), *part.__dict__.pop("_attnconv_board", ())
        for hook in hooks:
            if hook is not None:
                hook.remove()
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.__dict__.pop("attnconv", None)
    model.__dict__.pop("_supports_attention_backend", None)
    return model


def _count_positions_from_mask(model: PreTrainedModel) -> None:
    """Make a padded row's positions start at its first real token, as `generate` does, when the caller gives none.

    Softmax attention under RoPE does not notice a shift of all positions; feature maps do. Models with learned or
    fixed absolute positions do notice it and are left as they are.
    """
    parameters = inspect.signature(model.forward).parameters
    has_rope = any("rotary" in name or name.endswith("inv_freq") for name, _ in model.named_buffers())
    if "_attnconv_positions" in vars(model) or "attention_mask" not in parameters or not has_rope:
        return
    config = model.config.get_text_config()
    # A composite that gives tokens several axes (time, height, width) counts them itself, from the mask.
    counts = not model.config.is_encoder_decoder and (config is model.config or not _has_position_axes(config))
    hook: Any = None
    if "position_ids" in parameters:
        hook = _add_position_ids if counts else None
    elif not any(isinstance(m, PreTrainedModel) and converted_modules(m) for m in list(model.modules())[1:]):
        hook = _refuse_left_padding
    if hook is not None:
        model.__dict__["_attnconv_positions"] = model.register_forward_pre_hook(hook, with_kwargs=True)


def _refuse_left_padding(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask[:, 0].all():
        raise PlanError(
            f"{type(model).__name__} counts positions from the first column and takes no position_ids, so a converted "
            "layer would see padding on the left; pad on the right"
        )


def _has_position_axes(config: Any) -> bool:
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [entry for entry in parameters.values() if isinstance(entry, dict)]
    return any("mrope_section" in entry for entry in (parameters, *by_layer_type))


def _add_position_ids(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    tokens = args[0] if tokens is None and args else tokens
    given = kwargs.get("position_ids") is not None
    if given or not isinstance(mask, torch.Tensor) or mask.ndim != 2 or not isinstance(tokens, torch.Tensor):
        return args, kwargs
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
    return args, {**kwargs, "position_ids": positions}


def _swap(module: nn.Module, entry: PlanEntry) -> None:
    original_config: Any = getattr(module, "config", None)
    if original_config is None:
        raise PlanError(f"{entry.name} ({type(module).__name__}) has no config, so its attention cannot be replaced")
    parameter = next(module.parameters())
    with torch.device(parameter.device):
        core = build_core(entry)
    put_core(module, core.train(module.training))
    module.__class__ = converted_class(type(module))
    module.__dict__["_attnconv_name"] = entry.name
    # In a tuple, so that nothing that walks over configs finds it.
    module.__dict__["_attnconv_config"] = (original_config,)
    # Only this module dispatches to us: unconverted layers keep theirs, and set_attn_implementation cannot undo it.
    config = copy.copy(original_config)
    config._attn_implementation_internal = ATTENTION
    module.config = config


def put_core(module: nn.Module, core: AttentionModule) -> None:
    """Give a module the core that its attention runs in, in place of one that it may have."""
    for part in core.modules():
        # A class of this copy of the code, which a self-contained file in the same process has of its own.
        part.__dict__["_attnconv_owner"] = AttentionModule
    module.add_module(CORE, core)


def build_core(entry: PlanEntry) -> AttentionModule:
    """The attention module of one plan entry, its parameters in fp32 whatever the model's dtype."""
    return create(entry.method, entry.geometry, **entry.options).float()
