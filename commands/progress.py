"""What the commands show while they work, on stderr: bars on a terminal, lines elsewhere, nothing when quiet."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..formats import percent
from .tables import make_console

if TYPE_CHECKING:
    from ..distill import Progress as ConversionProgress
    from ..evaluate.engine.progress import Progress as MeasuringProgress


@contextmanager
def measuring_progress(*, quiet: bool) -> "Iterator[MeasuringProgress]":
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
    from ..distill import LineProgress, Silent, TerminalProgress

    console = make_console(stderr=True)
    if quiet:
        yield Silent()
    elif console.is_terminal:
        with TerminalProgress(console) as bars:
            yield bars
    else:
        yield LineProgress()
