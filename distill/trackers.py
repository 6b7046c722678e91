"""Lines of metrics sent on to experiment trackers, through accelerate: TensorBoard, W&B and trackio."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..files.foreign_errors import first_line
from ..recipes.problems import nearest
from .metrics import Record

TRACKERS = ("tensorboard", "trackio", "wandb")
# What those that keep projects call ours.
PROJECT = "attnconv"
# Beside the output: a folder that is replaced as a whole is no place for files that others write.
LOG_FOLDER = "attnconv-logs"

logger = logging.getLogger(__name__)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed.

    Raises:
        TrainingError: one is
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in TRACKERS:
            raise TrainingError(f"There is no tracker {name!r} to log to; {nearest(name, TRACKERS)}")
        if name not in installed:
            raise TrainingError(
                f"The tracker {name!r} is not installed: run `pip install {name}`, or leave --log-to {name} out"
            )


@dataclass
class Trackers:
    """Experiment trackers that get each line of `metrics.jsonl` when it is written; none by default.

    Attributes:
        names: which, see `TRACKERS`.
        output: the folder that the run will write; its name is that of the run, its parent holds the logs.
        steps: optimizer steps of each stage of the run, by which the steps of all stages are one series.
        config: what is said of the run as a whole.
    """

    names: Sequence[str] = ()
    output: Path = Path()
    steps: Sequence[int] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    _open: list[Any] = field(default_factory=list, init=False, repr=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the context the trackers take lines.

        Raises:
            TrainingError: one cannot be started
        """
        try:
            for name in dict.fromkeys(self.names):
                self._open.append(self._started(name))
            yield
        finally:
            while self._open:
                self._take_leave(self._open.pop(0))

    def log(self, record: Record) -> None:
        """Send a line on; a tracker that fails is given up with a warning, for the run is worth more than its log."""
        step = sum(self.steps[: record.index]) + record.step
        for tracker in list(self._open):
            try:
                tracker.log(figures_of(record), step=step)
            # Each tracker has errors of its own, of network, disk and service.
            except Exception as error:  # noqa: BLE001
                self._open.remove(tracker)
                logger.warning("%s takes no more metrics: %s; the run goes on", tracker.name, first_line(error))

    def _take_leave(self, tracker: Any) -> None:
        try:
            tracker.finish()
        # As above; what was trained is there.
        except Exception as error:  # noqa: BLE001
            logger.warning("%s could not be closed: %s; its last lines may be missing", tracker.name, first_line(error))

    def _started(self, name: str) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        try:
            if tracker_class.requires_logging_directory:
                tracker = tracker_class(self.output.name, self.output.absolute().parent / LOG_FOLDER)
            else:
                tracker = tracker_class(PROJECT, name=self.output.name)
            tracker.start()
            tracker.store_init_configuration(dict(self.config))
        # As above: no login, no network, no place to write.
        except Exception as error:
            raise TrainingError(
                f"The tracker {name!r} cannot be started: {first_line(error)}; mend that, or leave --log-to {name} out"
            ) from error
        return tracker


def figures_of(record: Record) -> dict[str, float]:
    """The numbers of a line, by names that begin with the stage's number and kind; those that are none left out."""
    numbers: dict[str, float | None] = {
        record.unit: record.tokens,
        "loss": record.loss,
        "learning_rate": record.learning_rate,
        "grad_norm": record.grad_norm,
        f"{record.unit}_per_second": record.tokens_per_second,
        "sequence_length": record.sequence_length,
        **{f"layer_error/{name}": error for name, error in record.layers.items()},
        **{f"expert_entropy/{name}": load.entropy for name, load in record.experts.items()},
    }
    stage = f"{record.index + 1}_{record.stage}"
    return {f"{stage}/{key}": value for key, value in numbers.items() if value is not None and math.isfinite(value)}
