"""Training of head roles: which KV heads need the whole text, with the model's own weights frozen."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..fields import Count, NotNegative, Positive, Section
from .base import STAGES, NextTokenStage

if TYPE_CHECKING:
    from ...distill.objective import Objective
    from ...distill.trainee import Trainee


class RewardPart(Section):
    """Shares that learn from answers which the model generates, instead of from the distance to the base's.

    Attributes:
        answers: answers that are drawn for each question, at least 2; what is learned is which of them were better.
        temperature: at which they are drawn.
        threshold: mean reward, in [0, 1], below which full heads cost nothing.
    """

    answers: Annotated[Count, Field(ge=2, le=256)] = 4
    temperature: Positive = 1.0
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5


@STAGES.register
class RolesStage(NextTokenStage):
    """Train the shares of `head_roles` alone: to stay near the base on texts that hide something, with few full heads.

    Attributes:
        keep: fraction of the KV heads whose full attention costs nothing, in [0, 1]; 0 = each costs (L1).
        penalty: weight of what the shares come to beyond that, mean over heads.
        text_weight: weight of the divergence on ordinary text, beside that on what is asked for.
        reward: learn what is asked for from generated answers; null = from the base's distribution.
    """

    kind: Literal["roles"] = "roles"
    keep: Annotated[float, Field(ge=0, le=1)] = 0.5
    penalty: NotNegative = 3.0
    text_weight: NotNegative = 1.0
    reward: RewardPart | None = None

    def objective(self, trainee: "Trainee", adapter: str | None) -> "Objective":
        from ...distill.role_rewards import RewardedRoles
        from ...distill.roles import RoleTraining

        if self.reward is not None:
            return RewardedRoles(trainee, self, self.reward)
        return RoleTraining(trainee, self)
