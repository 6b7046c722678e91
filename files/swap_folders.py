"""Swapping two folders in one step, so that no moment exists at which one of the names is missing."""

import ctypes
import os
import sys
from pathlib import Path

# From linux/fs.h and fcntl.h: resolve relative paths from the working directory; swap instead of replacing.
AT_FDCWD = -100
RENAME_EXCHANGE = 2


def exchange(first: Path, second: Path) -> bool:
    """Swap two existing folders of one file system atomically.

    Returns:
        whether it was done; False where the system or the file system has no such call, and nothing has changed then.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    answer: int = libc.renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
    return answer == 0
