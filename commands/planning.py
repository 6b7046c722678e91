"""The command that makes a recipe for a model under a budget."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Model, TrustRemoteCode
from .session import examples, session_of

planning_app = typer.Typer()


class UnitChoice(str, Enum):
    """What is chosen one by one."""

    head = "head"
    layer = "layer"


class MeasureChoice(str, Enum):
    """How it is found out what matters."""

    trained = "trained"
    ablation = "ablation"


@planning_app.command(
    epilog=examples(
        "attnconv plan org/model --budget kv_bytes=25% --calibrate book -o plan.yaml",
        "attnconv plan ./model --budget flops=50% --calibrate a.txt -o plan.yaml",
    )
)
def plan(
    ctx: typer.Context,
    model: Model,
    budget: Annotated[
        str, typer.Option(metavar="KIND=SHARE%", help="kv_bytes or flops, and what part of the model's own is left.")
    ],
    calibrate: Annotated[
        str, typer.Option(metavar="FILE", help="The text to judge by: a .txt or .jsonl file (also .gz), or `book`.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="YAML", help="Where the recipe is written.")],
    picture: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw it, layers by KV heads.")] = None,
    importance: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Write what each KV head loses, for `heads` of other recipes.")
    ] = None,
    unit: Annotated[UnitChoice, typer.Option(help="Choose KV heads or whole layers.")] = UnitChoice.head,
    measure: Annotated[
        MeasureChoice, typer.Option(help="Learn all heads' shares in one run, or take away one after the other.")
    ] = MeasureChoice.trained,
    window: Annotated[int, typer.Option(min=1, help="Newest tokens that a streaming head sees.")] = 512,
    judged_window: Annotated[
        int, typer.Option(min=1, help="The same while heads are judged; well below --tokens, to tell them apart.")
    ] = 64,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the text whose cost is counted.")] = 32_768,
    tokens: Annotated[int, typer.Option(min=128, help="Tokens of each text to judge by.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Texts to judge by.")] = 60,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Choose which heads or layers of a model stay full under a budget, and write it as a recipe."""
    session = session_of(ctx)
    session.silence_libraries()
    from ..convert.planning.budget import Budget
    from ..evaluate.diagnose.plan_picture import plot_plan
    from ..evaluate.engine.results import write_text
    from ..runs.planner import PlanSettings, plan_model, plan_yaml
    from .progress import measuring_progress
    from .results import show_plan

    settings = PlanSettings(
        budget=Budget.parse(budget),
        unit=unit.value,
        measure=measure.value,
        window=window,
        judged_window=judged_window,
        length=length,
        tokens=tokens,
        steps=steps,
    )
    with measuring_progress(quiet=session.quiet) as progress:
        made = plan_model(
            model,
            calibrate,
            settings,
            importance=importance,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    write_text(output, plan_yaml(made, name=output.stem))
    if picture is not None:
        title = f"{made.kept} of {made.heads} KV heads stay full"
        meaning = "share of full attention learned" if measure is MeasureChoice.trained else "nats lost by streaming"
        plot_plan(made.losses, made.full, picture, title=title, meaning=meaning)
    show_plan(made)
    typer.echo(f"The recipe is in {output}: attnconv convert {model} --recipe {output} --output DIR")
