"""All of `bench.json`: the class that is written, and read again."""

from typing import Literal

from pydantic import Field

from ..engine.schema import ResultsFile
from .cases import BenchSettings, Case
from .crossover import Crossover


class BenchmarkFile(ResultsFile):
    """`bench.json`.

    Attributes:
        settings: what was asked for; None where the file does not say
        cases: what was measured, in the order of measuring
        crossover: by measure, one for each batch size
    """

    kind: Literal["bench"] = "bench"
    settings: BenchSettings | None = None
    cases: list[Case]
    crossover: dict[str, list[Crossover]] = Field(default_factory=dict)
