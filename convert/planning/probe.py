"""Learn a model's attention by watching one forward on the meta device."""

import copy
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...attention_modules.geometry import Geometry
from ...errors import PlanError
from .meta_results import remembered_shapes
from .probe_inputs import candidate_inputs

logger = logging.getLogger(__name__)

_PROBE = "attnconv_probe"
EMBEDDINGS = "position_embeddings"
ROTATE = "apply_rotary_pos_emb"
# Building a larger model with real weights only to look at it would be no favour.
_MAX_CPU_PARAMETERS = 300_000_000


@dataclass(frozen=True)
class ProbedModule:
    """One attention module as its model calls it.

    Attributes:
        name: module name in the model.
        layer_idx: its place in the cache, None without one.
        geometry: head counts, sizes and direction.
        scaling: factor on query-key products, None = `head_dim ** -0.5`.
        calls: times it runs in one forward.
        self_attention: whether queries and keys come from the same tokens.
        extras: what else changes its result: soft caps, sinks, biases, sliding windows, or `mask` for an attention mask
            that also weighs keys.
        class_name: its class.
        image_tokens: tokens that it sees of an image of the model's own size; None if the model takes no images.
        shows_rotation: whether its rotary embedding can be undone and done again from outside.
    """

    name: str
    layer_idx: int | None
    geometry: Geometry
    scaling: float | None
    calls: int
    self_attention: bool
    extras: tuple[str, ...]
    class_name: str
    image_tokens: int | None = None
    shows_rotation: bool = False


def rotary_function(module_class: type[Any]) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The function by which an attention class rotates queries and keys; None if it takes no cosines and sines."""
    function: Callable[..., tuple[Tensor, Tensor]] | None = getattr(
        sys.modules.get(module_class.__module__), ROTATE, None
    )
    return function if EMBEDDINGS in inspect.signature(module_class.forward).parameters else None


_EXTRAS = ("softcap", "s_aux", "position_bias", "indices", "sliding_window")


class _Recorder:
    """The attention function of the probe."""

    def __init__(self) -> None:
        self.calls: dict[int, list[dict[str, Any]]] = {}

    def count(self) -> int:
        """Attention calls so far."""
        return sum(map(len, self.calls.values()))

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if _is_unreadable(attention_mask):
            raise _NeedsDataError(f"{type(module).__name__} makes an attention mask of its own")
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", False) if causal is None else causal
        seen = _sees_next_token(attention_mask)
        note = {
            "module": module,
            "query": tuple(query.shape),
            "key": tuple(key.shape),
            "value_dim": value.shape[-1],
            "causal": bool(causal) if seen is None else not seen,
            "scaling": kwargs.get("scaling"),
            "extras": (
                *(name for name in _EXTRAS if kwargs.get(name) is not None),
                *(("mask",) if _carries_bias(attention_mask) else ()),
            ),
        }
        self.calls.setdefault(id(module), []).append(note)
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _sees_next_token(mask: Any) -> bool | None:
    """Whether the first token sees the second, None if the mask does not tell.

    The adjacent token, since a local window may hide the far ones of a bidirectional layer.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.device.type == "meta" or min(mask.shape[-2:]) < 2:
        return None
    entry = mask[0, 0, 0, 1]
    return bool(entry) if entry.dtype == torch.bool else bool(entry == 0)


def _is_unreadable(mask: Any) -> bool:
    """Whether an additive mask was made on the meta device, where nobody can see if it hides or also weighs keys."""
    return isinstance(mask, Tensor) and mask.dtype.is_floating_point and mask.device.type == "meta"


def _carries_bias(mask: Any) -> bool:
    """Whether an additive mask does more than hide keys."""
    if not isinstance(mask, Tensor) or not mask.dtype.is_floating_point:
        return False
    return bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any())


