"""Which files of a result are ours: those that its receipt lists, and those that come beside it later."""

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

KEY = "files"
"""The key of a receipt under which the files stand that were there when it was written."""

LATER = (
    # Written together with the receipt.
    *("config.json", "recipe.yaml", "receipt.json", "README.md", "metrics.jsonl", "losses.png", "layer_errors.png"),
    # Measurements and reports; the files of ours that an interruption leaves half written.
    *("results/eval.*", "results/bench.*", "results/report.*", "results/images/*.png", "results/.*.tmp", ".*.tmp"),
    # What Python makes of the modeling file.
    "__pycache__/*.pyc",
)


def list_files(folder: Path) -> list[str]:
    """Everything in a folder but its folders, as sorted POSIX paths; links are listed and not followed."""
    return sorted(path.relative_to(folder).as_posix() for path in _walk(folder))


def strange_files(folder: Path, receipt: Mapping[str, Any]) -> list[str]:
    """The files of an earlier result that somebody else put there.

    Args:
        folder: the result.
        receipt: what its receipt holds.

    Returns:
        Their names, sorted; none where the receipt is of a version that listed no files.
    """
    listed = receipt.get(KEY)
    if not isinstance(listed, list):
        return []
    known = {name for name in listed if isinstance(name, str)}
    return [
        name
        for name in list_files(folder)
        if name not in known and not any(_matches(name, pattern) for pattern in LATER)
    ]


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        yield from (Path(root, name) for name in names)
        yield from (Path(root, name) for name in folders if Path(root, name).is_symlink())


def _matches(name: str, pattern: str) -> bool:
    # A pattern's star also matches slashes, so the depth is compared as well.
    return fnmatch(name, pattern) and name.count("/") == pattern.count("/")
