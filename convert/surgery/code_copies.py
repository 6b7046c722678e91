"""Which copy of this code serves which model, where a process holds several: the package and self-contained files."""

from typing import Any, TypeGuard

from transformers import PreTrainedModel

from ...attention_modules.registry import get_method
from ..planning.plan import Plan

_COPIES = "_attnconv_copies"


class Section(dict[str, Any]):
    """The `attnconv` section of a model that this copy of the code has converted."""


def register_copy() -> bool:
    """Put this copy on the process's list, the package's before those of files; returns whether it was not there."""
    copies = getattr(PreTrainedModel, _COPIES, ())
    if can_serve in copies:
        return False
    is_package = __package__ == "attnconv.convert.surgery"
    setattr(PreTrainedModel, _COPIES, (can_serve, *copies) if is_package else (*copies, can_serve))
    return True


def can_serve(section: dict[str, Any]) -> bool:
    """Whether this copy knows a section's format, its methods and their options."""
    try:
        for entry in Plan.from_config(section).entries:
            get_method(entry.method).options_class(**entry.options)
            for name in entry.methods:
                get_method(name)
    except (KeyError, TypeError, ValueError):
        return False
    return True


def is_ours(section: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a model's section is this copy's business: it converted the model, or is the first that can.

    A section that no copy can serve is every copy's business, so that it never goes unnoticed.
    """
    if type(section) is not dict:
        return isinstance(section, Section)
    servers = [serve for serve in getattr(PreTrainedModel, _COPIES, ()) if serve(section)]
    return not servers or servers[0] is can_serve
