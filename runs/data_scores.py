"""Texts scored by how much they need a model's retrieval heads, and those kept that need them most."""

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from ..convert.planning.head_rules import most_important
from ..convert.planning.importance import read_importance
from ..distill.data import encode_document, read_rows, wrong_field
from ..errors import DataError, OutputError, RecipeError
from ..evaluate.diagnose import diagnose_model
from ..evaluate.diagnose.importance import RoleModel, by_pattern, role_model
from ..evaluate.diagnose.influence import Influence, influences
from ..evaluate.engine.progress import Progress
from ..evaluate.tasks.textfile import CHARACTERS_PER_TOKEN
from ..files.whole_files import writing_whole
from ..formats import counted
from ..recipes import DataSection

RETRIEVAL = "retrieval"
SCORE = "attention_influence"
# Of the packaged book; heads that retrieve are found on random tokens, whatever its length.
DIAGNOSED = 512
SUFFIXES = (".jsonl", ".jsonl.gz")
PART = re.compile(r"(\d+)|(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class Part:
    """A part of some things: so many, or a share of them.

    Attributes:
        share: fraction, in (0, 1]; None where `count` says how many.
        count: how many; None where `share` says what part.
    """

    share: float | None = None
    count: int | None = None

    @classmethod
    def parse(cls, text: str, option: str) -> "Part":
        """Read `20%` or `5000`.

        Raises:
            RecipeError: it is neither.
        """
        found = PART.fullmatch(text.strip())
        if found is not None and found[1] and int(found[1]) > 0:
            return cls(count=int(found[1]))
        if found is not None and found[2] and 0 < float(found[2]) <= 100:
            return cls(share=float(found[2]) / 100)
        raise RecipeError(f"{option} takes a share such as 20%, above 0% and up to 100%, or a number, not {text!r}")

    def of(self, number: int) -> int:
        """How many of so many, one at least and all at most."""
        wanted = self.count if self.share is None else round(self.share * number)
        return min(number, max(1, wanted or 0))


@dataclass(frozen=True)
class ScoreSettings:
    """How texts are scored.

    Attributes:
        keep: what part of the documents is kept.
        top: what part of the KV heads is left out.
        importance: the file that says which matter most; None = as their attention to repeated tokens says.
        measure: which of the file's measures; None = `retrieval`, or the file's own choice if it has none.
        field: field of each row that holds the text.
        tokens: first tokens of each document that are scored, at least 2.
        batch_size: documents in one forward pass.
    """

    keep: Part
    top: Part
    importance: Path | None = None
    measure: str | None = None
    field: str = "text"
    tokens: int = 1024
    batch_size: int = 8


@dataclass(frozen=True)
class DataScores:
    """What was scored and kept.

    Attributes:
        documents: documents in all.
        kept: documents that were written.
        least: the lowest score that was kept.
        median: of all scores.
        heads: KV heads that were left out, by the number of the layer.
        loss: of all tokens that were scored, in nats.
        masked_loss: the same without the heads.
    """

    documents: int
    kept: int
    least: float
    median: float
    heads: Mapping[int, tuple[int, ...]]
    loss: float
    masked_loss: float


def score_data(
    path: str | Path,
    source: str,
    output: str | Path,
    settings: ScoreSettings,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> DataScores:
    """Score each document of a file, and write those whose loss rises most without a model's retrieval heads.

    Documents are read as they are needed, in three passes: they are counted, scored and written. Rows are kept whole,
    in their order, with the score as `attention_influence`.

    Args:
        path: a file as `data.path` of a recipe takes it.
        source: the model that scores, a local folder or Hub id.
        output: a `.jsonl` or `.jsonl.gz` file, which is written whole or not at all.
        settings: how.
        device: where to run the model; None means a GPU if there is one.
        trust_remote_code: whether a model that brings its own code may run it.
        progress: called with (documents done, in all, what is being done).

    Returns:
        what was scored and kept.

    Raises:
        DataError: the file cannot be used, or no document of it can be scored.
        PlanError: the model's heads cannot be left out, or the importance is about another model.
        CheckpointError: the model cannot be read, or takes no text.
        OutputError: the output is the file itself, or its name says that it is something else.
    """
    target, section = Path(output).expanduser(), DataSection(path=str(path), field=settings.field)
    if not target.name.lower().endswith(SUFFIXES):
        raise OutputError(f"{target} is to hold JSON lines: end its name in {' or '.join(SUFFIXES)}")
    if target.resolve() == Path(path).expanduser().resolve():
        raise OutputError(f"{target} is the file that is read: name another one to write")
    documents = sum(1 for _ in _texts(section))
    given: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    roles, heads = _retrieval_heads(source, settings, progress, given)
    found = []
    for influence in _scored(roles, heads, section, settings):
        found.append(influence)
        if progress is not None:
            progress(len(found), documents, f"scoring {counted(documents, 'document')}")
    measured = {index: one for index, one in enumerate(found) if one is not None and isfinite(one.score)}
    order = sorted((-one.score, index) for index, one in measured.items())
    if not order:
        raise DataError(f"{path} holds no document of two tokens or more, so there is nothing to score")
    kept = order[: settings.keep.of(len(order))]
    _write(target, section, {index: -negative for negative, index in kept})
    tokens = sum(one.tokens for one in measured.values())
    return DataScores(
        documents=documents,
        kept=len(kept),
        least=-kept[-1][0],
        median=-order[len(order) // 2][0],
        heads=heads,
        loss=sum(one.loss * one.tokens for one in measured.values()) / tokens,
        masked_loss=sum(one.masked_loss * one.tokens for one in measured.values()) / tokens,
    )


def _retrieval_heads(
    source: str, settings: ScoreSettings, progress: Progress | None, given: Mapping[str, Any]
) -> tuple[RoleModel, dict[int, tuple[int, ...]]]:
    """The model, and its KV heads that are to be left out, by the number of the layer."""
    if settings.importance is None:
        diagnosis = diagnose_model(source, text="book", tokens=DIAGNOSED, progress=progress, **given)
        roles = role_model(source, window=1, num_sinks=0, **given)
        measures, _ = by_pattern(diagnosis, roles.modules)
        scores = [[float("-inf") if value is None else value for value in row] for row in measures[RETRIEVAL]]
    else:
        file = read_importance(settings.importance)
        roles = role_model(source, window=1, num_sinks=0, **given)
        file.check(roles.modules, settings.importance)
        has_own = settings.measure is None and RETRIEVAL in file.measures
        scores = file.scores(RETRIEVAL if has_own else settings.measure, settings.importance)
    return roles, most_important(scores, range(len(scores)), settings.top.of(sum(map(len, scores))))


def _texts(section: DataSection) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a file, with their texts; empty where there is nothing but space."""
    for row in read_rows(section):
        text = row.get(section.field)
        if section.field not in row or not isinstance(text, str | None):
            raise wrong_field(str(section.path), "text", section.field, row)
        yield row, text if text and not text.isspace() else ""


def _scored(
    roles: RoleModel, heads: Mapping[int, tuple[int, ...]], section: DataSection, settings: ScoreSettings
) -> Iterator[Influence | None]:
    """What the heads do for each document, in the order of the file."""
    texts = (text for _, text in _texts(section))
    while batch := list(islice(texts, settings.batch_size)):
        # No more of a book than can become the tokens that are asked for.
        beginnings = [text[: settings.tokens * CHARACTERS_PER_TOKEN] for text in batch]
        ids = [encode_document(roles.tokenizer, text)[: settings.tokens] if text else [] for text in beginnings]
        yield from influences(roles, heads, [torch.tensor(own, dtype=torch.int64) for own in ids])


def _write(target: Path, section: DataSection, kept: Mapping[int, float]) -> None:
    """Write the rows whose numbers are given, with their scores."""
    with writing_whole(target) as plain:
        # Without the time, so that the same rows are the same file.
        file = gzip.GzipFile(fileobj=plain, mode="wb", mtime=0) if target.suffix.lower() == ".gz" else plain
        for index, (row, _) in enumerate(_texts(section)):
            if index in kept:
                line = json.dumps({**row, SCORE: kept[index]}, ensure_ascii=False, default=str)
                file.write(line.encode() + b"\n")
        if file is not plain:
            file.close()
