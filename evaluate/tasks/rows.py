"""Rows of a JSON-lines file, gzipped or not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...files.json_lines import numbered_lines, parse_line
from .textfile import open_text


def read_rows(path: Path, *, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines in order.

    Args:
        path: a file of JSON lines, or one with `.gz` behind its name.
        limit: rows at most, evenly spread over the file: many files are sorted by label or subject.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object.
    """
    try:
        with open_text(path) as file:
            lines = list(numbered_lines(file))
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{path} cannot be read as JSON lines: {error}.") from error
    count = len(lines) if limit is None else min(limit, len(lines))
    for place in range(count):
        number, line = lines[place * len(lines) // count]
        yield _row(line, number, path)


def _row(line: str, number: int, path: Path) -> dict[str, Any]:
    row = parse_line(line, number, path)
    if not isinstance(row, dict):
        raise DataError(f"Line {number} of {path} is a {type(row).__name__}; an object with named fields is wanted.")
    return row
