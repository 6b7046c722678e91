"""What a method is without one of the paths that it adds up."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .base import AttentionModule


def paths_of(model: nn.Module) -> tuple[str, ...]:
    """Names of all paths of a model's attention modules, each once, in the order in which they come."""
    cores = [module for module in model.modules() if isinstance(module, AttentionModule)]
    return tuple(dict.fromkeys(path for core in cores for path in core.paths))


@contextmanager
def leaving_out(model: nn.Module, path: str) -> Iterator[None]:
    """Inside, every attention module that has this path computes without it, numerator and normaliser alike.

    Where nothing else is left, as for the first tokens without their window, the output is zero. States go on
    remembering everything, so that they are whole again outside.

    Args:
        model: a converted model, or an attention module.
        path: a name in `AttentionModule.paths`, such as `"linear"` of `lolcats`.

    Raises:
        ValueError: no attention module of the model has such a path.
    """
    cores = [module for module in model.modules() if isinstance(module, AttentionModule) and path in module.paths]
    if not cores:
        known = ", ".join(map(repr, paths_of(model))) or "none"
        raise ValueError(f"no attention module has a path {path!r} that could be left out (there are: {known})")
    before = [core.left_out for core in cores]
    for core in cores:
        core.left_out = core.left_out | {path}
    try:
        yield
    finally:
        for core, left_out in zip(cores, before, strict=True):
            core.left_out = left_out
