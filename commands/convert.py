"""The commands that make a conversion and pass it on: demo, convert and push."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Device, Model, Overrides, TrustRemoteCode, complete_recipes
from .session import AsJson, Session, examples, print_json, session_of

convert_app = typer.Typer()

RecipeName = Annotated[
    str,
    typer.Option("--recipe", "-r", help="Name of a shipped recipe, or a YAML file.", autocompletion=complete_recipes),
]
Private = Annotated[bool, typer.Option("--private", help="Create the Hub repository as a private one.")]


@convert_app.command(epilog=examples("attnconv demo", "attnconv demo --output /tmp/demo"))
def demo(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("attnconv-demo"),
    as_json: AsJson = False,
) -> None:
    """Convert the small packaged model, and show what became of it."""
    session = session_of(ctx)
    session.silence_libraries()
    from ..runs.demo import run_demo
    from .progress import conversion_progress
    from .tables import show_demo

    with conversion_progress(quiet=session.quiet) as progress:
        result = run_demo(output, progress=progress)
    if as_json:
        print_json(result.to_dict())
    else:
        show_demo(result)


@convert_app.command(
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
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Write a rewrite that is not what it promised.")
    ] = False,
    compare_on: Annotated[
        Path | None,
        typer.Option("--compare-on", metavar="TEXT", help="Compare a rewrite with its source whole, on this text."),
    ] = None,
    target: Annotated[
        Literal["native", "attnconv"] | None,
        typer.Option(help="Windows as settings of transformers' own classes, or as our sliding_window."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="Add code that loads the result without attnconv.")
    ] = False,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Publish the result on the Hub.")] = None,
    private: Private = False,
    device: Device = None,
    log_to: Annotated[
        list[str] | None,
        typer.Option(
            "--log-to",
            metavar="TRACKER",
            help="Send the metrics to tensorboard, trackio or wandb, too; may be repeated.",
        ),
    ] = None,
) -> None:
    """Convert a model by a recipe, heal it, and save it."""
    if private and push is None:
        raise typer.BadParameter("--private needs --push REPO")
    session = session_of(ctx)
    from ..distill.work_folder import WorkFolder
    from ..recipes import load_recipe, with_target
    from ..runs import run_conversion
    from .progress import conversion_progress
    from .tables import show_conversion

    session.silence_libraries()
    loaded = load_recipe(recipe, overrides or ())
    if target is not None:
        loaded = with_target(loaded, target)
    if loaded.stages:
        session.resume_hint = "run the same command with --resume to go on"
        session.saved = WorkFolder((resume_from or output).expanduser()).saved
    with conversion_progress(quiet=session.quiet) as progress:
        result = run_conversion(
            model,
            loaded,
            output,
            resume=resume,
            resume_from=resume_from,
            overwrite=overwrite,
            allow_lossy=allow_lossy,
            allow_inexact=allow_inexact,
            compare_on=compare_on,
            trust_remote_code=trust_remote_code,
            self_contained=self_contained,
            device=device,
            progress=progress,
            log_to=log_to or (),
        )
    show_conversion(result, base=model)
    if push is not None:
        _push(session, output, push, private)


@convert_app.command(
    epilog=examples("attnconv push my-model user/my-model", "attnconv push my-model user/my-model --private")
)
def push(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A converted model.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Where on the Hub: user/name.")],
    private: Private = False,
) -> None:
    """Publish a converted model on the Hugging Face Hub."""
    _push(session_of(ctx), folder, repository, private)


def _push(session: Session, folder: Path, repository: str, private: bool) -> None:
    from ..convert.writing.hub import push_folder

    session.resume_hint = (
        f"run `attnconv push {folder} {repository}` to go on; what is uploaded already is not sent again"
    )
    typer.echo(f"Published at {push_folder(folder, repository, private=private)}")
