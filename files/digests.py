"""Digests of files that are read more than once, and how to tell without reading that one has changed since."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .fast_copy import digest_of


@dataclass(frozen=True)
class FileDigests:
    """What some files held at one moment.

    Attributes:
        digests: the digest of each file by its name.
        stamps: size in bytes, time of the last change in ns and inode of each file.
    """

    digests: Mapping[str, str]
    stamps: Mapping[Path, tuple[int, int, int]]

    def changed(self) -> list[Path]:
        """The files that are no longer what they were, told by size, time of change and inode."""
        return [path for path, stamp in self.stamps.items() if not path.exists() or _stamp(path) != stamp]


def digest_files(files: Mapping[str, Path]) -> FileDigests:
    """Read files and keep what they hold; about 0.1 s per GB that is in memory, else the disk's speed.

    Args:
        files: paths by the names to keep them under.
    """
    # The stamps come first: what changes while it is read counts as changed.
    stamps = {path: _stamp(path) for path in files.values()}
    return FileDigests({name: digest_of(path) for name, path in files.items()}, stamps)


def files_below(paths: Iterable[str]) -> dict[str, Path]:
    """Files and the contents of folders, by name: the path as it was given, and behind it the place in the folder."""
    found: dict[str, Path] = {}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            inner = sorted(file for file in path.rglob("*") if file.is_file())
            found |= {f"{given}/{file.relative_to(path).as_posix()}": file for file in inner}
        elif path.is_file():
            found[given] = path
    return found


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
