"""The `attnconv` command: each command parses its arguments, calls one function of the package and prints the answer.

What needs torch is imported inside the commands, so that `--help` answers at once.
"""

from typing import Annotated

import typer

from . import __version__
from .commands.convert import convert_app
from .commands.data import data_app
from .commands.doctor import doctor_app
from .commands.inspection import inspection_app
from .commands.measure import measure_app
from .commands.methods import methods_app
from .commands.planning import planning_app
from .commands.recipes import recipes_app
from .commands.session import CommandGroup, Session, examples

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=examples("attnconv demo", "attnconv convert org/model --recipe lolcats --output my-model"),
)
for commands in (convert_app, inspection_app, planning_app, measure_app, methods_app, doctor_app):
    app.add_typer(commands)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attnconv {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    ctx: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more, and show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Give a pretrained Hugging Face model another attention, heal it, save it, and load it like any other."""
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet exclude each other")
    ctx.obj = Session(verbose, quiet)
    ctx.obj.configure_logging()


def main() -> None:
    """Run the command line."""
    app()
