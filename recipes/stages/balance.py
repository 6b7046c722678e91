"""Router warm-up: the routers of a mixture of experts learn alone, before anything else does."""

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator
from typing_extensions import Self

from ..fields import NotNegative
from .base import STAGES, NextTokenStage

if TYPE_CHECKING:
    from ...distill.objective import Objective
    from ...distill.trainee import Trainee


@STAGES.register
class BalanceStage(NextTokenStage):
    """Train the routers of experts on the next token and on an even load, with everything else frozen.

    Attributes:
        balance: weight of the balance loss of transformers, 1 for each expert that a token goes through where all
            experts are used and wanted equally.
        z: weight of the z loss, the mean square of the logarithm of what the routers' softmax is divided by.
        next_token: weight of the next-token loss; experts that are copies of each other do not move it.
    """

    kind: Literal["balance"] = "balance"
    balance: NotNegative = 0.01
    z: NotNegative = 0.001
    next_token: NotNegative = 1.0

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not (self.balance or self.z or self.next_token):
            raise ValueError("balance, z and next_token are all 0, so there is nothing to learn from")
        return self

    @property
    def trains_routers(self) -> bool:
        return True

    def objective(self, trainee: "Trainee", adapter: str | None) -> "Objective":
        from ...distill.balance import RouterBalance

        return RouterBalance(trainee, self)
