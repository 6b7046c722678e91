"""The files that a report is made of, checked when they are read, so that no page is made from half a file.

Figures, metrics, cases, crossovers and records are the very classes that are written: pydantic checks their fields.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from ...distill.metrics import Record
from ...errors import DataError
from ...files.json_lines import finished_lines, parse_line
from ..bench.cases import Case
from ..bench.crossover import Crossover
from ..engine.items import Figure, Metric, Style


def _number(value: Any) -> Any:
    """What JSON writers put in place of a number that is none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pair(value: Any) -> Any:
    return None if isinstance(value, list | tuple) and None in value else value


Number = Annotated[float | None, BeforeValidator(_number)]
Interval = Annotated[tuple[float, float] | None, BeforeValidator(_pair)]


class Document(BaseModel):
    """A part of a file; what newer versions add to it is passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class ModelRow(Document):
    """What identifies a model."""

    source: str = ""
    name: str = ""
    model_type: str | None = None
    dtype: str | None = None
    converted: bool = False
    bytes: int | None = None
    digests: dict[str, str] = {}


class ItemColumns(Document):
    """The scores of one model, by column."""

    ids: list[str] = []
    groups: list[dict[str, str | int | float]] = []
    values: dict[str, list[Number]] = {}
    clusters: list[str] | None = None


class TaskRow(Document):
    """One task of `eval.json`."""

    kind: str
    settings: dict[str, Any] = {}
    limit: int | None = None
    seconds: dict[str, Number] = {}
    time: str = ""
    metrics: list[Metric] = []
    figures: list[Figure] = []
    items: dict[str, ItemColumns] = {}
    extras: dict[str, list[Any]] = {}


class EvaluationFile(Document):
    """`eval.json`."""

    model: ModelRow
    base: ModelRow | None = None
    setup: dict[str, Any] = {}
    suite: str | None = None
    remarks: list[str] = []
    tasks: dict[str, TaskRow] = {}


class BenchmarkFile(Document):
    """`bench.json`."""

    model: ModelRow
    base: ModelRow | None = None
    setup: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    cases: list[Case] = []
    crossover: dict[str, list[Crossover]] = {}


class ReceiptFile(Document):
    """`receipt.json`."""

    source: str = ""
    repo_id: str | None = None
    revision: str | None = None
    inputs: dict[str, str] = {}
    links: dict[str, Any] = {}
    plan: dict[str, Any] = {}
    rewrites: list[str] = []
    exactness: dict[str, Any] = {}
    start_distance: dict[str, Number] = {}
    metrics: list[dict[str, Any]] = []
    path_use: dict[str, Number] = {}
    command: str = ""
    created: str = ""
    versions: dict[str, str] = {}


class MapRow(Document):
    """One head's attention in base and model."""

    layer: str = ""
    layer_index: int
    head: int
    kl: Number = None
    teacher: list[list[Number]]
    student: list[list[Number]]


class StatisticRow(Document):
    """What a method says about itself in one layer."""

    layer: str = ""
    layer_index: int
    name: str
    meaning: str = ""
    style: Style = "number"
    per: str = "layer"
    values: list[Number]


class FidelityExtra(Document):
    """What the fidelity task keeps of a window of text."""

    maps: list[MapRow] = []
    size: int | None = None
    tokens: list[str] | None = None
    statistics: list[StatisticRow] = []


Kind = TypeVar("Kind", bound=Document)


def parse(kind: type[Kind], value: Mapping[str, Any], path: Path) -> Kind:
    """Check a file's content.

    Raises:
        DataError: it is not what this package writes.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _damaged(path, error) from None


def parse_extras(task: TaskRow, path: Path) -> list[FidelityExtra]:
    """The extras of a fidelity task.

    Raises:
        DataError: they are not what this package writes.
    """
    try:
        return TypeAdapter(list[FidelityExtra]).validate_python(task.extras.get("model", []))
    except ValidationError as error:
        raise _damaged(path, error) from None


def read_records(path: Path) -> list[Record]:
    """The lines of a `metrics.jsonl`; none if there is no file. A last line without its end is left out.

    Raises:
        DataError: a line is damaged.
    """
    records = []
    check = TypeAdapter(Record).validate_python
    for number, line in finished_lines(path):
        try:
            records.append(check(parse_line(line, number, path)))
        except ValidationError as error:
            raise _damaged(path, error, f"line {number}: ") from None
    return records


def _damaged(path: Path, error: ValidationError, where: str = "") -> DataError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the whole"
    return DataError(f"{path} is damaged ({where}{place}: {first['msg']}): remove it, or make it again.")
