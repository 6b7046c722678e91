"""Weights that a conversion shares with its base as hard links, and how an overwritten base is noticed.

A hard link is one file under two names. Whoever writes into the base's file in place (`cp new base/model.safetensors`)
writes into the conversion too, which no name or configuration shows. So the receipt keeps size, time and digest of
each file that is shared.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...files.containment import is_relative
from ...files.fast_copy import digest_of
from ...files.json_files import read_json
from ...files.own_files import RECEIPT_FILE

LINKS = "links"
"""The key of a receipt under which shared files stand by their names in the conversion."""


def note_file(path: Path) -> dict[str, Any]:
    """Size and time of a file, to be kept with the digest that is taken afterwards."""
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def overwritten_links(folder: Path, *, read_all: bool = False) -> list[str]:
    """The names of weight files that no longer hold what was converted.

    Args:
        folder: a conversion; of anything else nothing is told.
        read_all: take every digest; otherwise only where size or time is another.
    """
    links: Any = {}
    with suppress(CheckpointError):
        links = read_json(folder / RECEIPT_FILE).get(LINKS)
    if not isinstance(links, Mapping):
        return []
    return sorted(name for name, noted in links.items() if _is_overwritten(folder, name, noted, read_all))


def refuse_overwritten(folder: Path, *, read_all: bool = False) -> None:
    """Insist that the weights of a conversion are those that were converted; see `overwritten_links`.

    Raises:
        CheckpointError: somebody overwrote a file of the base that the conversion shares.
    """
    names = overwritten_links(folder, read_all=read_all)
    if names:
        raise CheckpointError(describe_overwritten(folder, names))


def describe_overwritten(folder: Path, names: Iterable[str]) -> str:
    """What happened to these files, in one sentence."""
    return (
        f"{', '.join(names)} in {folder} no longer holds the weights that were converted: it is a hard link to a file "
        "of the base, which was overwritten in place since; convert again, or put the base's old weights back"
    )


def _is_overwritten(folder: Path, name: str, noted: Any, read_all: bool) -> bool:
    path = folder / name
    if not is_relative(name) or not isinstance(noted, Mapping) or not path.is_file():
        return False
    same = all(noted.get(key) == value for key, value in note_file(path).items())
    return (read_all or not same) and digest_of(path) != noted.get("digest")
