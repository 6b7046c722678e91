"""Texts and question sets that come with the package, by name."""

from difflib import get_close_matches
from pathlib import Path

from ..errors import DataError

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
        data: The name of packaged data, or a path.

    Raises:
        DataError: It is neither the name of packaged data nor a file.
    """
    packaged = packaged_file(data)
    if packaged is not None:
        return packaged
    path = Path(data).expanduser()
    if path.is_file():
        return path
    names = packaged_names()
    near = get_close_matches(data.lower(), names, n=1)
    hint = f'did you mean "{near[0]}"?' if near else f"what comes with the package is {', '.join(names)}."
    raise DataError(f"There is no file {data} and no packaged data of that name; {hint}")


def _packaged() -> dict[str, Path]:
    found = {}
    for path in ASSETS.iterdir():
        for suffix in SUFFIXES:
            if path.name.endswith(suffix):
                found[path.name.removesuffix(suffix)] = path
    return found
