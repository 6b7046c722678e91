"""What makes `AutoModel...from_pretrained` rebuild a converted model, once attnconv is imported."""

import inspect
from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...attention_modules.base import AttentionModule
from ...errors import PlanError
from ...files.own_files import SECTION
from ..planning.plan import Plan
from ..planning.section import AGAIN, lacks_proof
from ..surgery.attention_function import ATTENTION, attnconv_attention
from ..surgery.cache_layer import register_cache_layers
from ..surgery.calls import watch_updates
from ..surgery.code_copies import Section, is_ours, register_copy
from ..surgery.pruned_heads import narrow_to
from ..surgery.swap import CORE, apply_plan, converted_modules
from .weight_mark import MARK_PATTERN, true_tensors_last

CLASS_PREFIX = "AttnConv"


def register_hooks() -> None:
    """Register with transformers; doing it twice changes nothing, and copies of this code leave each other's models be.

    - the attention and mask function named `attnconv`,
    - cache layers, and a look at every filling of a cache while a converted module runs,
    - `PreTrainedModel.post_init`: a model whose config carries our section is converted while it is built,
    - `PreTrainedModel._initialize_weights`: parameters of cores that a checkpoint lacks get their own start,
    - `PreTrainedModel._load_pretrained_model`: what a checkpoint holds must be what its section converts,
    - `PreTrainedModel.save_pretrained`: a converted model is saved so that it never loads as softmax by accident.
    """
    if not register_copy():
        return
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention_of_its_copy)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
    register_cache_layers()
    watch_updates()
    _wrap_post_init()
    _wrap_initialize_weights()
    _wrap_loading()
    _wrap_save_pretrained()


def _attention_of_its_copy(module: Any, *args: Any, **kwargs: Any) -> Any:
    # An unconverted module has none; this one tells what is wrong with that.
    attention = getattr(module, "_attnconv_attention", attnconv_attention)
    return attention(module, *args, **kwargs)


def native_model(architecture: str, module: str) -> type[PreTrainedModel]:
    """The class behind a saved conversion's `auto_map`: transformers' own, under a name of its own.

    Args:
        architecture: transformers' class name, such as `LlamaForCausalLM`.
        module: `__name__` of the generated modeling file.
    """
    register_hooks()
    original = getattr(transformers, architecture)
    name = CLASS_PREFIX + architecture
    model_type = getattr(original.config_class, "model_type", "")
    # Weight conversions are looked up by class name.
    conversions = get_checkpoint_conversion_mapping(architecture) or get_checkpoint_conversion_mapping(model_type)
    if conversions:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    return type(name, (original,), {"__module__": module})


def _wrap_post_init() -> None:
    original: Any = PreTrainedModel.post_init

    @wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        is_marked = self.config._attn_implementation == ATTENTION
        if is_marked:
            # The sentinel in config.json did its duty: without attnconv this name would not have been accepted.
            self.config._attn_implementation_internal = self.get_correct_attn_implementation(None, is_init_check=True)
        original(self)
        # Afterwards, so that patterns of tied weights, expanded there, do not catch the cores' parameters.
        section = getattr(self.config, SECTION, None)
        if section is not None and not isinstance(section, dict):
            Plan.from_config(section)
        elif is_ours(section):
            _convert_while_built(self, section)
        elif is_marked and section is None:
            # A part of a composite, whose section names its modules; if none does, it must not run as softmax.
            _refuse_until_converted(self)

    setattr(PreTrainedModel, "post_init", post_init)  # noqa: B010


def _convert_while_built(model: PreTrainedModel, section: dict[str, Any]) -> None:
    plan = Plan.from_config(section)
    present = (name for name, _ in model.named_modules())
    names = resolve_names([entry.name for entry in plan.entries], present, model.base_model_prefix)
    if names is not None:
        renamed = plan.rename(names)
        narrow_to(apply_plan(model, renamed), renamed)
        # The section keeps the names of the model that was converted.
        model.config.attnconv = Section(section)
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), MARK_PATTERN}
        # In whatever dtype the model is loaded, its cores stay in fp32.
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "attnconv"}
        for part in model.modules():
            handle = part.__dict__.pop("_attnconv_pending", None)
            if handle is not None:
                handle.remove()
    elif type(model).__name__.removeprefix(CLASS_PREFIX) in (model.config.architectures or ()):
        raise PlanError(
            f"the converted modules named in config.json are not in {type(model).__name__}: "
            f"{plan.entries[0].name} and {len(plan.entries) - 1} more"
        )
    else:
        # A part of a larger model, which will resolve the names itself; alone it must not run as softmax.
        _refuse_until_converted(model)


