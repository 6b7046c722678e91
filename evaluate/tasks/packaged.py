"""Texts and question sets that come with the package, by name."""

from pathlib import Path

from ...errors import DataError
from ...recipes.problems import nearest

ASSETS = Path(__file__).parent / "assets"
SUFFIXES = (".txt.gz", ".jsonl.gz")


def packaged_names() -> tuple[str, ...]:
    """Names of the packaged data, in alphabetical order."""
    return tuple(sorted(_packaged()))


def packaged_file(name: str) -> Path | None:
    """The packaged file of that name, such as `book`; None if there is none."""
    return _packaged().get(name)


def data_file(data: str) -> Path:
    """The file that a task's `data` names: a packaged one, else the path as it is.

    Args:
        data: the name of packaged data, or a path.

    Raises:
        DataError: it is neither the name of packaged data nor a file.
    """
    packaged = packaged_file(data)
    if packaged is not None:
        return packaged
    path = Path(data).expanduser()
    if path.is_file():
        return path
    raise DataError(f"There is no file {data} and no packaged data of that name; {nearest(data, packaged_names())}")


def _packaged() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in ASSETS.iterdir():
        for suffix in SUFFIXES:
            if path.name.endswith(suffix):
                found[path.name.removesuffix(suffix)] = path
    return found
