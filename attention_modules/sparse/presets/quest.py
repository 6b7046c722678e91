"""Quest: each token chooses pages by a bound on its products with their keys."""

from pydantic import Field

from ...registry import register
from ..base import SparseAttention
from ..options import BlockOptions
from ..slots.scorers import Boxes
from ..slots.selectors import TopBlocks, TopMass
from ..slots.slots import Slots


class QuestOptions(BlockOptions):
    """Options of `quest`.

    Attributes:
        block: tokens of a page.
        budget: tokens that each token attends, in whole pages; null where `density` or `mass` says it.
        density: share of the tokens before it that each token attends, instead of `budget`.
        mass: share of the attention that the chosen pages are thought to hold, instead of `budget`.
    """

    block: int = Field(16, ge=1)
    budget: int | None = Field(1024, ge=1)
    density: float | None = Field(None, gt=0, le=1)
    mass: float | None = Field(None, gt=0, le=1)


@register(
    name="quest",
    options=QuestOptions,
    paper="https://arxiv.org/abs/2406.10774",
    summary="each token chooses pages of keys by the box around them; training-free, for decoding",
)
class QuestAttention(SparseAttention):
    """Pages with the largest bound on the query's product with any key in them.

    Decoding reads the chosen pages alone; a prompt is computed under a mask, which is no faster than dense attention.
    Published with `prefill: dense`.

    Paper: https://arxiv.org/abs/2406.10774
    """

    options: QuestOptions

    def make_slots(self) -> Slots:
        options = self.options
        selector: TopBlocks | TopMass
        if options.mass is not None:
            selector = TopMass(options.mass)
        elif options.density is not None:
            selector = TopBlocks(density=options.density)
        else:
            selector = TopBlocks(blocks=max(1, (options.budget or 1) // options.block))
        return options.slots(scorer=Boxes(), selector=selector, by="token")
