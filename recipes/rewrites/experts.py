"""Feed-forwards made experts with a router before them."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from ..fields import Count, CountOrZero, Positive, Section, Text
from ..selectors import Layers, parse_layers
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
        target: the class, by its model type; `auto` takes the first that fits the model. `jetmoe` makes experts of the
            query heads too, and takes none of the settings but the two counts and the seed.
        num_experts: experts of each layer; null means 4, and with sources one copy of each model.
        active: how many of them a token goes through.
        granularity: how many experts are as wide as one feed-forward; both counts must be multiples of it.
        init: `{kind: copy}`, `{kind: drop, ratio: 0.5}` for neurons drawn anew, `{kind: noise, scale: 0.01}`.
        router: `random` draws its weights; `prompts` and `centroids` tell copies apart by what the model makes of
            texts; `zero` sends all tokens to the same experts, which training cannot change. Routing that looks at
            other tokens too, by `similarity` or `attention` (Graph of Tokens, https://arxiv.org/abs/2505.00792), is
            refused: the classes route each token by itself, and their caches keep nothing of how earlier ones went.
        prompts: for `prompts`, a list of texts for each copy.
        domains: for `centroids`, a txt or jsonl file, which may end in .gz, for each copy.
        text_tokens: tokens of each of these at most.
        shared: `dense` makes the expert that all tokens go through the feed-forward too, `none` lets it do nothing;
            `auto` is `dense` where the class has a gate for it.
        layers: which layers, as for attention; not all classes can keep some dense.
        seed: what random weights are drawn from.
        sources: fine-tuned branches of the model, folders or Hub ids, whose feed-forwards become experts.
        include_base: whether the model's own do too; it comes first.
        rest: everything else: the `average` over all models that experts come from, `base`, or one of the sources.
    """

    kind: Literal["experts"] = "experts"
    target: Literal[
        "auto",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "granitemoe",
        "granitemoeshared",
        "flex_olmo",
        "glm4_moe",
        "hunyuan_v1_moe",
        "ernie4_5_moe",
        "jetmoe",
        "olmoe",
    ] = "auto"
    num_experts: Count | None = None
    active: Count = 2
    granularity: Count = 1
    init: Annotated[CopyStart | DropStart | NoiseStart, Field(discriminator="kind")] = CopyStart()
    router: Literal["random", "zero", "prompts", "centroids"] = "random"
    prompts: list[list[Text]] = Field(default_factory=list)
    domains: list[Text] = Field(default_factory=list)
    text_tokens: Count = 4096
    shared: Literal["auto", "dense", "none"] = "auto"
    layers: Layers = "all"
    seed: CountOrZero = 0
    sources: list[Text] = Field(default_factory=list)
    include_base: bool = True
    rest: Text = "average"

    @property
    def count(self) -> int:
        """Experts of each layer."""
        if self.num_experts is not None:
            return self.num_experts
        return (len(self.sources) + self.include_base) * self.granularity if self.sources else 4

    @field_validator("router", mode="before")
    @classmethod
    def _routes_each_token_alone(cls, given: Any) -> Any:
        if given in ("similarity", "attention"):
            raise ValueError(
                f"router: {given} mixes a token's routing with that of earlier tokens, which no class of transformers "
                "computes, and which decoding could not go on with, for no cache keeps how tokens were routed: write "
                "random, prompts or centroids"
            )
        return given

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.count < 2:
            raise ValueError("num_experts must be at least 2: one expert leaves a router nothing to choose")
        if self.active > self.count:
            raise ValueError(f"active is {self.active}, and there are only {self.count} experts: give at most as many")
        if not self.sources and not self.include_base:
            raise ValueError("include_base: false leaves nothing to make experts of: give sources")
        if self.rest not in ("average", "base", *self.sources):
            raise ValueError(f"rest is {self.rest!r}: write average, base, or one of the sources")
        return self

    @model_validator(mode="after")
    def _fits_jetmoe(self) -> Self:
        if self.target == "jetmoe":
            fitting = {"kind", "target", "num_experts", "active", "seed"}
            given = sorted(self.model_dump(exclude_defaults=True).keys() - fitting)
            if given:
                raise ValueError(f"target: jetmoe knows no {', '.join(given)}: leave it out")
        return self

    @model_validator(mode="after")
    def _router_has_texts(self) -> Self:
        for key, router in {"prompts": "prompts", "domains": "centroids"}.items():
            given = getattr(self, key)
            if self.router == router and not given:
                raise ValueError(
                    f"router: {router} needs {key}: one for each copy, {self.count // self.granularity} here"
                )
            if given and self.router != router:
                raise ValueError(f"{key} are for router: {router}, and router is {self.router}: leave one of them out")
            if any(not texts for texts in given):
                raise ValueError(f"{key} must hold some text for each copy")
        return self

    def step(self) -> "Step":
        from ...convert.rewriting.experts import Experts
        from ...convert.rewriting.jetmoe import JetMoe

        if self.target == "jetmoe":
            return JetMoe(num_experts=self.count, active=self.active, seed=self.seed)
        return Experts(
            num_experts=self.count,
            active=self.active,
            target=None if self.target == "auto" else self.target,
            granularity=self.granularity,
            shared=self.shared,
            layers=self._chosen(),
            start=self.init.start(self.seed),
            zero_router=self.router == "zero",
            seed=self.seed,
            sources=self.sources,
            include_base=self.include_base,
            rest=self.rest,
            texts=self._texts(),
            text_tokens=self.text_tokens,
        )

    def _texts(self) -> list[list[str]] | None:
        from ...evaluate.tasks.textfile import read_documents

        if self.router == "prompts":
            return self.prompts
        if self.router != "centroids":
            return None
        # A token is seldom more than this many characters, and none of the rest would be read.
        return [list(_first(read_documents(path), 16 * self.text_tokens)) for path in self.domains]

    def _chosen(self) -> Callable[[int, int], bool]:
        selector = parse_layers(self.layers)

        def chosen(number: int, count: int) -> bool:
            selector.check(count)
            return selector.matches(number, count, f"model.layers.{number}.mlp")

        return chosen


def _first(documents: Iterator[str], characters: int) -> Iterator[str]:
    for text in documents:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)
