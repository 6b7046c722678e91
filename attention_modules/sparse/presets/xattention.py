"""XAttention: blocks chosen by sums along antidiagonals of the products."""

from typing import Any, Literal

from pydantic import Field

from ...geometry import Geometry
from ...registry import register
from ..base import SparseAttention
from ..options import ChoosingOptions
from ..slots.scorers import Antidiagonals
from ..slots.slots import Slots


class XAttentionOptions(ChoosingOptions):
    """Options of `xattention`.

    Attributes:
        stride: side of the squares whose antidiagonals are summed; divides `block`.
        query: whose queries choose for a block of them: those of the block before, so that a token's output hangs on
            nothing behind it and decoding chooses as prefill does; or its own, as published.
    """

    stride: int = Field(16, ge=1)
    query: Literal["previous", "block"] = "previous"


@register(
    name="xattention",
    options=XAttentionOptions,
    paper="https://arxiv.org/abs/2503.16428",
    summary="blocks chosen by sums along antidiagonals of the query-key products, by mass; training-free",
)
class XAttention(SparseAttention):
    """Blocks whose antidiagonal sums hold most of the mass.

    As published (`query: block`) it is for prompts; `decode: dense` goes with it, for one token is no block.

    Paper: https://arxiv.org/abs/2503.16428
    """

    options: XAttentionOptions

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Squares must fill blocks."""
        if options.block % options.stride:
            return f"stride={options.stride} does not divide block={options.block}"
        return super().why_unsupported(geometry, options)

    def make_slots(self) -> Slots:
        options = self.options
        scorer = Antidiagonals(options.block, options.stride)
        return options.slots(scorer=scorer, selector=options.selector, by=options.query)
