"""What the files of a result are called, and which are ours: listed in its receipt, or written beside it later."""

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
RECEIPT_FILE = "receipt.json"
RECIPE_FILE = "recipe.yaml"
CARD_FILE = "README.md"
METRICS_FILE = "metrics.jsonl"
LOSS_PICTURE = "losses.png"
LAYER_PICTURE = "layer_errors.png"

SECTION = "attnconv"
"""The key of config.json under which a converted model keeps its plan."""

KEY = "files"
"""The key of a receipt under which the files stand that were there when it was written."""

LATER = (
    # Written together with the receipt.
    *(CONFIG_FILE, RECIPE_FILE, RECEIPT_FILE, CARD_FILE, METRICS_FILE, LOSS_PICTURE, LAYER_PICTURE),
    # Measurements and reports; the files of ours that an interruption leaves half written.
    *("results/eval.*", "results/bench.*", "results/report.*", "results/images/*.png", "results/.*.tmp", ".*.tmp"),
    # What Python makes of the modeling file.
    "__pycache__/*.pyc",
    # What a download of a published result brings along.
    ".gitattributes",
)
DOWNLOAD_NOTES = ".cache/huggingface/"
"""Where the Hub's client notes what it downloaded into a folder."""


def list_files(folder: Path) -> list[str]:
    """Everything in a folder but its folders, as sorted POSIX paths; links are listed and not followed."""
    return sorted(path.relative_to(folder).as_posix() for path in _walk(folder))


def strange_files(folder: Path, receipt: Mapping[str, Any]) -> list[str]:
    """The files of an earlier result that somebody else put there.

    Args:
        folder: the result.
        receipt: what its receipt holds.

    Returns:
        their names, sorted; none where the receipt is of a version that listed no files.
    """
    listed = receipt.get(KEY)
    if not isinstance(listed, list):
        return []
    known = {name for name in listed if isinstance(name, str)}
    return [
        name
        for name in list_files(folder)
        if name not in known
        and not name.startswith(DOWNLOAD_NOTES)
        and not any(_matches(name, pattern) for pattern in LATER)
    ]


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        yield from (Path(root, name) for name in names)
        yield from (Path(root, name) for name in folders if Path(root, name).is_symlink())


def _matches(name: str, pattern: str) -> bool:
    # A pattern's star also matches slashes, so the depth is compared as well.
    return fnmatch(name, pattern) and name.count("/") == pattern.count("/")
