"""Logit distillation: the model learns the teacher's distribution over the next token."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from ..fields import Positive
from .base import STAGES, CoreTraining, LoraPart, NextTokenStage

if TYPE_CHECKING:
    from ...distill.objective import Objective
    from ...distill.trainee import Trainee


@STAGES.register
class LogitsStage(CoreTraining, NextTokenStage):
    """Train on the divergence from the teacher's next-token distribution.

    Attributes:
        temperature: both distributions are taken at this temperature.
        lora: low-rank updates to train too; null = the new attention alone.
    """

    has_teacher: ClassVar[bool] = True
    kind: Literal["logits"] = "logits"
    train_cores: bool = True
    temperature: Positive = 1.0
    lora: LoraPart | None = None

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if self.lora is None and not (self.train_cores or self.train_routers):
            raise ValueError("lora is null, train_cores and train_routers are false, so there is nothing to train")
        return self

    @property
    def adapter(self) -> LoraPart | None:
        return self.lora

    def objective(self, trainee: "Trainee", adapter: str | None) -> "Objective":
        from ...distill.logits import LogitDistillation

        return LogitDistillation(trainee, self, adapter)
