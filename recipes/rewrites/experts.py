"""Feed-forwards copied into experts with a router before them."""

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator
from typing_extensions import Self

from ..fields import Count, CountOrZero
from .base import REWRITES, RewriteBase

if TYPE_CHECKING:
    from ...convert.rewriting.steps import Step


@REWRITES.register
class ExpertsRewrite(RewriteBase):
    """Make each feed-forward a mixture of experts that are copies of it, in a class that transformers has.

    The weights of a token's experts add up to 1, so the model computes what it did before, whatever the router says.

    Attributes:
        target: the class, by its model type; `auto` takes the one that fits the model.
        num_experts: experts of each layer.
        active: how many of them a token goes through.
        router: `random` draws its weights; `zero` sends all tokens to the same experts, which training cannot change.
        seed: what random weights are drawn from.
    """

    kind: Literal["experts"] = "experts"
    target: Literal["auto", "mixtral", "qwen2_moe", "qwen3_moe"] = "auto"
    num_experts: Count = 4
    active: Count = 2
    router: Literal["random", "zero"] = "random"
    seed: CountOrZero = 0

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.num_experts < 2:
            raise ValueError("num_experts must be at least 2: one expert leaves a router nothing to choose")
        if self.active > self.num_experts:
            raise ValueError(
                f"active is {self.active}, and there are only {self.num_experts} experts: give at most num_experts"
            )
        return self

    def step(self) -> "Step":
        from ...convert.rewriting.experts import Experts

        return Experts(
            num_experts=self.num_experts,
            active=self.active,
            target=None if self.target == "auto" else self.target,
            zero_router=self.router == "zero",
            seed=self.seed,
        )
