"""Files written whole or not at all, and never through a link, which in a folder from elsewhere may lead anywhere."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import OutputError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a link of that name is replaced, what it leads to stays as it is."""
    with writing_whole(path) as file:
        file.write(content)


@contextmanager
def writing_whole(path: Path) -> Iterator[BinaryIO]:
    """The same piece by piece: what is written inside is the file when the context ends well, and else nothing is.

    Args:
        path: the file.

    Returns:
        what to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that nobody can foresee, opened only if it is new.
    descriptor, building = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            if hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), _mode(path))
        os.replace(building, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(building)
        raise


def refuse_link(path: Path) -> Path:
    """Insist that a file or folder of a model's own folder is no link.

    Raises:
        OutputError: it is one, and what is written there would land elsewhere.
    """
    if path.is_symlink():
        raise OutputError(f"{path} is a link to {os.readlink(path)}, so nothing is written there: remove the link")
    return path


def _mode(path: Path) -> int:
    """The permissions of the file that is replaced, else those that any new file has."""
    with suppress(OSError):
        if not path.is_symlink():
            return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
