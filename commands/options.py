"""Arguments and options that several commands share."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


def complete_recipes(incomplete: str) -> list[str]:
    """Names of shipped recipes that begin so, for the shell."""
    from ..recipes import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a Hub id, or a .gguf file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated."),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python code a model brings.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; the best there is, if left out.")]
Against = Annotated[str | None, typer.Option(metavar="BASE", help="A model to compare with.")]
Results = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder for the results; MODEL/results for a conversion, if left out, else results/NAME.",
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run measured.")]


class Dtype(str, Enum):
    """Dtypes a model can be measured in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DtypeOption = Annotated[Dtype, typer.Option(help="Dtype to load in; auto is that of the checkpoint.")]
