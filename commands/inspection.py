"""The commands that look at a model before anything is done to it: inspect and diagnose."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Model, Overrides, TrustRemoteCode, complete_recipes
from .session import AsJson, Session, examples, print_json, session_of

inspection_app = typer.Typer()


@inspection_app.command(
    epilog=examples(
        "attnconv inspect org/model --recipe lolcats", "attnconv inspect ./my-model --recipe lolcats --estimate --json"
    )
)
def inspect(
    ctx: typer.Context,
    model: Model,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Show what this recipe would do.", autocompletion=complete_recipes),
    ] = None,
    overrides: Overrides = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Say what the recipe costs in memory, disk and time, from steps of the model where it is here.",
        ),
    ] = False,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's attention and what a recipe would make of it; weights are loaded for --estimate alone."""
    for option, given in (("--set", overrides), ("--estimate", estimate)):
        if given and recipe is None:
            raise typer.BadParameter(f"{option} needs --recipe")
    session_of(ctx).silence_libraries()
    from ..errors import CheckpointError, PlanError
    from ..evaluate.diagnose.inspection import inspect_model
    from ..recipes import load_recipe
    from .tables import show_inspection

    loaded = None if recipe is None else load_recipe(recipe, overrides or ())
    inspection = inspect_model(model, recipe=loaded, trust_remote_code=trust_remote_code)
    if not as_json:
        show_inspection(inspection)
    cost = None
    if loaded is not None and estimate and inspection.is_open:
        from ..runs.estimate import estimate as estimated

        cost = estimated(model, loaded, trust_remote_code=trust_remote_code, device=device)
    if as_json:
        print_json(inspection.to_dict() | ({} if cost is None else {"estimate": cost.to_dict()}))
    elif cost is not None:
        from .estimate import show_estimate

        show_estimate(cost)
    elif estimate:
        typer.echo("No estimate: a conversion would be refused, see above.", err=True)
    if inspection.overwritten is not None:
        raise CheckpointError(inspection.overwritten)
    if inspection.rewrite is not None and inspection.rewrite.refused is not None:
        raise PlanError(inspection.rewrite.refused)
    if inspection.unmatched:
        # The model and what the recipe does to it have been shown; a conversion would stop here.
        raise PlanError("; ".join(inspection.unmatched))


@inspection_app.command(
    epilog=examples("attnconv diagnose org/model", "attnconv diagnose ./model --text book --output advised.yaml")
)
def diagnose(
    ctx: typer.Context,
    model: Model,
    text: Annotated[
        str, typer.Option(metavar="FILE", help="The text: a .txt or .jsonl file (also .gz), or the packaged `book`.")
    ] = "book",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of that text to use.")] = 4096,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="YAML", help="Write the advice as a recipe.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw what was measured, layer by head.")] = None,
    importance: Annotated[
        Path | None,
        typer.Option(
            metavar="JSON",
            help="Write how much each KV head matters, for `heads` of recipes; of a model converted by `head-roles`, "
            "what it learned.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For a vision model's --importance: a folder of images, or a parquet file."),
    ] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Load a model, measure what its heads look at on a text, and advise on each layer."""
    session = session_of(ctx)
    if images is not None:
        _diagnose_images(session, model, images, importance, device=device, trust_remote_code=trust_remote_code)
        return
    session.silence_libraries()
    from ..evaluate.diagnose import advice_yaml, diagnose_model, plot_diagnosis, recommend
    from ..evaluate.diagnose.importance import measure_importance, trained_importance
    from ..evaluate.engine.results import write_text
    from .progress import measuring_progress
    from .results import show_diagnosis, show_importance

    trained = None
    if importance is not None:
        trained = trained_importance(model, importance, trust_remote_code=trust_remote_code)
    if trained is not None:
        show_importance(trained, importance)
        return
    with measuring_progress(quiet=session.quiet) as progress:
        diagnosis = diagnose_model(
            model, text=text, tokens=tokens, device=device, trust_remote_code=trust_remote_code, progress=progress
        )
        if importance is not None:
            measured = measure_importance(
                model, diagnosis, importance, device=device, trust_remote_code=trust_remote_code, progress=progress
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
    if importance is not None:
        show_importance(measured, importance)
    if output is not None:
        typer.echo(f"The recipe is in {output}: attnconv convert {model} --recipe {output} --output DIR")


def _diagnose_images(
    session: Session, model: str, images: Path, importance: Path | None, *, device: str | None, trust_remote_code: bool
) -> None:
    """Write how much each head of a vision model matters, and how far it looks."""
    if importance is None:
        raise typer.BadParameter("--images needs --importance JSON, which is what is measured on them")
    session.silence_libraries()
    from ..runs.image_importance import image_importance
    from .progress import measuring_progress
    from .results import show_importance

    with measuring_progress(quiet=session.quiet) as progress:
        found = image_importance(
            model, images, importance, device=device, trust_remote_code=trust_remote_code, progress=progress
        )
    show_importance(found, importance)
