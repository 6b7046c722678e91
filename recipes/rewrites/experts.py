"""Feed-forwards made experts with a router before them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ..fields import Count, CountOrZero, Positive, Section
from ..schema import Layers
from ..selectors import parse_layers
from .base import REWRITES, RewriteBase

if TYPE_CHECKING:
    from ...convert.rewriting.starts import Copies
    from ...convert.rewriting.steps import Step


class CopyStart(Section):
    """Experts that are copies."""

    kind: Literal["copy"] = "copy"

    def start(self, seed: int) -> "Copies":
        """What carries it out."""
        from ...convert.rewriting.starts import Copies

        return Copies()


class DropStart(Section):
    """Experts of which some neurons are drawn anew, the same ones in all three matrices.

    Attributes:
        ratio: share of the neurons, in (0, 1].
    """

    kind: Literal["drop"] = "drop"
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5

    def start(self, seed: int) -> "Copies":
        """What carries it out."""
        from ...convert.rewriting.starts import Drop

        return Drop(self.ratio, seed)


class NoiseStart(Section):
    """Experts with noise on every weight.

    Attributes:
        scale: deviation of the noise over that of the matrix.
    """

    kind: Literal["noise"] = "noise"
    scale: Positive = 0.01

    def start(self, seed: int) -> "Copies":
        """What carries it out."""
        from ...convert.rewriting.starts import Noise

        return Noise(self.scale, seed)


@REWRITES.register
class ExpertsRewrite(RewriteBase):
    """Make each feed-forward a mixture of experts that are made of it, in a class that transformers has.

    The weights of a token's experts add up to 1, so while experts are copies the model computes what it did before,
    whatever the router says.

    Attributes:
        target: the class, by its model type; `auto` takes the first that fits the model.
        num_experts: experts of each layer.
        active: how many of them a token goes through.
        granularity: how many experts are as wide as one feed-forward; both counts must be multiples of it.
        init: `{kind: copy}`, `{kind: drop, ratio: 0.5}` for neurons drawn anew, `{kind: noise, scale: 0.01}`.
        router: `random` draws its weights; `zero` sends all tokens to the same experts, which training cannot change.
        shared: `dense` makes the expert that all tokens go through the feed-forward too, `none` lets it do nothing;
            `auto` is `dense` where the class has a gate for it.
        layers: which layers, as for attention; not all classes can keep some dense.
        seed: what random weights are drawn from.
    """

    kind: Literal["experts"] = "experts"
    target: Literal[
        "auto",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "granitemoe",
        "flex_olmo",
        "glm4_moe",
        "hunyuan_v1_moe",
        "ernie4_5_moe",
        "olmoe",
    ] = "auto"
    num_experts: Count = 4
    active: Count = 2
    granularity: Count = 1
    init: Annotated[CopyStart | DropStart | NoiseStart, Field(discriminator="kind")] = CopyStart()
    router: Literal["random", "zero"] = "random"
    shared: Literal["auto", "dense", "none"] = "auto"
    layers: Layers = "all"
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
            granularity=self.granularity,
            shared=self.shared,
            layers=self._chosen(),
            start=self.init.start(self.seed),
            zero_router=self.router == "zero",
            seed=self.seed,
        )

    def _chosen(self) -> Callable[[int, int], bool]:
        selector = parse_layers(self.layers)

        def chosen(number: int, count: int) -> bool:
            selector.check(count)
            return selector.matches(number, count, f"model.layers.{number}.mlp")

        return chosen
