"""Linear attention with any feature map, normalised by the sum of its weights or by the size of its output."""

from typing import Any, Literal

from torch import Tensor

from ..geometry import Geometry
from ..registry import register
from ..window import divide
from .base import LinearOptions
from .output import HeadNorm
from .pure import PureLinearModule


class LinearAttentionOptions(LinearOptions):
    """Options of `linear`.

    Attributes:
        projection: `learned` gives φ a matrix W of its own, `none` applies its activation to queries and keys as they
            are, which leaves nothing to learn (`initialization` has no effect then).
        normalizer: divide by the sum of the weights, as softmax does; false replaces that by an RMS norm of each
            head's output with a learned weight.
    """

    projection: Literal["learned", "none"] = "learned"
    normalizer: bool = True


@register(
    name="linear",
    options=LinearAttentionOptions,
    paper="https://arxiv.org/abs/2006.16236",
    summary="pure linear attention with a feature map of your choice",
)
class LinearAttention(PureLinearModule):
    """`y_i = φ(q_i)·Σ φ(k_j) v_jᵀ / φ(q_i)·Σ φ(k_j)` over `j ≤ i`, or over all j when not causal.

    With `normalizer: false` the denominator is left out and `y_i` is divided by its root mean square per head, times a
    learned weight that starts at 1: outputs start with a size of 1 whatever the teacher's is, and attention transfer
    has to find that size, so that this form starts farther from the teacher.

    Paper: https://arxiv.org/abs/2006.16236
    """

    options: LinearAttentionOptions

    def __init__(self, geometry: Geometry, options: LinearAttentionOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation, projected=options.projection == "learned")
        self.norm = None if options.normalizer else HeadNorm(geometry.num_heads, geometry.value_dim)

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """A number of columns for a projection that is not there."""
        if options.projection == "none" and options.feature_dim is not None:
            return "feature_dim counts the columns of φ's projection, but projection is none: leave feature_dim out"
        return None

    @property
    def is_normalized(self) -> bool:
        """As chosen."""
        return self.options.normalizer

    def reset_parameters(self) -> None:
        """Start the feature maps and the norm again."""
        super().reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()

    def combine(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """Numerator over denominator, or the numerator alone."""
        return divide(numerator, denominator) if self.options.normalizer else numerator

    def finish(self, out: Tensor, hidden_states: Tensor | None) -> Tensor:
        """The norm that stands in for the normaliser."""
        if self.norm is None:
            return out
        normed: Tensor = self.norm(out)
        return normed
