"""The one reader of JSON lines: of texts and rows that users give, and of files that a run appends to."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError


def parse_line(line: str, number: int, path: Path) -> Any:
    """The value on one line.

    Args:
        line: the line, with or without its end
        number: which line of the file it is, from 1
        path: the file, for the error

    Raises:
        DataError: it is not JSON
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"Line {number} of {path} is not JSON: {error.msg}.") from error
    except RecursionError as error:
        raise DataError(f"Line {number} of {path} is nested too deeply to be read.") from error


def numbered_lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def finished_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a file that runs append to; nothing if there is none.

    A killed run, or a full disk, can leave half a line at the end, which is left out; bytes that are no UTF-8 are
    replaced, so that they spoil one line and not the file.
    """
    if path.is_file():
        yield from enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1)
