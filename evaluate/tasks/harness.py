"""Tasks of lm-eval, run on the loaded model whatever its attention is.

https://github.com/EleutherAI/lm-evaluation-harness
"""

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ...errors import DataError
from ...files.foreign_errors import first_line
from ...recipes.fields import CountOrZero, Text
from ..engine.items import Item, Metric
from .base import EvaluatedModel, Outcome, Scope, Task, TaskSettings, Unit, register_task

logger = logging.getLogger(__name__)

# How the progress bar weighs a task, whose questions are not known before it runs.
QUESTIONS, TOKENS_EACH = 1_000, 256
# Loggers that say what nobody asked here.
LOGGERS = ("lm_eval", "datasets", "transformers", "huggingface_hub")
# Metrics that are shares of questions, by how their names begin.
SHARES = ("acc", "exact_match", "em", "f1", "contains", "pass@", "match", "quasi_", "prefix_", "mc1", "mc2")
LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "loss", "ter", "wer", "brier")
# Behind the name of a value that others are divided by.
PER = ":per"


class HarnessSettings(TaskSettings):
    """Settings of `harness`.

    Attributes:
        tasks: names of lm-eval's tasks, groups or tags.
        include_path: a folder with task files of one's own.
        num_fewshot: worked examples before each question; None means as each task says.
    """

    kind: Literal["harness"] = "harness"
    tasks: tuple[Text, ...] = Field(min_length=1)
    include_path: str | None = None
    num_fewshot: CountOrZero | None = None


@dataclass(frozen=True)
class _Run:
    name: str
    limit: int | None
    batch_size: int


@register_task(HarnessSettings)
class HarnessTask(Task[HarnessSettings]):
    """What lm-eval's own tasks score, question by question."""

    headline = 7
    slices: ClassVar[tuple[tuple[str, ...], ...]] = (("task",),)

    def units(self, evaluated: EvaluatedModel, scope: Scope) -> Sequence[Unit]:
        """A unit for each name."""
        self._manager()
        tokens = TOKENS_EACH * (scope.limit or QUESTIONS)
        names = dict.fromkeys(self.settings.tasks)
        return [Unit(tokens, _Run(name, scope.limit, scope.batch_size)) for name in names]

    def measure(self, evaluated: EvaluatedModel, unit: Unit) -> Outcome:
        """Let lm-eval run one of its tasks."""
        run: _Run = unit.content
        manager = self._manager()
        with quiet():
            import lm_eval

            results = lm_eval.simple_evaluate(
                model=wrap(evaluated, run.batch_size),
                tasks=load_tasks(manager, run.name),
                num_fewshot=self.settings.num_fewshot,
                limit=run.limit,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=manager,
            )
        return Outcome([item for name, samples in results["samples"].items() for item in items_of(name, samples)])

    def metrics_of(self, items: Sequence[Item]) -> tuple[Metric, ...]:
        """A metric for each number that lm-eval gave its questions."""
        names = dict.fromkeys(name for item in items for name in item.values if not name.endswith(PER))
        divided = {name for item in items for name in item.values if name.endswith(PER)}
        return tuple(_metric(name, f"{name}{PER}" if f"{name}{PER}" in divided else "") for name in names)

    def _manager(self) -> Any:
        """lm-eval's register of tasks, which has all names asked for.

        Raises:
            DataError: lm-eval is not installed, or it does not know a name.
        """
        if find_spec("lm_eval") is None:
            raise DataError("Tasks of kind harness need lm-eval: pip install lm-eval")
        folder = self.settings.include_path
        if folder is not None and not Path(folder).is_dir():
            raise DataError(f"include_path is {folder}, which is no folder.")
        if folder is not None:
            own = _index(folder, False)
            # The register of all that lm-eval has takes seconds to read.
            if not _unknown(own, self.settings.tasks):
                return own
        manager = _index(folder, True)
        unknown = _unknown(manager, self.settings.tasks)
        if unknown:
            near = get_close_matches(unknown[0], manager.all_tasks, n=3)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise DataError(f'lm-eval has no task "{unknown[0]}"{hint}.')
        return manager


