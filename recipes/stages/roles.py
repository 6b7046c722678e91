"""Training of head roles: which KV heads need the whole text, with the model's own weights frozen."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..fields import NotNegative
from .base import STAGES, NextTokenStage

if TYPE_CHECKING:
    from ...distill.objective import Objective
    from ...distill.trainee import Trainee


@STAGES.register
class RolesStage(NextTokenStage):
    """Train the shares of `head_roles` alone: to stay near the base on texts that hide something, with few full heads.

    Attributes:
        keep: fraction of the KV heads whose full attention costs nothing, in [0, 1]; 0 = each costs (L1).
        penalty: weight of what the shares come to beyond that, mean over heads.
        text_weight: weight of the divergence on ordinary text, beside that on what is asked for.
    """

    kind: Literal["roles"] = "roles"
    keep: Annotated[float, Field(ge=0, le=1)] = 0.5
    penalty: NotNegative = 3.0
    text_weight: NotNegative = 1.0

    def objective(self, trainee: "Trainee", adapter: str | None) -> "Objective":
        from ...distill.roles import RoleTraining

        return RoleTraining(trainee, self)
