"""The contract of an evaluation task: it cuts its work into units, and scores the items of one unit after another.

The engine does the rest: loading models, progress, the journal that lets an interrupted evaluation go on, pairing,
intervals, and the file that reports are made of.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...convert.reading.checkpoint import Checkpoint
from ...recipes.fields import Count, Section
from ..engine.items import Item, Metric

Settings = TypeVar("Settings", bound="TaskSettings")


class TaskSettings(Section):
    """A task in a suite; each task's own class adds its keys, `kind` among them.

    Attributes:
        limit: Items at most; None means all.
    """

    limit: Count | None = None


@dataclass(frozen=True)
class Scope:
    """What of a task is measured, and how much at once.

    Attributes:
        limit: Items at most (questions, prompts, windows); None means all.
        batch_size: Sequences in one forward pass at most.
    """

    limit: int | None = None
    batch_size: int = 8


@dataclass
class Subject:
    """A model under test.

    Attributes:
        role: `"model"` or `"base"`.
        source: The model as it was named.
        checkpoint: Its files.
        tokenizer: Its tokenizer.
        loaded: The model itself while it is in memory, in evaluation mode.
        base: What it is compared with, if there is such a model; loaded too for tasks with `needs_base`.
    """

    role: str
    source: str
    checkpoint: Checkpoint = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    loaded: PreTrainedModel | None = field(default=None, repr=False)
    base: "Subject | None" = field(default=None, repr=False)

    @property
    def model(self) -> PreTrainedModel:
        """The loaded model."""
        assert self.loaded is not None, f"{self.source} is not loaded"
        return self.loaded

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.model.device


@dataclass(frozen=True)
class Unit:
    """A part of a task's work that is measured, and journaled, as one; a few seconds at most is best.

    Attributes:
        tokens: How much work it is, for the progress bar.
        content: What the task put there: windows, prompts, a batch of questions.
    """

    tokens: int
    content: Any


@dataclass(frozen=True)
class Outcome:
    """What measuring a unit gave.

    Attributes:
        items: The scores.
        extra: More to keep in the results than scores, in plain JSON values, such as a matrix to draw.
    """

    items: Sequence[Item]
    extra: Any = None


class Task(ABC, Generic[Settings]):
    """One evaluation task with its settings."""

    # Whether it compares a model with its base, both loaded, instead of scoring each alone.
    needs_base: ClassVar[bool] = False
    # Whether items are pieces of the token stream, so that models can be paired only if their tokens are the same.
    counts_tokens: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = ()
    # Keys of groups that split the items; figures are computed for each part.
    slices: ClassVar[tuple[tuple[str, ...], ...]] = ()
    # Whether all items together have figures too.
    overall: ClassVar[bool] = True

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def units(self, subject: Subject, scope: Scope) -> Sequence[Unit]:
        """Cut the work, the same way each time; the model is not loaded yet, its tokenizer and config are there.

        Raises:
            DataError: the data cannot be used.
            CheckpointError: the model cannot do this task.
        """

    @abstractmethod
    def measure(self, subject: Subject, unit: Unit) -> Outcome:
        """Score one unit with the loaded model, under `torch.inference_mode()`."""

    def metrics_of(self, items: Sequence[Item]) -> tuple[Metric, ...]:
        """The metrics of these items; the class's own unless they depend on what was measured."""
        return self.metrics
