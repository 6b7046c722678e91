"""How a run shows itself: the interface, a silent one, bars on the terminal, and lines for a log."""

import sys
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars
from rich.table import Column
from typing_extensions import Self

from ..formats import number, rate

# Columns of a terminal from which on a bar has room beside the figures.
WIDE = 128


class Progress(Protocol):
    """What a run tells while it works; every method returns at once."""

    def phase(self, text: str) -> None:
        """Something begins that has no steps to count, such as loading or measuring."""

    def begin(self, text: str, total: int, done: int, unit: str = "tokens") -> None:
        """A stage of `total` steps begins, of which `done` are done already; `unit` is what they read."""

    def step(self, loss: float, per_second: float) -> None:
        """One step of the stage is done; `per_second` counts units."""

    def end(self) -> None:
        """The phase or stage that began last is over."""


class Silent:
    """Shows nothing."""

    def phase(self, text: str) -> None:
        """Nothing."""

    def begin(self, text: str, total: int, done: int, unit: str = "tokens") -> None:
        """Nothing."""

    def step(self, loss: float, per_second: float) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class TerminalProgress:
    """One line on the terminal for each phase and stage, with loss, tokens or images per second and the time left.

    Used as a context manager, which leaves the cursor where it belongs whatever happens.

    Args:
        console: where to write; None means standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        bar: list[ProgressColumn] = [BarColumn(bar_width=30)] if console.width >= WIDE else []
        self.bars = RichBars(
            SpinnerColumn(),
            # What a narrow terminal has no room for goes on in the next line; no figure is ever cut.
            TextColumn("{task.description}", table_column=Column(overflow="fold")),
            *bar,
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
            console=console,
        )
        self.task: TaskID | None = None
        self.unit = "tokens"

    def __enter__(self) -> Self:
        """Begin to draw."""
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self.bars.stop()

    def phase(self, text: str) -> None:
        """A line with a bar that only moves to and fro."""
        self.end()
        self.task = self.bars.add_task(text, total=None, figures="")

    def begin(self, text: str, total: int, done: int, unit: str = "tokens") -> None:
        """A line with a bar that fills."""
        self.end()
        self.unit = unit
        self.task = self.bars.add_task(text, total=total, completed=done, figures="")

    def step(self, loss: float, per_second: float) -> None:
        """Move the bar on by one step."""
        if self.task is not None:
            figures = f"step loss {number(loss)}  {rate(per_second)} {self.unit}/s"
            self.bars.update(self.task, advance=1, figures=figures)

    def end(self) -> None:
        """Show the line as finished."""
        if self.task is None:
            return
        task = next(task for task in self.bars.tasks if task.id == self.task)
        if task.total is None:
            self.bars.update(self.task, total=1, completed=1)
        self.bars.stop_task(self.task)
        self.task = None


class LineProgress:
    """A line on standard error for each phase, and ten for each stage: for logs."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.unit = "tokens"

    def phase(self, text: str) -> None:
        """One line."""
        _say(text)

    def begin(self, text: str, total: int, done: int, unit: str = "tokens") -> None:
        """One line, and steps are counted from here."""
        self.total, self.done, self.unit = total, done, unit
        _say(f"{text}: {total} steps" + (f", {done} done already" if done else ""))

    def step(self, loss: float, per_second: float) -> None:
        """A line after each tenth of the steps."""
        self.done += 1
        if self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            figures = f"step loss {number(loss)}, {rate(per_second)} {self.unit}/s"
            _say(f"  step {self.done} of {self.total}: {figures}")

    def end(self) -> None:
        """Nothing: the next line tells enough."""


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
