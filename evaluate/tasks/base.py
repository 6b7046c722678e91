"""The contract of an evaluation task: it cuts its work into units, and scores the items of one unit after another.

The engine does the rest: loading models, progress, the journal that lets an interrupted evaluation go on, pairing,
intervals, and the file that reports are made of.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...convert.reading.checkpoint import Checkpoint
from ...recipes.fields import Count, Section
from ...recipes.kinds import Kinds
from ..engine.items import Item, Metric

Settings = TypeVar("Settings", bound="TaskSettings")


class TaskSettings(Section):
    """A task in a suite; each task's own class adds its keys.

    Attributes:
        kind: what the task is.
        limit: items at most; None means all.
    """

    kind: str
    limit: Count | None = None


@dataclass(frozen=True)
class Scope:
    """What of a task is measured, and how much at once.

    Attributes:
        limit: items at most (questions, prompts, windows); None means all.
        batch_size: sequences in one forward pass at most.
    """

    limit: int | None = None
    batch_size: int = 8


@dataclass
class EvaluatedModel:
    """A model under test.

    Attributes:
        role: `"model"` or `"base"`.
        source: the model as it was named.
        checkpoint: its files.
        tokenizer: its tokenizer.
        loaded: the model itself while it is in memory, in evaluation mode.
        base: what it is compared with, if there is such a model; loaded too for tasks with `needs_base`.
    """

    role: str
    source: str
    checkpoint: Checkpoint = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    loaded: PreTrainedModel | None = field(default=None, repr=False)
    base: "EvaluatedModel | None" = field(default=None, repr=False)

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
        tokens: how much work it is, for the progress bar.
        content: what the task put there: windows, prompts, a batch of questions.
    """

    tokens: int
    content: Any


@dataclass(frozen=True)
class Outcome:
    """What measuring a unit gave.

    Attributes:
        items: the scores.
        extra: more to keep in the results than scores, in plain JSON values, such as a matrix to draw.
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
    # Its place among the tasks whose first metric stands for them where conversions are compared; None = it does not.
    headline: ClassVar[int | None] = None
    # What a full report has of it, in words; empty where a report does not miss it.
    report_words: ClassVar[str] = ""
    # Whether a report has a section for it alone, besides that of all figures.
    own_section: ClassVar[bool] = False
    # Whether only a converted model can be measured by it.
    of_conversions: ClassVar[bool] = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def units(self, evaluated: EvaluatedModel, scope: Scope) -> Sequence[Unit]:
        """Cut the work, the same way each time; the model is not loaded yet, its tokenizer and config are there.

        Raises:
            DataError: the data cannot be used.
            CheckpointError: the model cannot do this task.
        """

    @abstractmethod
    def measure(self, evaluated: EvaluatedModel, unit: Unit) -> Outcome:
        """Score one unit with the loaded model, under `torch.inference_mode()`."""

    def metrics_of(self, items: Sequence[Item]) -> tuple[Metric, ...]:
        """The metrics of these items; the class's own unless they depend on what was measured."""
        return self.metrics


TASKS: Kinds[TaskSettings] = Kinds("evaluation task", __package__ or "")
AnyTask = Annotated[TaskSettings, TASKS]
_TASK_CLASSES: dict[type[TaskSettings], type[Task[Any]]] = {}
AnyTaskClass = TypeVar("AnyTaskClass", bound=type[Task[Any]])


def register_task(settings: type[TaskSettings]) -> Callable[[AnyTaskClass], AnyTaskClass]:
    """Class decorator that makes a task available in suites, under the kind of its settings.

    Raises:
        ValueError: another task has that kind, or the settings name none.
    """
    TASKS.register(settings)

    def decorate(task: AnyTaskClass) -> AnyTaskClass:
        _TASK_CLASSES[settings] = task
        return task

    return decorate


def make_task(settings: TaskSettings) -> Task[Any]:
    """The task that runs these settings."""
    return _TASK_CLASSES[type(settings)](settings)


def task_classes() -> Mapping[str, type[Task[Any]]]:
    """The class of each kind of task; those that stand for themselves in a comparison first, in their order."""
    found = {kind: _TASK_CLASSES[settings] for kind, settings in TASKS.classes.items()}
    order = {kind: len(found) if task.headline is None else task.headline for kind, task in found.items()}
    return {kind: found[kind] for kind in sorted(found, key=order.__getitem__)}