@lru_cache(maxsize=4)
def _index(folder: str | None, defaults: bool) -> Any:
    with quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=folder, include_defaults=defaults)


def _unknown(manager: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in manager.task_index]


def load_tasks(manager: Any, name: str) -> list[Any]:
    """lm-eval's task of that name, or all of a group or tag, with their data.

    Raises:
        DataError: the data cannot be had, or the task runs code that a model wrote.
    """
    try:
        tasks = list(manager.load([name])["tasks"].values())
    # Every data set is read by code of its own, which can fail in any way.
    except Exception as error:
        reason = f"{type(error).__name__}, {first_line(error)}"
        raise DataError(f'The lm-eval task "{name}" cannot be loaded: {reason}.') from error
    unsafe = [task.task_name for task in tasks if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise DataError(f'The lm-eval task "{unsafe[0]}" runs code that the model writes, which is not done here.')
    return tasks


def wrap(evaluated: EvaluatedModel, batch_size: int) -> Any:
    """The loaded model as lm-eval wants it."""
    from lm_eval.models.huggingface import HFLM

    # It sets the tokenizer's padding token where there is none.
    tokenizer = copy.deepcopy(evaluated.tokenizer)
    return HFLM(pretrained=evaluated.model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


@contextmanager
def quiet() -> Iterator[None]:
    """Within the context lm-eval and what it uses neither log nor draw progress bars."""
    tqdm: Any = import_module("tqdm").tqdm
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    original = tqdm.__init__

    def disabled(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **{**options, "disable": True})

    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # lm-eval hands no switch through to all of its bars.
    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def items_of(task: str, samples: Sequence[Mapping[str, Any]]) -> list[Item]:
    """The questions of one task with all numbers that they were given.

    Args:
        task: its name.
        samples: lm-eval's samples; one question has several where answers were read out in several ways.
    """
    several = len({sample.get("filter", "none") for sample in samples}) > 1
    values: dict[Any, dict[str, float]] = {}
    notes: dict[Any, str] = {}
    left_out: set[str] = set()
    for sample in samples:
        number = sample["doc_id"]
        notes.setdefault(number, _note(sample))
        found = values.setdefault(number, {})
        for name in sample["metrics"]:
            label = f"{name} ({sample['filter']})" if several else str(name)
            numbers = _numbers(str(name), label, sample[name])
            found |= numbers
            if not numbers:
                left_out.add(str(name))
    for name in sorted(left_out):
        logger.warning("%s of the lm-eval task %s is no mean over questions and is left out.", name, task)
    return [Item(f"{task}/{number}", found, {"task": task}, notes[number]) for number, found in values.items()]


def _numbers(name: str, label: str, value: Any) -> dict[str, float]:
    """What a metric's value adds to an item; nothing if it is no number that can be averaged."""
    if isinstance(value, Real | np.bool_):
        # lm-eval's perplexity of single answers is the exponential of their mean negative log-likelihood.
        return {label: -float(value) if name == "perplexity" else float(value)}
    if isinstance(value, tuple | list) and len(value) == 2 and name.endswith(("perplexity", "bits_per_byte")):
        nats, count = map(float, value)
        return {label: -nats / math.log(2) if name == "bits_per_byte" else -nats, f"{label}{PER}": count}
    return {}


def _note(sample: Mapping[str, Any]) -> str:
    """The model's answer where it wrote one."""
    answers = sample.get("filtered_resps") or [""]
    answer = answers[0]
    return answer.strip() if isinstance(answer, str) else ""


def _metric(name: str, per: str) -> Metric:
    perplexity = name.split(" (")[0].endswith("perplexity")
    lower = any(part in name for part in LOWER_IS_BETTER)
    return Metric(
        name,
        name,
        per,
        scale="exp" if perplexity else "linear",
        better="lower" if lower else "higher",
        compare="ratio" if perplexity else "difference",
        style="percent" if name.startswith(SHARES) else "number",
        meaning="as lm-eval defines it",
    )
