"""The commands that measure, and show what was measured: eval, bench, report and compare."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Against, Device, Dtype, DtypeOption, Model, Restart, Results, TrustRemoteCode
from .session import AsJson, examples, print_json, session_of

if TYPE_CHECKING:
    from ..evaluate.engine.suite import Suite

measure_app = typer.Typer()

GO_ON = "run the same command again to go on; what was measured is kept"


@measure_app.command(
    name="eval",
    epilog=examples(
        "attnconv eval my-model --against org/model --suite standard",
        "attnconv eval my-model --text wiki.jsonl.gz --field body --tokens 20000 --json",
    ),
)
def evaluate(
    ctx: typer.Context,
    model: Model,
    against: Against = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="quick, standard, generation, long, or a YAML file; quick if nothing else is asked for.",
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Perplexity on this .txt or .jsonl file (also .gz).")] = None,
    field: Annotated[str, typer.Option(help="Key of the text in each JSON line.")] = "text",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to use.")] = 5120,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window of the text, if the model takes as many.")] = (
        1024
    ),
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness, with commas between.")
    ] = None,
    harness_path: Annotated[Path | None, typer.Option(help="Folder with task files of your own for it.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass at most.")] = 8,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    output: Results = None,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure quality: perplexity, retrieval, questions, and agreement with the base."""
    if harness_path is not None and harness is None:
        raise typer.BadParameter("--harness-path needs --harness TASKS")
    session = session_of(ctx)
    session.silence_libraries()
    from ..evaluate.engine.running import run_evaluation
    from .progress import measuring_progress
    from .results import show_evaluation

    chosen = _suite(suite, text, field, tokens, context, harness, harness_path)
    session.resume_hint = GO_ON
    with measuring_progress(quiet=session.quiet) as progress:
        evaluation = run_evaluation(
            model,
            chosen,
            against=against,
            limit=limit,
            batch_size=batch_size,
            dtype=dtype.value,
            device=device,
            output=output,
            restart=restart,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(evaluation.to_dict())
    else:
        show_evaluation(evaluation)


def _suite(
    suite: str | None,
    text: Path | None,
    field: str,
    tokens: int,
    context: int,
    harness: str | None,
    harness_path: Path | None,
) -> "Suite":
    """The suite of that name together with what other options ask for."""
    from ..evaluate.engine.suite import Suite, load_suite

    found = load_suite(suite or "quick") if suite or not (text or harness) else None
    tasks = {} if found is None else dict(found.tasks)
    own: dict[str, dict[str, object]] = {}
    if text is not None:
        own[text.name.split(".")[0] or "text"] = {
            "kind": "perplexity",
            "data": str(text),
            "field": field,
            "tokens": tokens,
            "context": context,
        }
    if harness is not None:
        names = [name.strip() for name in harness.split(",") if name.strip()]
        where = None if harness_path is None else str(harness_path)
        own["harness"] = {"kind": "harness", "tasks": names, "include_path": where}
    if not own:
        assert found is not None
        return found
    name = "own" if found is None else found.name
    return Suite.model_validate({"name": name, "tasks": {**tasks, **own}})


@measure_app.command(
    epilog=examples(
        "attnconv bench my-model --against org/model", "attnconv bench my-model --contexts 512,4096 --batches 1,8"
    )
)
def bench(
    ctx: typer.Context,
    model: Model,
    against: Against = None,
    contexts: Annotated[str, typer.Option(metavar="N,N", help="Tokens of context.")] = "512,2048,8192",
    batches: Annotated[str, typer.Option(metavar="N,N", help="Sequences at once.")] = "1",
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each measurement.")] = 5,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated after each context.")] = 32,
    training_contexts: Annotated[
        str, typer.Option(metavar="N,N", help="Lengths for steps of attention transfer; empty for none.")
    ] = "512,2048",
    max_seconds: Annotated[float, typer.Option(min=1, help="Leave out what would take longer than this.")] = 120.0,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    output: Results = None,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory by context length, beside the base."""
    lengths = _counts("--contexts", contexts)
    sizes = _counts("--batches", batches)
    training = _counts("--training-contexts", training_contexts) if training_contexts.strip() else ()
    session = session_of(ctx)
    session.silence_libraries()
    from ..distill.speed import transfer_cases
    from ..evaluate.bench import run_bench
    from .progress import measuring_progress
    from .results import show_bench

    session.resume_hint = GO_ON
    with measuring_progress(quiet=session.quiet) as progress:
        result = run_bench(
            model,
            against=against,
            contexts=lengths,
            batches=sizes,
            repeats=repeats,
            decode_tokens=decode_tokens,
            training_contexts=training,
            training=transfer_cases,
            max_seconds=max_seconds,
            dtype=dtype.value,
            device=device,
            output=output,
            restart=restart,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        show_bench(result)


def _counts(option: str, given: str) -> tuple[int, ...]:
    """`512,2048` as numbers, in rising order."""
    parts = [part.strip().replace("_", "") for part in given.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{option} takes whole numbers above 0 with commas between, not {given!r}")
    return tuple(sorted({int(part) for part in parts}))


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A converted model.")]


@measure_app.command(
    epilog=examples("attnconv report my-model", "attnconv report my-model --output /tmp/report.html --no-card")
)
def report(
    ctx: typer.Context,
    folder: Folder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The HTML file; DIR/results/report.html.")
    ] = None,
    card: Annotated[bool, typer.Option(help="Put the main figures into the model card too.")] = True,
) -> None:
    """Write all that is known of a conversion as one HTML page and as Markdown for the model card."""
    session = session_of(ctx)
    session.silence_libraries()
    from ..evaluate.report import write_report
    from .progress import measuring_progress
    from .results import show_report

    session.resume_hint = "nothing was written; run the same command again"
    with measuring_progress(quiet=session.quiet) as progress:
        files = write_report(folder, output=output, card=card, progress=progress)
    show_report(files)


@measure_app.command(
    epilog=examples("attnconv compare windowed linear hybrid", "attnconv compare linear hybrid --json")
)
def compare(
    ctx: typer.Context,
    folders: Annotated[list[Path], typer.Argument(metavar="DIR DIR ...", help="Conversions of the same base.")],
    metric: Annotated[
        str | None, typer.Option(help="What to judge quality by, such as `piqa: accuracy`; perplexity if left out.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The HTML file; results/compare.html.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show several conversions of one base side by side, quality against speed."""
    session = session_of(ctx)
    session.silence_libraries()
    from ..evaluate.report import compare_conversions
    from .results import show_compared

    compared = compare_conversions(folders, output=output, metric=metric)
    if as_json:
        print_json(compared.to_dict())
    else:
        show_compared(compared)
