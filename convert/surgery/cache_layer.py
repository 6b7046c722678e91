"""The cache layer of a converted module: an `AttentionState` inside transformers' `Cache`."""

from functools import wraps
from typing import Any

import transformers
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache, LinearAttentionCacheLayerMixin

from ...attention_modules.base import AttentionModule
from ...attention_modules.registry import get_method
from ...attention_modules.state import AttentionState
from ...compat import LayerTypes, let_masks_pass_over, plain_cache_layers, wrap_layer_types
from ...errors import PlanError
from .code_copies import is_ours

# Of each copy of this code its own.
LAYER_TYPE = f"attnconv of {__name__}"


class AttnConvCacheLayer(CacheLayerMixin, LinearAttentionCacheLayerMixin):
    """Holds one converted module's state.

    `update`, which models call before attention, passes the new keys and values through; the attention function gives
    them to the state. A layer that also caches something else (a convolution, an index) keeps doing so in `inner`.

    Args:
        inner: the layer that stood here before, or its type and arguments; None when it held keys and values only.
        settings: what a static cache tells each of its layers.
    """

    # Not registered by being defined: a second copy of this code in one process must change nothing.
    _layer_type = None
    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, inner: Any = None, **settings: Any) -> None:
        self.inner = None
        self.state: AttentionState | None = None
        self._record_past = False
        # Tokens that `update` gave away and no attention has taken over yet.
        self.handed_out = 0
        LinearAttentionCacheLayerMixin.__init__(self)
        CacheLayerMixin.__init__(self)
        if isinstance(inner, tuple):
            layer_type, kwargs = inner
            inner_class = self._inner_classes()[layer_type]
            inner = None if inner_class in plain_cache_layers() else inner_class(**settings, **kwargs)
        if inner is not None and type(inner) not in plain_cache_layers():
            # Looked up in the inner layer from now on, see __getattr__.
            for name in [name for name in vars(self) if hasattr(inner, name) and name in _LINEAR_ATTRIBUTES]:
                delattr(self, name)
            self.inner = inner

    @staticmethod
    def _inner_classes() -> dict[str, Any]:
        return cache_utils.DYNAMIC_LAYER_TYPE_MAPPING

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("inner")
        if inner is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(inner, name)

    @property
    def record_past(self) -> bool:
        """Whether the tokens of the latest call can be taken back."""
        return self._record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._record_past = value
        if self.state is not None:
            self.state.record_past = value

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return 0 if self.state is None else self.state.nbytes

    def state_of(self, core: AttentionModule) -> AttentionState:
        """The state, made by the module on first use."""
        if self.state is None:
            self.state = core.new_state()
            self.state.record_past = self._record_past
            self.is_initialized = True
            if self.inner is None:
                self.has_previous_state = dict.fromkeys(self.has_previous_state, True)
        return self.state

    def take_over(self, core: AttentionModule) -> AttentionState:
        """The state, for a core that appends all tokens that `update` gave away."""
        self.handed_out = 0
        return self.state_of(core)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: the state starts with the first token."""
        if self.inner is not None:
            self.inner.lazy_initialization(*args, **kwargs)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new tokens on; the attention function stores their final form.

        Raises:
            PlanError: those of an earlier call never reached it.
        """
        self._refuse_lost_tokens()
        self.handed_out = key_states.shape[2]
        if self.keys is None:
            # Some models look at the shape of what is cached. A slice would keep the whole prompt's memory.
            self.keys, self.values = (
                states.new_empty((*states.shape[:2], 0, *states.shape[3:])) for states in (key_states, value_states)
            )
        return key_states, value_states

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """Belongs to the layer that stood here before."""
        return self._inner_layer().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        """Belongs to the layer that stood here before."""
        return self._inner_layer().update_recurrent_state(*args, **kwargs)

    def _inner_layer(self) -> Any:
        if self.inner is None:
            raise PlanError(
                "the model keeps a state of its own in this cache layer, but the cache was built without it"
            )
        return self.inner

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks span all tokens seen, although only a few are held."""
        self._refuse_lost_tokens()
        return self.get_seq_length() + query_length, 0

    def _refuse_lost_tokens(self) -> None:
        if self.handed_out:
            raise PlanError(
                f"{self.handed_out} tokens of this cache were never taken over by the converted attention "
                f"(transformers {transformers.__version__}): start with an empty cache, and run `attnconv doctor`"
            )

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return 0 if self.state is None else self.state.seen

    def get_max_length(self) -> int:
        """There is no maximum."""
        return -1

    def activate_past_recording(self) -> None:
        """Let the next `crop` be exact."""
        self.record_past = True
        self._to_inner("activate_past_recording")

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens."""
        if self.state is not None:
            self.state.crop(abs(tokens_to_remove))
        self._to_inner("crop", tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self.state = None
        self.handed_out = 0
        self.is_initialized = False
        if self.inner is None:
            self.has_previous_state = dict.fromkeys(self.has_previous_state, False)
        self._to_inner("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes a copy of row `beam_idx[b]`."""
        if self.state is not None:
            self.state.reorder(beam_idx)
        self._to_inner("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            self.state.repeat(repeats)
        self._to_inner("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self.state is not None:
            self.state.reorder(indices)
        self._to_inner("batch_select_indices", indices)

    def offload(self) -> None:
        """Stay: a state is small, is needed at every step, and caches do not prefetch layers of a fixed size."""

    def prefetch(self) -> None:
        """Nothing was moved away."""

    def _to_inner(self, method: str, *args: Any) -> None:
        function = getattr(self.inner, method, None)
        if function is not None:
            function(*args)


_LINEAR_ATTRIBUTES = (
    "number_of_states",
    "conv_states",
    "recurrent_states",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
)


class StaticAttnConvCacheLayer(AttnConvCacheLayer):
    """The same layer inside a StaticCache."""

    # A cache counts as compileable only if all its layers do, and masks of the unconverted static layers depend on it.
    is_compileable = True

    def __init__(self, inner: Any = None, **settings: Any) -> None:
        self.max_cache_len: int = settings.get("max_cache_len") or getattr(inner, "max_cache_len", None) or 0
        super().__init__(inner, **settings)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As wide as for static layers: a mask made for this layer may serve unconverted ones too."""
        length, offset = super().get_mask_sizes(query_length)
        return max(length, self.max_cache_len), offset

    @staticmethod
    def _inner_classes() -> dict[str, Any]:
        return cache_utils.STATIC_LAYER_TYPE_MAPPING


def self_attention_cache(cache: Cache) -> Cache:
    """The part of a cache that belongs to self-attention."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def layer_of(cache: Cache, layer_idx: int) -> AttnConvCacheLayer:
    """Our layer at `layer_idx`, put there on first sight if the cache was built without us.

    Raises:
        PlanError: the cache holds keys and values already, which a state cannot take over.
    """
    cache = self_attention_cache(cache)
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if not isinstance(layer, AttnConvCacheLayer):
        filled = isinstance(layer, CacheLayerMixin) and layer.is_initialized and layer.get_seq_length()
        if filled:
            raise PlanError(
                f"layer {layer_idx} of this cache was filled by an unconverted model; start with an empty cache"
            )
        kind = StaticAttnConvCacheLayer if isinstance(layer, cache_utils.StaticLayer) else AttnConvCacheLayer
        ours = kind(inner=layer)
        ours.record_past = getattr(layer, "record_past", False)
        cache.layers[layer_idx] = ours
    found = cache.layers[layer_idx]
    assert isinstance(found, AttnConvCacheLayer)
    return found


def register_cache_layers() -> None:
    """Let DynamicCache and StaticCache build our layers for configs that carry our section."""
    cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = AttnConvCacheLayer
    cache_utils.STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = StaticAttnConvCacheLayer

    def wrapper(original: LayerTypes) -> LayerTypes:
        def layer_types(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
            types, kwargs = original(config)
            section = getattr(config, "attnconv", None)
            # Encoder and decoder caches share one config; there the layers are put in place on first sight.
            if not is_ours(section) or getattr(config, "is_encoder_decoder", False):
                return types, kwargs
            types, kwargs = list(types), list(kwargs)
            for entry in section.get("modules", {}).values():
                if get_method(entry["method"]).module_class.keeps_softmax:
                    continue
                index = entry.get("layer_idx")
                if index is not None and index < len(types) and types[index] != "dummy":
                    types[index], kwargs[index] = LAYER_TYPE, {"inner": (types[index], kwargs[index])}
            return types, kwargs

        return layer_types

    wrap_layer_types(wrapper)
    let_masks_pass_over(lambda layer: isinstance(layer, AttnConvCacheLayer))
    _let_prefetch_find_nothing()


def _let_prefetch_find_nothing() -> None:
    """An offloading cache looks for a layer to prefetch, and fails if there is none because all are converted."""
    original = Cache.prefetch

    @wraps(original)
    def prefetch(self: Cache, layer_idx: int, only_non_sliding: bool = True) -> None:
        theirs = [x for x in self.layers if isinstance(x, CacheLayerMixin) and not isinstance(x, AttnConvCacheLayer)]
        if not all(only_non_sliding and getattr(layer, "is_sliding", False) for layer in theirs):
            original(self, layer_idx, only_non_sliding)

    setattr(Cache, "prefetch", prefetch)  # noqa: B010
