"""How the command line talks: how much it says, how errors become one sentence, and what an interrupt is answered."""

import errno
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import AttnConvError, InterruptedRun

FAILED = 1
SIGNALLED = 128
INTERRUPTED = 130
LONGEST_NAME = 200
"""How much of a file's name an error quotes."""
VERBOSITY_FLAGS = ("-v", "--verbose", "-q", "--quiet")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print a Markdown table, as the README has it.")]


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in lines)])


def print_json(value: Any) -> None:
    """Print plain values as indented JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@dataclass
class Session:
    """One run of the command line.

    Attributes:
        verbose: say what is being done, keep the libraries' own messages, and show tracebacks.
        quiet: say only results and errors: no warnings, no progress.
        resume_hint: what to do after an interrupt, as the second half of a sentence; empty if nothing was begun.
        saved: says what of a run is saved, with a semicolon behind it; empty if there is nothing to say.
    """

    verbose: bool = False
    quiet: bool = False
    resume_hint: str = ""
    saved: Callable[[], str] = str

    def configure_logging(self) -> None:
        """Send this package's messages to stderr, and other packages' warnings nowhere unless they were asked for."""
        logger = logging.getLogger("attnconv")
        logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _StderrHandler)]
        handler = _StderrHandler()
        handler.setFormatter(
            logging.Formatter("%(levelname)s %(name)s: %(message)s" if self.verbose else "%(message)s")
        )
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if self.verbose else logging.ERROR if self.quiet else logging.WARNING)
        if not self.verbose and not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"attnconv(\.|$)")
            warnings.showwarning = _log_warning

    def silence_libraries(self) -> None:
        """Keep transformers and the Hub's client from speaking for themselves, downloads excepted, unless verbose."""
        if self.verbose:
            return
        from huggingface_hub.utils.tqdm import enable_progress_bars
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if not self.quiet:
            enable_progress_bars()
        client = logging.getLogger("huggingface_hub.utils._http")
        if not any(isinstance(known, _OneRetry) for known in client.filters):
            client.addFilter(_OneRetry())


class _OneRetry(logging.Filter):
    """Says once that the Hub is asked again, where its client would print two lines for each time."""

    def __init__(self) -> None:
        super().__init__()
        self.said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop the client's lines on its retries, and say so in words of ours at the first."""
        message = record.getMessage()
        if "thrown while requesting" not in message and not message.startswith("Retrying in"):
            return True
        if not self.said:
            self.said = True
            logging.getLogger("attnconv").warning("The Hub does not answer; it is asked a few times more")
        return False


class _StderrHandler(logging.Handler):
    """Writes to whatever stderr is at the time, which a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def _log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    logging.getLogger("attnconv").warning("%s", message)


def session_of(ctx: typer.Context) -> Session:
    """The session of a command's context."""
    session = ctx.find_root().obj
    return session if isinstance(session, Session) else Session()


class HelpfulGroup(TyperGroup):
    """A group of commands whose help gives flags no type: `--resume` takes no value."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _without_types(command.get_params(ctx))
        return command

    def get_params(self, ctx: Any) -> list[Any]:
        """The group's own options."""
        return _without_types(super().get_params(ctx))


def _without_types(parameters: Any) -> list[Any]:
    """The same options; Typer would print the type of a flag as if it took a value."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return list(parameters)


class CommandGroup(HelpfulGroup):
    """A group of commands that takes `-v` and `-q` in any place and answers errors with one sentence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move `-v` and `-q` before the command, where they belong to the group."""
        end = args.index("--") if "--" in args else len(args)
        flags = [argument for argument in args[:end] if argument in VERBOSITY_FLAGS]
        rest = [argument for argument in args[:end] if argument not in VERBOSITY_FLAGS]
        return list(super().parse_args(ctx, flags + rest + args[end:]))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see `one_sentence_errors`."""
        with one_sentence_errors(ctx):
            return super().invoke(ctx)


@contextmanager
def one_sentence_errors(ctx: typer.Context) -> Iterator[None]:
    """Turn exceptions into a sentence on stderr and an exit code: 1 for failures, 130 for an interrupt."""
    try:
        yield
    except AttnConvError as error:
        _explain(ctx, str(error), error)
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt as interrupt:
        session = session_of(ctx)
        saved = f"{interrupt.saved}; " if isinstance(interrupt, InterruptedRun) else session.saved()
        hint = session.resume_hint
        typer.echo(f"\nInterrupted; {saved}{hint}." if hint else "\nInterrupted.", err=True)
        number = getattr(interrupt, "signal", None)
        raise typer.Exit(INTERRUPTED if number is None else SIGNALLED + number) from None
    # A defect of ours or of a library underneath: the user gets a sentence all the same, and -v shows where.
    except Exception as error:
        # Typer's own exceptions (wrong usage, exit) and a closed pipe are for Typer to answer.
        if hasattr(error, "exit_code") or getattr(error, "errno", None) == errno.EPIPE:
            raise
        _explain(ctx, _sentence(error), error)
        raise typer.Exit(FAILED) from None


def _sentence(error: Exception) -> str:
    """What to say of an error that is not one of ours."""
    reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name = str(error.filename)
        return f"{error.strerror}: {name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + '...'}"
    is_allocator = isinstance(error, RuntimeError) and ("allocate memory" in reason or "out of memory" in reason)
    if isinstance(error, MemoryError) or is_allocator:
        return "There is not enough memory for this: take smaller batches, shorter texts or a smaller model"
    return f"Failed with {type(error).__name__}: {reason}. Run again with -v to see where."


def _explain(ctx: typer.Context, message: str, error: BaseException) -> None:
    if session_of(ctx).verbose:
        typer.echo("".join(traceback.format_exception(error)), err=True)
    typer.echo(f"Error: {message}", err=True)
