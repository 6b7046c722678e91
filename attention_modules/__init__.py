"""The maths: attention methods behind one contract.

A file in one of the folders `FAMILIES` that registers a method is found by being there.
"""

# Softmax first: it is the one method that belongs to no family.
from ..files.discovery import import_folder
from . import softmax  # noqa: F401
from .base import AttentionModule
from .contract import AttentionOptions
from .geometry import Geometry
from .registry import MethodInfo, available, create, get_method, register
from .state import AttentionState
from .tokens import Call, Surroundings, Tokens

__all__ = [
    "AttentionModule",
    "AttentionOptions",
    "AttentionState",
    "Call",
    "Geometry",
    "MethodInfo",
    "Surroundings",
    "Tokens",
    "available",
    "create",
    "get_method",
    "register",
]

FAMILIES = ("linear", "sparse", "sparse/presets", "heads", "experts")

for _family in FAMILIES:
    import_folder(f"{__name__}.{_family.replace('/', '.')}")
