"""Another floating type for all weights."""

from typing import TYPE_CHECKING, Literal

from .base import REWRITES, RewriteBase

if TYPE_CHECKING:
    from ...convert.rewriting.steps import Step


@REWRITES.register
class CastRewrite(RewriteBase):
    """Round all weights to one floating type, tensor by tensor.

    Attributes:
        dtype: the type.
    """

    kind: Literal["cast"] = "cast"
    dtype: Literal["float32", "bfloat16", "float16"]

    def step(self) -> "Step":
        import torch

        from ...convert.rewriting.cast import Cast

        return Cast(getattr(torch, self.dtype))
