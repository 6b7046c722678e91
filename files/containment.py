"""Which paths stay inside a model's folder: indexes, links and file lists are input and may point anywhere."""

from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import CheckpointError


def is_relative(name: str) -> bool:
    """Whether a file name can only mean something below the folder it is used in, on any system."""
    parts = PurePosixPath(name).parts
    windows = PureWindowsPath(name)
    return bool(parts) and ".." not in parts + windows.parts and not windows.anchor and not name.startswith("/")


def inside(folder: Path, name: str) -> Path:
    """The real path of a folder's file, which must lie in the folder or be a blob of the Hub cache that it belongs to.

    Args:
        folder: a resolved folder.
        name: path of a file relative to it.

    Raises:
        CheckpointError: the name or a link leads elsewhere.
    """
    real = (folder / name).resolve()
    cache = folder.parent.parent
    is_blob = folder.parent.name == "snapshots" and real.is_relative_to(cache / "blobs")
    if not is_relative(name) or not (real.is_relative_to(folder) or is_blob):
        raise CheckpointError(f"{folder / name} leads to {real}, outside the folder: copy the file into it.")
    return real
