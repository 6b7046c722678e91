"""What a file of measurements says, and all of `eval.json`: the classes that are written, and read again."""

from typing import Any, Literal

from pydantic import Field

from ...files.documents import Document, Number, OwnFile
from .items import Figure, Metric


class MeasuredModel(Document):
    """What identifies a model.

    Attributes:
        source: as it was named
        name: of its folder, or its Hub id
        model_type: in transformers
        dtype: what it ran in
        converted: whether attnconv converted it
        bytes: size of its weights
        digests: of its weight files
        settings: digests of the other files that decide what it answers
    """

    source: str = ""
    name: str = ""
    model_type: str | None = None
    dtype: str | None = None
    converted: bool = False
    bytes: int | None = None
    digests: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, str] = Field(default_factory=dict)

    @property
    def identity(self) -> list[Any]:
        """What makes it the same model: weights, configuration, tokenizer, and the dtype that it ran in."""
        return [sorted(self.digests.values()), self.settings, self.dtype, self.converted]


class Setup(Document):
    """Hardware and versions, without which no figure means anything."""

    time: str = ""
    device: str = ""
    gpu: str | None = None
    cpu: str = ""
    cores: int | None = None
    threads: int | None = None
    memory_bytes: int | None = None
    system: str = ""
    load_average: Number = None
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def processor(self) -> str:
        """What computed: the GPU, or the CPU where there was none."""
        return self.gpu or self.cpu


class ResultsFile(OwnFile):
    """The head of every file of measurements.

    Attributes:
        kind: which file it is, also its name without `.json`
        model: the model under test
        base: what it was compared with
        setup: where and when
    """

    kind: str
    model: MeasuredModel
    base: MeasuredModel | None = None
    setup: Setup = Setup()


class ItemColumns(Document):
    """The scores of one model, by column, which take a fraction of the room of rows."""

    ids: list[str] = Field(default_factory=list)
    groups: list[dict[str, str | int | float]] = Field(default_factory=list)
    values: dict[str, list[Number]] = Field(default_factory=dict)
    notes: dict[str, str] = Field(default_factory=dict)
    clusters: list[str] | None = None


class TaskResult(Document):
    """One task: figures, and the scores that they are made of, by role.

    Attributes:
        kind: of the task
        settings: as in the suite
        limit: items at most; None means all
        batch_size: sequences in one forward pass at most
        time: when it was done
        seconds: what this run spent on it
        metrics: how scores become figures
        figures: of all items, and of groups of them
        items: the scores
        extras: more than scores, as the task wants it kept
        setup: where it was measured
    """

    kind: str
    settings: dict[str, Any] = Field(default_factory=dict)
    limit: int | None = None
    batch_size: int | None = None
    time: str = ""
    seconds: dict[str, Number] = Field(default_factory=dict)
    metrics: list[Metric] = Field(default_factory=list)
    figures: list[Figure] = Field(default_factory=list)
    items: dict[str, ItemColumns] = Field(default_factory=dict)
    extras: dict[str, list[Any]] = Field(default_factory=dict)
    setup: Setup = Setup()


class EvaluationFile(ResultsFile):
    """`eval.json`.

    Attributes:
        suite: its tasks' settings
        attention: what converted layers did in one pass over a text, by role, as `AttentionCounts` has it
        tasks: by name
        remarks: sentences for who reads the figures
    """

    kind: Literal["eval"] = "eval"
    suite: str | None = None
    attention: dict[str, dict[str, Any]] = Field(default_factory=dict)
    tasks: dict[str, TaskResult]
    remarks: list[str] = Field(default_factory=list)
