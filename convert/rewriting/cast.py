"""Another floating type for all weights."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import PlanError
from ..reading.weight_files import FLOAT_TYPES
from .steps import Step
from .tensors import NAMES, Target, elementwise

logger = logging.getLogger(__name__)

WHOLE_NUMBERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
# Older and newer names of the key that says which type the weights have.
KEYS = ("dtype", "torch_dtype")


class Cast(Step):
    """Round every floating-point tensor to one type, as `Tensor.to` does; whole numbers stay as they are.

    Args:
        dtype: the type.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @property
    def name(self) -> str:
        """What torch and config.json call the type."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def summary(self) -> str:
        return f"all weights cast to {self.name}"

    @property
    def inexact(self) -> str | None:
        # Every number of the smaller types is one of these.
        return None if self.dtype == torch.float32 else f"weights rounded to {self.name}"

    def check(self, config: Mapping[str, Any]) -> None:
        if config.get("quantization_config"):
            raise PlanError(
                "cast cannot round weights that are quantised, as config.json says these are: "
                "cast the model that they were made from"
            )

    def claims(self, tensor: Target) -> bool:
        return tensor.dtype not in WHOLE_NUMBERS and tensor.dtype != NAMES[self.dtype]

    def rewrite(self, claimed: Mapping[str, Target]) -> Iterable[Target]:
        for tensor in claimed.values():
            if tensor.dtype not in FLOAT_TYPES:
                raise PlanError(
                    f"cast cannot read {tensor.name!r}, which has the type {tensor.dtype}: "
                    "dequantise the model first, with the tool that quantised it"
                )
            yield elementwise(tensor, self.dtype, _Rounding(tensor.name, self.dtype))

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The type stands at the top, and in the parts of models that consist of several."""
        return {"dtype": self.name, **_with_type(config, self.name)}


class _Rounding:
    """Rounds one tensor piece by piece, and looks at what comes out."""

    def __init__(self, tensor: str, dtype: torch.dtype) -> None:
        self.tensor = tensor
        self.dtype = dtype
        self.warned = False

    def __call__(self, piece: Tensor) -> Tensor:
        rounded = piece.to(self.dtype)
        # A sum is finite only if all its terms are, and takes a third of the time of looking at each; that it is
        # not proves nothing, for it may overflow by itself.
        if bool(rounded.sum(dtype=torch.float32).isfinite()) or bool(rounded.isfinite().all()):
            return rounded
        if bool((piece.isfinite() & ~rounded.isfinite()).any()):
            raise PlanError(
                f"{self.tensor!r} holds numbers too large for {str(self.dtype).removeprefix('torch.')}: "
                "cast to a type with a larger range"
            )
        if not self.warned:
            logger.warning("%s holds weights that are not finite, before the cast as after it", self.tensor)
        self.warned = True
        return rounded


def _with_type(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        if key in KEYS:
            value = name
        elif key.endswith("_config") and isinstance(value, Mapping):
            value = _with_type(value, name)
        found[key] = value
    return found
