"""The list of methods: each file of a method registers its class here."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import ValidationError

from .base import AttentionModule
from .contract import AttentionOptions
from .geometry import Geometry

Module = TypeVar("Module", bound=type[AttentionModule])


@dataclass(frozen=True)
class MethodInfo:
    """What is known about a method without building it.

    Attributes:
        name: the key used in recipes.
        module_class: the attention module.
        options_class: the pydantic model of its options.
        paper: URL of the paper, empty for softmax itself.
        summary: one clause.
    """

    name: str
    module_class: type[AttentionModule]
    options_class: type[AttentionOptions]
    paper: str
    summary: str


_METHODS: dict[str, MethodInfo] = {}


def register(*, name: str, options: type[AttentionOptions], paper: str, summary: str) -> Callable[[Module], Module]:
    """Class decorator that makes an attention module available under `name`.

    Raises:
        ValueError: the name is taken or not snake_case, or the paper is no URL.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"method name {name!r} must be lower-case snake_case")
    if name in _METHODS:
        raise ValueError(f"method {name!r} is registered already by {_METHODS[name].module_class.__qualname__}")
    if paper and not paper.startswith("https://"):
        raise ValueError(f"paper of {name!r} must be an https URL, got {paper!r}")

    def decorate(module_class: Module) -> Module:
        module_class.name = name
        _METHODS[name] = MethodInfo(name, module_class, options, paper, summary)
        return module_class

    return decorate


def available() -> tuple[str, ...]:
    """Names of all methods, sorted."""
    return tuple(sorted(_METHODS))


def get_method(name: str) -> MethodInfo:
    """Look a method up.

    Raises:
        ValueError: no such method; the message names the nearest one.
    """
    if name not in _METHODS:
        near = get_close_matches(name, _METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown attention method {name!r}{hint} (available: {', '.join(available())})")
    return _METHODS[name]


def create(name: str, geometry: Geometry, *, implementation: str = "auto", **options: Any) -> AttentionModule:
    """Build one attention module with freshly initialised parameters.

    Args:
        name: a registered method.
        geometry: the layer's head counts and sizes.
        implementation: `"auto"`, `"naive"` (the oracle), `"torch"` or, where the method has kernels, `"triton"`.
        options: the method's options; see `attnconv methods`.

    Raises:
        ValueError: unknown method, option or implementation, or an option out of range.
    """
    info = get_method(name)
    try:
        parsed = info.options_class(**options)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"options of {name!r} are wrong: {problems}") from error
    return info.module_class(geometry, parsed, implementation)
