"""Full and streaming attention of each KV head, mixed by a learned share: which heads need the whole text."""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from ..contract import AttentionOptions, Memory
from ..geometry import Geometry
from ..registry import register
from ..softmax import SoftmaxAttention
from ..sparse.sliding_window import SlidingWindowAttention, SlidingWindowOptions
from ..state import AttentionState
from ..tokens import Call
from ..weights import Statistic


class HeadRolesOptions(AttentionOptions):
    """Options of `head_roles`.

    Attributes:
        window: newest tokens that a streaming head attends, itself included.
        num_sinks: first tokens of the sequence that it sees for ever.
    """

    window: int = Field(256, ge=1)
    num_sinks: int = Field(4, ge=0)


@register(
    name="head_roles",
    options=HeadRolesOptions,
    paper="https://arxiv.org/abs/2410.10819",
    summary="full and streaming attention of each KV head, mixed by a learned share, which tells the heads apart",
)
class HeadRolesAttention(SoftmaxAttention):
    """`α full + (1 - α) streaming`, with one α in [0, 1] for each KV head; it starts at 1, where nothing is changed.

    It is there to be trained and read, not to be used: everything is kept, and twice as much is computed. Heads whose α
    stays large are the ones to keep full; a recipe with `heads` makes such a model.

    Paper: https://arxiv.org/abs/2410.10819
    """

    options: HeadRolesOptions

    def __init__(self, geometry: Geometry, options: HeadRolesOptions, implementation: str = "auto") -> None:
        super().__init__(geometry, options, implementation)
        self.alpha = nn.Parameter(torch.ones(geometry.num_kv_heads))
        settings = SlidingWindowOptions(window=options.window, num_sinks=options.num_sinks)
        # In a tuple: it has no parameters, and is no module that anybody should find.
        self._streaming = (SlidingWindowAttention(geometry, settings),)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.alpha)

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        return self._mixed(super().attend_naive(call, {}), self._streaming[0].attend_naive(call, {}))

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        return self._mixed(super().attend_torch(call, {}), self._streaming[0].attend_torch(call, {}))

    def decode_torch(self, call: Call, state: AttentionState) -> Tensor:
        """As any call: both attentions want all tokens."""
        return self.attend_torch(call.over(call.query, state.append(call.tokens).to(call.query.dtype)), {})

    def statistics(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scaling: float,
        padding_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> Mapping[str, Statistic]:
        """The learned shares, of query heads as of the KV head that they share."""
        shares = self.alpha.detach().clamp(0, 1).repeat_interleave(self.geometry.num_groups)
        found = Statistic("full attention", "learned share of attention to all tokens", "head", "percent", shares)
        return {found.name: found}

    def _mixed(self, full: Tensor, streaming: Tensor) -> Tensor:
        share = self.alpha.to(full.dtype).clamp(0, 1).repeat_interleave(self.geometry.num_groups)
        return streaming + share[:, None, None] * (full - streaming)
