"""What a run reports as it goes: one JSON line for every few steps."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator
from typing_extensions import Self

from ..errors import OutputError
from ..files.documents import parse_document
from ..files.json_lines import finished_lines, parse_line

# JSON has no number that is none: whoever reads a record back takes null as one.
Measured = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclass(frozen=True)
class ExpertLoad:
    """Where the tokens of one layer went.

    No class of transformers that rewrites write has a capacity, so no token is ever dropped.

    Attributes:
        shares: of all tokens' choices, those that fell on each expert.
        entropy: of these over the largest that it can be: 1 = all equal, 0 = one expert takes everything.
    """

    shares: list[Measured]
    entropy: Measured

    @classmethod
    def of(cls, counts: Sequence[float]) -> Self:
        """The load that made this many choices of each expert."""
        total = max(1.0, sum(counts))
        shares = [count / total for count in counts]
        spread = -sum(share * math.log(share) for share in shares if share > 0)
        return cls(shares, spread / math.log(max(2, len(shares))))


@dataclass(frozen=True)
class Record:
    """One line of `metrics.jsonl`: means over the steps since the line before.

    Attributes:
        index: index of the stage in the recipe.
        stage: kind of the stage.
        step: optimizer steps done in the stage.
        tokens: training tokens seen in the stage.
        loss: what is minimised.
        learning_rate: of the stage's first parameter group, at its last step.
        grad_norm: norm of the gradients before clipping.
        tokens_per_second: training tokens, by all processes, per second of training.
        layers: relative squared error of each layer's attention output, by module name; empty if not measured.
        unit: what is counted as tokens: `tokens`, or `images`.
        sequence_length: tokens of the steps' sequences; None for images.
        experts: the load of each layer's experts, by the name of the router; empty without experts.
    """

    index: int
    stage: str
    step: int
    tokens: int
    loss: Measured
    learning_rate: Measured
    grad_norm: Measured
    tokens_per_second: Measured
    layers: dict[str, Measured]
    unit: str = "tokens"
    sequence_length: int | None = None
    experts: dict[str, ExpertLoad] = field(default_factory=dict)


class MetricsFile:
    """A file of records that grows line by line.

    Args:
        path: the file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Record) -> None:
        """Add one line."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        except OSError as error:
            raise OutputError(f"The metrics {self.path} cannot be written: {error.strerror}.") from error

    def records(self) -> Iterator[Record]:
        """The lines so far; a last line that a killed run left unfinished is left out.

        Raises:
            DataError: a line is damaged
        """
        for number, line in finished_lines(self.path):
            value = parse_line(line, number, self.path)
            yield parse_document(
                Record, value, self.path, where=f"line {number}: ", remedy="remove it, or convert again"
            )

    def cut(self, index: int, step: int) -> None:
        """Drop what lies behind a step of a stage: a resumed run will write it again."""
        kept = [record for record in self.records() if (record.index, record.step) <= (index, step)]
        building = self.path.with_suffix(".partial")
        building.write_text("".join(json.dumps(asdict(record)) + "\n" for record in kept), encoding="utf-8")
        building.replace(self.path)
