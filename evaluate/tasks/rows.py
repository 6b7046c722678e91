"""Rows of a JSON-lines file, gzipped or not."""

import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ...errors import DataError


def read_rows(path: Path, *, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines in order.

    Args:
        path: A file of JSON lines, or one with `.gz` behind its name.
        limit: Rows at most, the first ones.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object.
    """
    try:
        with _open(path) as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            for number, line in islice(lines, limit):
                yield _row(line, number, path)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{path} cannot be read as JSON lines: {error}.") from error


def _open(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _row(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"Line {number} of {path} is not JSON: {error.msg}.") from error
    if not isinstance(row, dict):
        raise DataError(f"Line {number} of {path} is a {type(row).__name__}; an object with named fields is wanted.")
    return row