def _refuse_until_converted(model: PreTrainedModel) -> None:
    model.__dict__["_attnconv_pending"] = model.register_forward_pre_hook(_refuse_to_run)


def _refuse_to_run(model: nn.Module, args: Any) -> None:
    raise PlanError(
        f"{type(model).__name__} was built from a converted model's config, but the converted modules are not in it"
    )


def resolve_names(wanted: list[str], present: Iterable[str], prefix: str) -> dict[str, str] | None:
    """Find saved module names in a model that may have a head which the saved one had not, or the other way round.

    No other prefix may come or go: an encoder's layers are called like the decoder's, a text tower's like an image
    tower's, and a name without its beginning would be found in either.

    Args:
        wanted: saved names.
        present: names of all modules.
        prefix: what the model's class calls the model below its head (`base_model_prefix`).

    Returns:
        saved name → name in this model, or None if not all are there.
    """
    names = set(present)
    head = f"{prefix}."
    candidates = [{name: name for name in wanted}, {name: head + name for name in wanted}]
    if all(name.startswith(head) for name in wanted):
        candidates.append({name: name.removeprefix(head) for name in wanted})
    return next((mapping for mapping in candidates if names.issuperset(mapping.values())), None)


def _wrap_initialize_weights() -> None:
    original = PreTrainedModel._initialize_weights

    @wraps(original)
    def _initialize_weights(self: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if module.__dict__.get("_attnconv_owner") is not AttentionModule:
            original(self, module, *args, **kwargs)
        elif isinstance(module, AttentionModule):
            _initialize_missing(module)

    setattr(PreTrainedModel, "_initialize_weights", _initialize_weights)  # noqa: B010


@torch.no_grad()
def _initialize_missing(core: AttentionModule) -> None:
    """Start the parameters that were not loaded; those that were stay."""
    loaded = {name: p.clone() for name, p in core.named_parameters() if getattr(p, "_is_hf_initialized", False)}
    if len(loaded) == len(list(core.parameters())):
        return
    core.reset_parameters()
    for name, parameter in core.named_parameters():
        if name in loaded:
            parameter.copy_(loaded[name])
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def _wrap_loading() -> None:
    original: Any = PreTrainedModel._load_pretrained_model

    def load(model: PreTrainedModel, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        section = getattr(model.config, SECTION, None)
        if section is None and any("_attnconv_pending" in part.__dict__ for part in model.modules()):
            raise PlanError(
                f"config.json marks this model as converted (attn_implementation: {ATTENTION}), but its section "
                f"{SECTION!r}, which says how, is missing; {AGAIN}"
            )
        if section is not None and checkpoint_files is not None:
            checkpoint_files = true_tensors_last(checkpoint_files)
        result = original(model, state_dict, checkpoint_files, *args, **kwargs)
        _check_loaded(model, section, result[0].unexpected_keys)
        return result

    setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(load))  # noqa: B010


def _check_loaded(model: PreTrainedModel, section: Any, unexpected: Iterable[str]) -> None:
    """Refuse a model that lacks cores which its checkpoint has, and one that nothing proves to be whole."""
    left_over = sorted(name for name in unexpected if f".{CORE}." in name)
    # Another head's model may have been built without the converted part, which then refuses to run.
    if left_over and "_attnconv_pending" not in model.__dict__:
        raise PlanError(
            f"the weights hold {left_over[0]} and {len(left_over) - 1} more tensors of a converted attention that "
            f"config.json does not name; {AGAIN}"
        )
    if not is_ours(section) or not lacks_proof(section):
        return
    for name, module in converted_modules(model).items():
        if not list(module.get_submodule(CORE).parameters()):
            raise PlanError(
                f"nothing tells whether config.json still names all converted modules ({name} has no weights of its "
                "own, and the section is an early one without a digest): convert again"
            )


def _wrap_save_pretrained() -> None:
    original: Any = PreTrainedModel.save_pretrained
    signature = inspect.signature(original)

    @wraps(original)
    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        section = getattr(self.config, SECTION, None)
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        if isinstance(section, dict) and given.get("push_to_hub"):
            raise PlanError(
                "save_pretrained(push_to_hub=True) would publish the model before it is marked as converted: save it "
                "without push_to_hub, then run `attnconv push FOLDER USER/NAME`"
            )
        result = original(self, save_directory, *args, **kwargs)
        if isinstance(section, dict) and given.get("is_main_process", True):
            from .save import mark_folder

            mark_folder(save_directory)
        return result

    setattr(PreTrainedModel, "save_pretrained", save_pretrained)  # noqa: B010
