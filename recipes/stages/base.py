"""What healing stages have in common, and their registry."""

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ..data import DataSection
from ..fields import Count, CountOrZero, Lengths, NotNegative, Positive, Section, Text, exactly_one
from ..kinds import Kinds

if TYPE_CHECKING:
    from ...distill.fit import Fit
    from ...distill.objective import Objective
    from ...distill.trainee import Trainee

LearningRate = Annotated[float, Field(ge=1e-12, le=1000)]

logger = logging.getLogger(__name__)

# A device that takes more at once does not exist; steps take as many tokens by gradient_accumulation.
LARGEST_BATCH = 1 << 16
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class StageBase(Section, ABC):
    """What every stage has; files of this folder add a `kind`, and are read where recipes are, so without torch.

    Attributes:
        kind: what the stage is.
        tokens: length of the stage in training tokens; either this or `steps`.
        steps: length of the stage in steps; images need this.
        sequence_length: tokens of one training sequence; null for images, each of which is a sequence. A list such as
            `[512, 1024, 4096]` is a schedule: the lengths get equal shares of the stage's steps, in that order; one
            that stands there twice gets two.
        batch_size: sequences a device takes at once; of a schedule those of the longest length, and as many more of a
            shorter one as have the same tokens.
        precision: dtype of the forward pass; weights that are trained stay fp32.
        data: text of this stage, if it is not that of the recipe.
    """

    # Whether it brings each layer near the teacher's, so that how near it came is measured at its end.
    measures_layers: ClassVar[bool] = False
    # Whether it learns from a teacher, which may be a second model in memory.
    has_teacher: ClassVar[bool] = False
    # Whether it is about converted attention, and has nothing to do in a model that keeps its own.
    needs_attention: ClassVar[bool] = False

    kind: str
    tokens: Count | None = None
    steps: Count | None = None
    sequence_length: Lengths | None = None
    batch_size: Annotated[Count, Field(le=LARGEST_BATCH)] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    data: DataSection | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        exactly_one({"tokens": self.tokens is not None, "steps": self.steps is not None})
        return self

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        tokens = (self.longest or 1) * self.batch_size
        unfit = next((length for length in self.lengths if tokens % length), None)
        if unfit is not None:
            raise ValueError(
                f"{unfit} tokens do not divide the {tokens} of a batch (batch_size {self.batch_size} of the longest "
                "sequence_length), which are the same at every length: take lengths that do, such as [512, 1024, 4096]"
            )
        return self

    @model_validator(mode="after")
    def _steps_for_each_length(self) -> Self:
        if self.num_steps < len(self.lengths):
            raise ValueError(
                f"{self.num_steps} {'step is' if self.num_steps == 1 else 'steps are'} fewer than the "
                f"{len(self.lengths)} lengths of sequence_length: give the stage more tokens, or fewer lengths"
            )
        return self

    @property
    def adapter(self) -> "LoraPart | None":
        """What the stage says about low-rank updates; None if it trains none."""
        return None

    @property
    def trains_routers(self) -> bool:
        """Whether the weights of a mixture's routers learn."""
        return False

    @abstractmethod
    def objective(self, trainee: "Trainee", adapter: str | None) -> "Objective | Fit":
        """What the stage trains and on which loss, or what it settles; this is where torch is imported.

        Args:
            trainee: the converted model.
            adapter: name of the stage's own low-rank updates on the model; None if it has none.

        Raises:
            TrainingError: the stage cannot be run on this model.
        """

    def compact(self) -> dict[str, Any]:
        """As for every section, with the kind in front."""
        plain = super().compact()
        return {"kind": plain.pop("kind"), **plain}

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the sequences, in the order of the schedule; none for images."""
        given = self.sequence_length
        return () if given is None else tuple(given) if isinstance(given, list) else (given,)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequences; None for images."""
        return max(self.lengths, default=None)

    def length_at(self, step: int, num_steps: int) -> int | None:
        """Tokens of the sequences of a step, counted from 0, of so many; None for images."""
        return self.lengths[step * len(self.lengths) // num_steps] if self.lengths else None

    def batch_of(self, length: int | None) -> int:
        """Sequences of a length, or images, that a device takes at once."""
        return self.batch_size if length is None else (self.longest or length) * self.batch_size // length

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step on one device, the same at every length; an image counts as one."""
        return (self.longest or 1) * self.batch_size

    @property
    def num_steps(self) -> int:
        """Steps on one device; `tokens` is rounded down to whole steps, but to one step at least."""
        return self.steps_of(1)

    def steps_of(self, processes: int) -> int:
        """Steps of each of some processes, which share the tokens."""
        if self.steps is not None:
            return self.steps
        return max(1, (self.tokens or 0) // self.tokens_per_step // processes)

    def why_unsupported(self, section: DataSection) -> str | None:
        """Why the stage cannot train on these data, None if it can."""
        if section.image_field is None:
            return "needs sequence_length" if self.sequence_length is None else None
        if self.steps is None or self.sequence_length is not None:
            return "trains on images: give steps, and neither tokens nor sequence_length"
        return None


class TrainingStage(StageBase):
    """A stage with an optimizer, whose steps `steps` counts.

    Attributes:
        gradient_accumulation: batches of one optimizer step.
        learning_rate: peak learning rate, in [1e-12, 1000].
        schedule: what the learning rate does after the warm-up.
        warmup_steps: optimizer steps over which the learning rate rises from zero.
        max_grad_norm: gradients are scaled down to this norm; null = never.
        weight_decay: AdamW's decoupled weight decay.
        log_every: optimizer steps between lines of metrics.
        save_every: optimizer steps between checkpoints from which a run resumes, with one every three minutes besides;
            null = only when a signal stops the run.
    """

    gradient_accumulation: Count = 1
    learning_rate: LearningRate
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: CountOrZero = 0
    max_grad_norm: Positive | None = 1.0
    weight_decay: NotNegative = 0.0
    log_every: Count = 10
    save_every: Count | None = 100

    @property
    def tokens_per_step(self) -> int:
        return super().tokens_per_step * self.gradient_accumulation


class NextTokenStage(TrainingStage):
    """A stage whose loss is about the next token."""

    def why_unsupported(self, section: DataSection) -> str | None:
        """Images, besides what no stage can train on."""
        if section.image_field is not None:
            return "learns from the next token, which images do not have: use attention_transfer or features"
        return super().why_unsupported(section)


class LoraPart(Section):
    """Low-rank updates of the model's own weights.

    Attributes:
        rank: rank of each update, at most the smaller side of the largest layer that is updated.
        alpha: updates are scaled by alpha / rank.
        dropout: share of the inputs of each update that is dropped, in [0, 1).
        targets: names of the linear layers to update; `all-linear` = all but the output head, `experts` = all experts
            of a mixture, for which dropout must be 0.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: list[Text] = Field(default_factory=lambda: list(ATTENTION_PROJECTIONS), min_length=1)


class CoreTraining(Section):
    """Whether the new attention and the routers of experts learn along.

    Attributes:
        train_cores: whether the parameters of the new attention are trained in this stage.
        train_routers: whether the routers of experts are.
        core_learning_rate: peak learning rate of both; null = that of the stage.
        balance: weight of the balance loss, of methods that route tokens to heads and of experts.
        z: weight of the z loss of experts' routers, which keeps their logits small.
    """

    train_cores: bool = False
    train_routers: bool = False
    core_learning_rate: LearningRate | None = None
    balance: NotNegative = 0.0
    z: NotNegative = 0.0

    @property
    def trains_routers(self) -> bool:
        """Whether the weights of a mixture's routers learn."""
        return self.train_routers

    @model_validator(mode="after")
    def _rate_has_effect(self) -> Self:
        if self.core_learning_rate is not None and not (self.train_cores or self.train_routers):
            logger.warning("core_learning_rate has no effect where train_cores and train_routers are false")
        for key in ("balance", "z"):
            if getattr(self, key) and not (self.train_cores or self.train_routers):
                logger.warning("%s has no effect on routers where train_cores and train_routers are false", key)
        return self


STAGES: Kinds[StageBase] = Kinds("healing stage", __package__ or "")
Stage = Annotated[StageBase, STAGES]
