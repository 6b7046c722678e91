"""Quest: each token chooses pages by a bound on its products with their keys."""

from pydantic import Field

from ...registry import register
from ..base import SparseAttention
from ..options import BudgetOptions
from ..slots.scorers import Boxes
from ..slots.slots import Slots


class QuestOptions(BudgetOptions):
    """Options of `quest`.

    Attributes:
        block: tokens of a page.
        budget: tokens that each token attends, in whole pages; null where `density` or `mass` says it.
        density: share of the tokens before it that each token attends, instead of `budget`.
        mass: share of the attention that the chosen pages are thought to hold, instead of `budget`.
    """

    block: int = Field(16, ge=1)


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
        return self.options.slots(scorer=Boxes(), selector=self.options.selector, by="token")
