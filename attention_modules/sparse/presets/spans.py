"""Mixture of sparse attention: each head has a window of its own, which grows with the text."""

from typing import Any

from pydantic import Field

from ...geometry import Geometry
from ...registry import register
from ..base import SparseAttention
from ..options import BlockOptions
from ..slots.patterns import Spans
from ..slots.slots import Slots


class SpansOptions(BlockOptions):
    """Options of `spans`.

    Attributes:
        base: tokens that each KV head looks back at the beginning of a text, or one number for all.
        growth: what is added for each token before, one number for each KV head or one for all; 0 is a fixed window, 1
            is everything.
    """

    base: float | list[float] = 512.0
    growth: float | list[float] = Field(0.25)


@register(
    name="spans",
    options=SpansOptions,
    paper="https://arxiv.org/abs/2406.14909",
    summary="first blocks and a window of its own for each KV head, which grows with the text; a fixed pattern",
)
class SpansAttention(SparseAttention):
    """Heads look back `base + growth · n` tokens at the n-th token, in whole blocks.

    Paper: https://arxiv.org/abs/2406.14909
    """

    options: SpansOptions

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """There must be a number for each head, none below zero."""
        for name in ("base", "growth"):
            numbers = _of_heads(getattr(options, name), geometry.num_kv_heads)
            if len(numbers) != geometry.num_kv_heads:
                return f"{name} has {len(numbers)} numbers, but the layer has {geometry.num_kv_heads} KV heads"
            if min(numbers) < 0:
                return f"{name} has a number below zero: {min(numbers)}"
        return super().why_unsupported(geometry, options)

    def make_slots(self) -> Slots:
        heads, options = self.geometry.num_kv_heads, self.options
        base, growth = _of_heads(options.base, heads), _of_heads(options.growth, heads)
        return options.slots(selector=Spans(base, growth, options.block))


def _of_heads(numbers: float | list[float], num_kv_heads: int) -> tuple[float, ...]:
    return tuple(numbers) if isinstance(numbers, list) else (numbers,) * num_kv_heads
