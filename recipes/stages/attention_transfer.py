"""Attention transfer: each layer by itself learns to give what softmax attention gives."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from ..fields import NotNegative, Section
from .base import STAGES, TrainingStage

if TYPE_CHECKING:
    from ...distill.objective import Objective
    from ...distill.trainee import Trainee


class TransferLoss(Section):
    """The loss of attention transfer, a weighted sum.

    Attributes:
        output_mse: weight of the mean squared error of the heads' outputs.
        weight_cross_entropy: weight of the cross-entropy of the attention weights, which costs memory in L x L.
        normalize_per_layer: divide each layer's output error by the mean square of the teacher's outputs there.
    """

    output_mse: NotNegative = 1000.0
    weight_cross_entropy: NotNegative = 0.0
    normalize_per_layer: bool = False

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if self.output_mse == 0 and self.weight_cross_entropy == 0:
            raise ValueError("output_mse and weight_cross_entropy are both 0, so there is nothing to learn from")
        return self


@STAGES.register
class AttentionTransferStage(TrainingStage):
    """Train the new attention alone to give what softmax attention gives, layer by layer."""

    measures_layers: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = True
    kind: Literal["attention_transfer"] = "attention_transfer"
    loss: TransferLoss = TransferLoss()

    def objective(self, trainee: "Trainee", adapter: str | None) -> "Objective":
        from ...distill.transfer import AttentionTransfer

        return AttentionTransfer(trainee, self)
