"""Where supported versions of transformers differ, the version is named here and nowhere else."""

import inspect
from collections.abc import Callable
from typing import Any

from transformers import Cache, cache_utils, masking_utils

LayerTypes = Callable[[Any], tuple[list[str], list[dict[str, Any]]]]


def wrap_layer_types(wrapper: Callable[[LayerTypes], LayerTypes]) -> None:
    """Wrap the function from which transformers builds cache layers for a config."""
    original: LayerTypes = getattr(cache_utils, "get_layer_types_and_kwargs")  # noqa: B009
    setattr(cache_utils, "get_layer_types_and_kwargs", wrapper(original))  # noqa: B010


def let_masks_pass_over(is_ours: Callable[[Any], bool]) -> None:
    """Let causal masks take their size from a layer that is not ours, as transformers >= 5.23 does by itself.

    Older versions ask the first layer that does not slide. Where that one is ours and another one is static, the mask
    would have the length of the tokens seen, and the static layer that of its buffer.
    """
    if hasattr(masking_utils, "find_first_full_attention_index"):
        return
    original = Cache.get_mask_sizes

    def get_mask_sizes(cache: Cache, query_length: int, layer_idx: int) -> tuple[int, int]:
        if layer_idx < len(cache.layers) and is_ours(cache.layers[layer_idx]):
            plain = (
                i for i, layer in enumerate(cache.layers) if type(layer).__name__ in ("DynamicLayer", "StaticLayer")
            )
            layer_idx = next(plain, layer_idx)
        sizes: tuple[int, int] = original(cache, query_length, layer_idx)
        return sizes

    setattr(Cache, "get_mask_sizes", get_mask_sizes)  # noqa: B010


def plain_cache_layers() -> tuple[type, ...]:
    """Cache layers that hold keys and values and nothing else."""
    names = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer", "DummyLayer")
    return tuple(getattr(cache_utils, name) for name in names if hasattr(cache_utils, name))


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a model's or module's `forward` calls its cache: `cache` since transformers 5.24, before it another name."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in a model's output, None if it has none; transformers >= 5.24 calls it `cache`."""
    found = getattr(output, "cache", None)
    return getattr(output, "past_key_values", None) if found is None else found