def _concrete_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A mask that can be looked at, although the model is on the meta device."""
    kwargs.update(device="cpu", allow_is_causal_skip=False, allow_is_bidirectional_skip=False, attention_mask=None)
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


@contextmanager
def _recording() -> Iterator[_Recorder]:
    recorder = _Recorder()
    ALL_ATTENTION_FUNCTIONS.register(_PROBE, recorder)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_PROBE, _concrete_mask)
    try:
        yield recorder
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(_PROBE, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(_PROBE, None)


def probe(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> tuple[ProbedModule, ...]:
    """Find every attention module of an architecture, without weights.

    Args:
        config: the model's config; left untouched.
        model_class: the transformers class that will be loaded.

    Returns:
        the modules in the order in which they are called.

    Raises:
        PlanError: the architecture does not use transformers' attention interface, or cannot be run at all.
    """
    with _recording() as recorder:
        errors: list[Exception] = []
        for device in ("meta", "cpu"):
            try:
                return _watch(config, model_class, device, recorder)
            except _TooLargeError as error:
                raise PlanError(str(error)) from errors[-1]
            # Anything a model's forward may raise on tensors without data; the CPU is the second try.
            except Exception as error:
                errors.append(error)
                logger.debug("probing %s on %s failed", model_class.__name__, device, exc_info=True)
        if any(isinstance(error, KeyError) and _PROBE in str(error) for error in errors):
            raise PlanError(f"{model_class.__name__} does not use transformers' attention interface") from errors[-1]
        raise PlanError(f"{model_class.__name__} could not be probed: {errors[-1]}") from errors[-1]


class _TooLargeError(Exception):
    pass


class _NeedsDataError(Exception):
    pass


def _watch(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], device: str, recorder: _Recorder
) -> tuple[ProbedModule, ...]:
    config = copy.deepcopy(config)
    if hasattr(config, "attnconv"):
        del config.attnconv
    if device == "cpu":
        _refuse_large(config, model_class)
    settings = {"attn_implementation": _PROBE}
    # Without weights, grouped products refuse sizes that they take with them, and a loop over the experts that are used
    # finds none of them; older releases have no choice of experts.
    if getattr(model_class, "_can_set_experts_implementation", bool)():
        settings["experts_implementation"] = "batched_mm" if device == "meta" else "eager"
    with torch.device(device):
        model = model_class._from_config(config, **settings)
    model.eval()
    failure: Exception | None = None
    for inputs in candidate_inputs(model, device):
        recorder.calls.clear()
        try:
            with torch.no_grad(), remembered_shapes(model, recorder.count):
                model(**inputs)
        except _NeedsDataError:
            raise
        # A wrong guess at the inputs shows itself in any way; the next guess follows.
        except Exception as error:  # noqa: BLE001
            failure = failure or error
            continue
        if recorder.calls:
            names = {id(module): name for name, module in model.named_modules()}
            images = any("pixel" in name for name in inputs)
            return tuple(
                _probed(names[key], notes, config, images) for key, notes in recorder.calls.items() if key in names
            )
        failure = None
        break
    if failure is not None:
        raise failure
    return ()


def _refuse_large(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> None:
    with torch.device("meta"):
        model = model_class._from_config(copy.deepcopy(config))
    if model.num_parameters() > _MAX_CPU_PARAMETERS:
        raise _TooLargeError(
            f"{model_class.__name__} cannot run without weights, and is too large to be probed with some"
        )


def _probed(name: str, notes: list[dict[str, Any]], config: PreTrainedConfig, images: bool) -> ProbedModule:
    first = notes[0]
    module = first["module"]
    _, num_heads, query_length, head_dim = first["query"]
    layer_idx = getattr(module, "layer_idx", None)
    hidden_size = getattr(getattr(module, "config", config), "hidden_size", None)
    return ProbedModule(
        name=name,
        layer_idx=layer_idx if isinstance(layer_idx, int) else None,
        geometry=Geometry(
            num_heads=num_heads,
            num_kv_heads=first["key"][1],
            head_dim=head_dim,
            value_dim=first["value_dim"],
            causal=first["causal"],
            hidden_size=hidden_size if isinstance(hidden_size, int) else None,
        ),
        scaling=first["scaling"],
        calls=len(notes),
        self_attention=all(note["query"][2] == note["key"][2] for note in notes) and query_length > 1,
        extras=tuple(dict.fromkeys(extra for note in notes for extra in note["extras"])),
        class_name=type(module).__name__,
        image_tokens=query_length if images else None,
        shows_rotation=rotary_function(type(module)) is not None,
    )
