"""Sparse attention put together by hand: any summary, any choice."""

from typing import Any, Literal

from pydantic import Field

from ...geometry import Geometry
from ...registry import register
from ..base import SparseAttention
from ..options import ChoosingOptions
from ..slots.scorers import Antidiagonals, Boxes, Means, Products, Scorer
from ..slots.selectors import Selector, TopBlocks
from ..slots.slots import By, Slots


class SparseOptions(ChoosingOptions):
    """Options of `sparse`.

    Attributes:
        summary: what stands for a block of keys: their mean, the box around them, their antidiagonal sums, or the
            products with all of them, which is what the others guess at and costs as much as dense attention.
        stride: side of the squares of `antidiagonals`; divides `block`.
        query: whose queries choose: each token for itself, the first of a block for all of it, those of the block
            before, or the block's own, which is for prompts alone.
        blocks: how many blocks are attended, forced ones included, instead of `mass` and `density`.
    """

    summary: Literal["means", "boxes", "antidiagonals", "products"] = "means"
    stride: int = Field(16, ge=1)
    query: By = "previous"
    blocks: int | None = Field(None, ge=1)


@register(
    name="sparse",
    options=SparseOptions,
    paper="https://arxiv.org/abs/2502.11089",
    summary="blocks chosen as one likes: by means, boxes, antidiagonals or products, by mass, density or number",
)
class ComposedSparseAttention(SparseAttention):
    """The slots of the other sparse methods, put together freely; block means by default.

    Paper: https://arxiv.org/abs/2502.11089
    """

    options: SparseOptions

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Choices must fit one another."""
        if options.blocks is not None and (options.mass is not None or options.density is not None):
            return "give blocks, mass or density, not two of them"
        if options.summary == "antidiagonals":
            if options.query in ("token", "first"):
                return f"antidiagonals are of whole blocks of queries, so query: {options.query} cannot choose by them"
            if options.block % options.stride:
                return f"stride={options.stride} does not divide block={options.block}"
        return super().why_unsupported(geometry, options)

    def make_slots(self) -> Slots:
        options = self.options
        scorers: dict[str, Scorer] = {"means": Means(), "boxes": Boxes(), "products": Products(options.block)}
        scorer = scorers.get(options.summary) or Antidiagonals(options.block, options.stride)
        selector: Selector = options.selector if options.blocks is None else TopBlocks(blocks=options.blocks)
        return options.slots(scorer=scorer, selector=selector, by=options.query)
