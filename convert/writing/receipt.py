"""The receipt of a conversion: what went in, what was done, with which versions, and what was measured."""

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import Field

from ...files.containment import inside
from ...files.documents import Number, OwnFile, read_document
from ...files.fast_copy import digest_of
from ...files.json_files import write_json
from ...files.output_folder import TOOL
from ...files.own_files import KEY, RECEIPT_FILE, list_files
from ..planning.plan import Plan
from ..reading.checkpoint import Checkpoint


class Receipt(OwnFile):
    """`receipt.json`.

    Attributes:
        source: the base as the user named it; of a folder or file the name alone, for receipts are published.
        repo_id: its Hub repository, if known.
        revision: the commit of that repository.
        inputs: digest of each weight file that was read.
        plan: the `attnconv` section of config.json; empty for a model that needs no attnconv.
        links: size, time and digest of each weight file that is a hard link to the base's (`reading.links`).
        rewrites: what was done to the weights before anything else, a clause each.
        exactness: how far the rewritten model was from its source, and whether it was to be exact; empty without a
            rewrite.
        start_distance: how far the model was from its teacher right after the swap, by measure.
        metrics: one row per moment measured, each with its `"stage"` (`"teacher"`, `"rewrite"`, `"swap"`, then the
            stages).
        path_use: perplexity without each path of the methods over perplexity with it, at the end; 1 means that the
            path does nothing. Empty where there are none or perplexity was not measured.
        attention: what the converted layers did in one pass over a short text, as `AttentionCounts.to_dict` has it, and
            the `text`; or `not_measured`, why that is not known. Empty for a model without converted layers.
        command: the command line, absolute paths shortened to names.
        created: when, in UTC.
        versions: of the packages that took part.
        files: the files that were there when it was written: a later run may replace them.
    """

    source: str = ""
    repo_id: str | None = None
    revision: str | None = None
    inputs: dict[str, str] = Field(default_factory=dict)
    plan: dict[str, Any] = Field(default_factory=dict)
    links: dict[str, Any] = Field(default_factory=dict)
    rewrites: tuple[str, ...] = ()
    exactness: dict[str, Any] = Field(default_factory=dict)
    start_distance: dict[str, Number] = Field(default_factory=dict)
    metrics: list[dict[str, Any]] = Field(default_factory=list)
    path_use: dict[str, Number] = Field(default_factory=dict)
    attention: dict[str, Any] = Field(default_factory=dict)
    command: str = ""
    created: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    files: list[str] = Field(default_factory=list)


def make_receipt(
    checkpoint: Checkpoint,
    plan: Plan,
    *,
    inputs: Mapping[str, str] | None = None,
    links: Mapping[str, Mapping[str, Any]] | None = None,
    exactness: Mapping[str, Any] | None = None,
    start_distance: Mapping[str, float] | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    path_use: Mapping[str, float] | None = None,
    attention: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
) -> Receipt:
    """Put a receipt together.

    Args:
        checkpoint: the base.
        plan: what was converted.
        inputs: digests of the base's weight files; the default reads the files once more.
        links: weight files that the conversion shares with its base.
        exactness: how far the rewritten model was from its source.
        start_distance: how far the model was from its teacher right after the swap, by measure.
        metrics: what was measured, one row per moment, each with its `"stage"`.
        path_use: perplexity without each path of the methods over perplexity with it.
        attention: what the converted layers did in one pass, see `Receipt`.
        command: the command line; the default is that of this process.
    """
    return Receipt(
        source=checkpoint.name,
        repo_id=checkpoint.repo_id,
        revision=checkpoint.revision,
        inputs=digest_inputs(checkpoint) if inputs is None else dict(inputs),
        plan={} if plan.is_native else plan.to_config(),
        links={name: dict(link) for name, link in (links or {}).items()},
        rewrites=plan.rewrites,
        exactness=dict(exactness or {}),
        start_distance=dict(start_distance or {}),
        metrics=[dict(row) for row in metrics],
        path_use=dict(path_use or {}),
        attention=dict(attention or {}),
        command=_public(sys.argv if command is None else command),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=_versions(),
    )


def digest_inputs(checkpoint: Checkpoint) -> dict[str, str]:
    """The digest of each weight file of a checkpoint; about 0.1 s per GB that is in memory, else the disk's speed."""
    names = [checkpoint.gguf_file] if checkpoint.gguf_file else [shard.name for shard in checkpoint.shards]
    return {name: digest_of(inside(checkpoint.path, name)) for name in names}


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Write `receipt.json`, which lists the files that are there already."""
    write_json(folder / RECEIPT_FILE, receipt.model_copy(update={KEY: list_files(folder)}).plain())


def read_receipt(folder: Path) -> Receipt | None:
    """The receipt of a conversion's folder; None if there is none.

    Raises:
        DataError: it is damaged, or of a newer version of this package
    """
    return read_document(Receipt, folder / RECEIPT_FILE, remedy="it belongs to the conversion, make that again")


def _public(command: Sequence[str]) -> str:
    """A command line as one would type it anywhere: neither the program's place nor absolute paths of this machine."""
    program, arguments = Path(command[0]).name, command[1:]
    # `python -m attnconv`.
    program = TOOL if program == "__main__.py" else program
    return shlex.join([program, *(_without_folders(argument) for argument in arguments)])


def _without_folders(argument: str) -> str:
    key, equals, value = argument.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if value.startswith(("/", "~")) else argument


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from ... import __version__

    return {
        TOOL: __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
