"""attnconv: give a pretrained Hugging Face model another attention.

Importing this package is cheap: it imports neither torch nor transformers. It only asks to be called when
`transformers.modeling_utils` is loaded, and then registers what `from_pretrained` needs to rebuild a converted model.
"""

from typing import TYPE_CHECKING, Any

from wrapt import when_imported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .attention_modules import Geometry, available, create
    from .convert import apply_plan, convert_model, make_plan, probe, sparse
    from .recipes import Recipe, load_recipe
    from .runs import run_conversion

__all__ = [
    "Geometry",
    "Recipe",
    "__version__",
    "apply_plan",
    "available",
    "convert_model",
    "create",
    "load_recipe",
    "make_plan",
    "probe",
    "run_conversion",
    "sparse",
]

_ROOMS = {
    "Geometry": "attention_modules",
    "available": "attention_modules",
    "create": "attention_modules",
    "apply_plan": "convert",
    "convert_model": "convert",
    "make_plan": "convert",
    "probe": "convert",
    "sparse": "convert",
    "run_conversion": "runs",
    "Recipe": "recipes",
    "load_recipe": "recipes",
}


@when_imported("transformers.modeling_utils")
def _register_with_transformers(_module: Any) -> None:
    from .convert.writing.reload import register_hooks

    register_hooks()


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_ROOMS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
