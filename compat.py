"""Where supported versions of transformers differ, the version is named here and nowhere else."""

import inspect
from collections.abc import Callable
from typing import Any

from transformers import cache_utils

LayerTypes = Callable[[Any], tuple[list[str], list[dict[str, Any]]]]


def wrap_layer_types(wrapper: Callable[[LayerTypes], LayerTypes]) -> None:
    """Wrap the function from which transformers >= 5.18 builds cache layers for a config.

    Older versions build them elsewhere; there our layers take their place when a converted module is first called.
    """
    original = getattr(cache_utils, "get_layer_types_and_kwargs", None)
    if original is not None:
        setattr(cache_utils, "get_layer_types_and_kwargs", wrapper(original))  # noqa: B010


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
