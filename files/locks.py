"""Locks on folders that end with the process that holds them, however it ends."""

import errno
import os
import sys
from pathlib import Path

TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


class FolderLock:
    """A lock on a folder, whatever it is renamed to.

    Attributes:
        held: whether there is a lock at all; some file systems have none for folders.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self.held = descriptor is not None

    def is_on(self, folder: Path) -> bool:
        """Whether the folder of this name is still the one that was locked."""
        try:
            return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), folder.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self.held = False


def lock_folder(folder: Path) -> FolderLock | None:
    """Lock a folder, or a file, without waiting.

    Returns:
        the lock, which is not `held` where folders cannot be locked; None if another process has it or the folder is
        gone.
    """
    if sys.platform == "win32":
        return FolderLock(None) if folder.is_dir() else None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return None if error.errno in TAKEN else FolderLock(None)
    return FolderLock(descriptor)
