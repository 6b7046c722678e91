"""What the commands show while they work, on stderr: bars on a terminal, lines elsewhere, nothing when quiet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..formats import number, percent, rate
from .tables import make_console

if TYPE_CHECKING:
    from ..distill import Progress as ConversionProgress


@contextmanager
def progress_bar(description: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal; yields what to call with (done, in all)."""
    console = make_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def measuring_progress(*, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Yields what to call with (done, in all, what is being done): a bar on a terminal, a line for each new thing."""
    console = make_console(stderr=True)
    if quiet:
        yield lambda done, total, text: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)
    else:
        said = ""

        def say(done: int, total: int, text: str) -> None:
            nonlocal said
            if text and text != said:
                said = text
                typer.echo(f"{percent(done / max(total, 1), 0):>5} {text}", err=True)

        yield say


@contextmanager
def conversion_progress(*, quiet: bool) -> "Iterator[ConversionProgress]":
    """What `run_conversion` tells its progress to."""
    from ..distill import Silent, TerminalProgress

    console = make_console(stderr=True)
    if quiet:
        yield Silent()
    elif console.is_terminal:
        with TerminalProgress(console) as bars:
            yield bars
    else:
        yield LineProgress()


class LineProgress:
    """A line for each phase, and ten for each stage."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.unit = "tokens"

    def phase(self, text: str) -> None:
        """One line."""
        typer.echo(text, err=True)

    def begin(self, text: str, total: int, done: int, unit: str = "tokens") -> None:
        """One line, and steps are counted from here."""
        self.total, self.done, self.unit = total, done, unit
        typer.echo(f"{text}: {total} steps" + (f", {done} done already" if done else ""), err=True)

    def step(self, loss: float, per_second: float) -> None:
        """A line after each tenth of the steps."""
        self.done += 1
        if self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            figures = f"step loss {number(loss)}, {rate(per_second)} {self.unit}/s"
            typer.echo(f"  step {self.done} of {self.total}: {figures}", err=True)

    def end(self) -> None:
        """Nothing: the next line tells enough."""
