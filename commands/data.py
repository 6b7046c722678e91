"""The `attnconv data` commands: training texts chosen before anything is trained."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, TrustRemoteCode
from .session import AsJson, HelpfulGroup, examples, print_json, session_of

# `score` is all there is, so the group shows what its one command shows.
EXAMPLES = examples(
    "attnconv data score texts.jsonl.gz --model org/model -o kept.jsonl.gz",
    "attnconv data score a.txt --model ./model -o kept.jsonl --keep 5000",
)
data_app = typer.Typer(
    cls=HelpfulGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Choose training texts by what a model makes of them.",
    epilog=EXAMPLES,
)


@data_app.command(epilog=EXAMPLES)
def score(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A jsonl, parquet or txt file (also .gz).")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The model that scores, which may be a small one.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A .jsonl or .jsonl.gz file, for `data.path`.")
    ],
    keep: Annotated[str, typer.Option(metavar="PART", help="What is kept: a share, or so many documents.")] = "20%",
    importance: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="What `diagnose --importance` wrote of MODEL; found out here if left out."),
    ] = None,
    top: Annotated[str, typer.Option(metavar="PART", help="KV heads to mask: a share, or so many of them.")] = "5%",
    measure: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which measure of that file; retrieval, if left out.")
    ] = None,
    field: Annotated[str, typer.Option(help="Key of the text in each row.")] = "text",
    tokens: Annotated[int, typer.Option(min=2, help="First tokens of each document that count.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents in one forward pass at most.")] = 8,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Keep the documents whose loss rises most when a model's retrieval heads are masked."""
    if measure is not None and importance is None:
        raise typer.BadParameter("--measure needs --importance FILE")
    session = session_of(ctx)
    session.silence_libraries()
    from ..runs.data_scores import Part, ScoreSettings, score_data
    from .progress import measuring_progress
    from .results import show_data_scores

    settings = ScoreSettings(
        keep=Part.parse(keep, "--keep"),
        top=Part.parse(top, "--top"),
        importance=importance,
        measure=measure,
        field=field,
        tokens=tokens,
        batch_size=batch_size,
    )
    session.resume_hint = "nothing was written; run the same command again"
    with measuring_progress(quiet=session.quiet) as progress:
        found = score_data(
            file,
            model,
            output,
            settings,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(asdict(found))
    else:
        show_data_scores(found, output)
