"""What an interrupted measurement has done already: one JSON line for each piece of work, kept until all is done."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ...errors import DataError, OutputError
from ...files.json_files import plain_json
from ...files.json_lines import finished_lines, parse_line
from ...files.locks import FolderLock, lock_folder
from ...files.whole_files import refuse_link

logger = logging.getLogger(__name__)


class Journal:
    """Finished pieces of work by key; a context manager that keeps the file open for appending.

    Args:
        path: the file, such as `eval.partial`; made when the first piece is done, with the folders above it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = dict(self._read())
        self._file: IO[str] | None = None
        self._lock: FolderLock | None = None

    def _read(self) -> Iterator[tuple[str, Any]]:
        if not self.path.is_file():
            return
        refuse_link(self.path)
        for number, line in finished_lines(self.path):
            try:
                entry = parse_line(line, number, self.path)
                yield entry["key"], entry["value"]
            except (DataError, TypeError, KeyError):
                logger.warning("A line of %s is damaged; what it held is measured again.", self.path)

    def __enter__(self) -> "Journal":
        """The journal itself.

        Raises:
            OutputError: another run is writing the same file.
        """
        if self.path.is_file():
            self._take()
        return self

    def _take(self) -> None:
        """Keep other runs from writing, and removing, the file while this one does."""
        if self._lock is None:
            self._lock = lock_folder(self.path)
            if self._lock is None:
                raise OutputError(f"Another run is measuring into {self.path.parent}: wait for it, or give --output.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file, which stays for the next run."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __contains__(self, key: str) -> bool:
        """Whether this piece is done."""
        return key in self.entries

    def __getitem__(self, key: str) -> Any:
        """What this piece gave."""
        return self.entries[key]

    def add(self, key: str, value: Any) -> None:
        """Write down what a piece of work gave, in plain JSON values.

        Raises:
            OutputError: the file cannot be written.
        """
        value = plain_json(value)
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                refuse_link(self.path)
                self._drop_torn_line()
                self._file = self.path.open("a", encoding="utf-8")
                self._take()
            self._file.write(json.dumps({"key": key, "value": value}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}.") from error
        self.entries[key] = value

    def _drop_torn_line(self) -> None:
        if self.path.is_file():
            whole = self.path.read_bytes()
            os.truncate(self.path, whole.rfind(b"\n") + 1)

    def remove(self) -> None:
        """Delete the file: all is done, or to be done again."""
        self.path.unlink(missing_ok=True)
        self.__exit__(None, None, None)
        self.entries = {}
