"""Hedgehog: pure linear attention with learned softmax-like feature maps."""

from typing import Literal

from torch import Tensor

from ..registry import register
from ..window import divide
from .base import LinearOptions
from .pure import PureLinearModule

# The same in every path: prefill and decode must divide alike.
EPSILON = 1e-6


class HedgehogOptions(LinearOptions):
    """Options of `hedgehog`.

    Attributes:
        feature_map: `hedgehog` (LoLCATs form) or `hedgehog_fla` (flash-linear-attention form).
    """

    feature_map: Literal["hedgehog", "hedgehog_fla"] = "hedgehog"


@register(
    name="hedgehog",
    options=HedgehogOptions,
    paper="https://arxiv.org/abs/2402.04347",
    summary="pure linear attention with learned softmax-like feature maps",
)
class HedgehogAttention(PureLinearModule):
    """`y_i = φ(q_i)·Σ φ(k_j) v_jᵀ / (φ(q_i)·Σ φ(k_j) + ε)` over `j ≤ i`, or over all j when not causal.

    Paper: https://arxiv.org/abs/2402.04347
    """

    def combine(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """Numerator over denominator."""
        return divide(numerator, denominator, EPSILON)
