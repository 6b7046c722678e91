"""The `attnconv` command: each command parses its arguments, calls one function of the package and prints the answer.

What needs torch is imported inside the commands, so that `--help` answers at once.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .commands.doctor import doctor_app
from .commands.measure import measure_app
from .commands.options import Device, Model, Overrides, TrustRemoteCode
from .commands.recipes import recipes_app
from .commands.session import AsJson, CommandGroup, Session, examples, print_json, session_of

app = typer.Typer(
    cls=CommandGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=examples("attnconv demo", "attnconv convert org/model --recipe lolcats --output my-model"),
)
app.add_typer(measure_app)
app.add_typer(doctor_app)
app.add_typer(recipes_app, name="recipes")

RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="Name of a shipped recipe, or a YAML file.")]
Private = Annotated[bool, typer.Option("--private", help="Create the Hub repository as a private one.")]


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


@app.command(
    epilog=examples(
        "attnconv convert org/model --recipe sliding-window --output my-model",
        "attnconv convert ./model -r lolcats -o out --set data.path=text.jsonl.gz",
    )
)
def convert(
    ctx: typer.Context,
    model: Model,
    recipe: RecipeName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it appears when all is done.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")] = False,
    resume_from: Annotated[
        Path | None,
        typer.Option("--resume-from", metavar="DIR", help="Go on with the conversion that was to write DIR."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a conversion that is there.")] = False,
    allow_lossy: Annotated[bool, typer.Option("--allow-lossy", help="Accept what a method drops.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="Add code that loads the result without attnconv.")
    ] = False,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Publish the result on the Hub.")] = None,
    private: Private = False,
    device: Device = None,
) -> None:
    """Convert a model by a recipe, heal it, and save it."""
    if private and push is None:
        raise typer.BadParameter("--private needs --push REPO")
    session = session_of(ctx)
    from .commands.progress import conversion_progress
    from .commands.tables import show_conversion
    from .recipes import load_recipe
    from .runs import run_conversion

    session.silence_libraries()
    loaded = load_recipe(recipe, overrides or ())
    if loaded.stages:
        session.resume_hint = "run the same command with --resume to go on from the last saved step"
    with conversion_progress(quiet=session.quiet) as progress:
        result = run_conversion(
            model,
            loaded,
            output,
            resume=resume,
            resume_from=resume_from,
            overwrite=overwrite,
            allow_lossy=allow_lossy,
            trust_remote_code=trust_remote_code,
            self_contained=self_contained,
            device=device,
            progress=progress,
        )
    show_conversion(result)
    if push is not None:
        _push(session, output, push, private)


@app.command(
    epilog=examples(
        "attnconv inspect org/model --recipe lolcats", "attnconv inspect ./model --diagnose book --output advised.yaml"
    )
)
def inspect(
    ctx: typer.Context,
    model: Model,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Show what this recipe would do."),
    ] = None,
    overrides: Overrides = None,
    diagnose: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Load the model, measure its heads on a text (or `book`), and advise."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of that text to use.")] = 4096,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="YAML", help="Write the advice as a recipe.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw what was measured, layer by head.")] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's attention and what a recipe would make of it, without loading weights."""
    if overrides and recipe is None:
        raise typer.BadParameter("--set needs --recipe")
    if diagnose is not None and recipe is not None:
        raise typer.BadParameter("--diagnose and --recipe exclude each other")
    if diagnose is None and (output or picture):
        raise typer.BadParameter("--output and --picture need --diagnose FILE")
    session = session_of(ctx)
    session.silence_libraries()
    if diagnose is not None:
        _diagnose(session, model, diagnose, tokens, output, picture, device, trust_remote_code, as_json)
        return
    from .commands.tables import show_inspection
    from .evaluate.diagnose.inspection import inspect_model
    from .recipes import load_recipe

    loaded = None if recipe is None else load_recipe(recipe, overrides or ())
    inspection = inspect_model(model, recipe=loaded, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(inspection.to_dict())
    else:
        show_inspection(inspection)


def _diagnose(
    session: Session,
    model: str,
    text: str,
    tokens: int,
    output: Path | None,
    picture: Path | None,
    device: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    from .commands.progress import progress_bar
    from .commands.results import show_diagnosis
    from .evaluate.diagnose import advice_yaml, diagnose_model, plot_diagnosis, recommend
    from .evaluate.engine.results import write_text

    with progress_bar("diagnosing", quiet=session.quiet) as progress:
        diagnosis = diagnose_model(
            model, text=text, tokens=tokens, device=device, trust_remote_code=trust_remote_code, progress=progress
        )
    advice = recommend(diagnosis)
    if output is not None:
        write_text(output, advice_yaml(advice, name=output.stem, source=model))
    if picture is not None:
        plot_diagnosis(diagnosis, picture)
    if as_json:
        print_json({**diagnosis.to_dict(), "advice": [asdict(one) for one in advice]})
        return
    show_diagnosis(diagnosis, advice)
    if output is not None:
        typer.echo(f"The recipe is in {output}: attnconv convert {model} --recipe {output} --output DIR")


@app.command(epilog=examples("attnconv methods", "attnconv methods lolcats"))
def methods(name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this method.")] = None) -> None:
    """List the attention methods with their options, defaults and papers."""
    from .attention_modules import available, get_method
    from .commands.tables import show_methods

    if name is not None and name not in available():
        raise typer.BadParameter(f"there is no method {name}; the methods are {', '.join(available())}")
    show_methods([get_method(known) for known in ([name] if name else available())])


@app.command(epilog=examples("attnconv push my-model user/my-model", "attnconv push my-model user/my-model --private"))
def push(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A converted model.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Where on the Hub: user/name.")],
    private: Private = False,
) -> None:
    """Publish a converted model on the Hugging Face Hub."""
    _push(session_of(ctx), folder, repository, private)


def _push(session: Session, folder: Path, repository: str, private: bool) -> None:
    from .convert.writing.hub import push_folder

    session.resume_hint = (
        f"run `attnconv push {folder} {repository}` to go on; what is uploaded already is not sent again"
    )
    typer.echo(f"Published at {push_folder(folder, repository, private=private)}")


@app.command(epilog=examples("attnconv demo", "attnconv demo --output /tmp/demo"))
def demo(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("attnconv-demo"),
    as_json: AsJson = False,
) -> None:
    """Convert the small packaged model, and show what became of it."""
    session = session_of(ctx)
    session.silence_libraries()
    from .commands.progress import conversion_progress
    from .commands.tables import show_demo
    from .runs.demo import run_demo

    with conversion_progress(quiet=session.quiet) as progress:
        result = run_demo(output, progress=progress)
    if as_json:
        print_json(result.to_dict())
    else:
        show_demo(result)


def main() -> None:
    """Run the command line."""
    app()
