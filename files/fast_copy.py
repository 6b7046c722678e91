"""Copies of large files at the disk's own speed, fingerprinted and flushed on the way."""

import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import xxhash

from ..errors import OutputError

DIGEST_CHUNK = 1 << 20
COPY_CHUNK = 1 << 26
# The file systems cannot copy between them inside the kernel.
NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
# From linux/fs.h: let a new file share another's blocks until one of the two changes.
FICLONE = 0x40049409
# The file systems cannot share one file under two names.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP)


def copy_files(pairs: Iterable[tuple[Path, Path]], *, link: bool = False) -> dict[Path, str]:
    """Copy files, while other threads take their digests and write what is copied through to the disk.

    The kernel copies, so a copy-on-write file system shares the blocks until one side changes.

    Args:
        pairs: (file, copy to create).
        link: where blocks cannot be shared, give the same file a second name instead, if the file system can.

    Returns:
        the digest of each file.

    Raises:
        OutputError: a file changed its size while it was copied.
    """
    digests: dict[Path, Future[str]] = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for source, target in pairs:
            digests[source] = pool.submit(digest_of, source)
            if not (_clone(source, target) or (link and _link(source, target))):
                _copy(source, target, pool)
        return {source: digest.result() for source, digest in digests.items()}


def digest_of(path: Path) -> str:
    """The XXH3-128 of a file's bytes, as `"xxh3_128:<hexadecimal>"`; `xxhsum -H128` prints the same.

    It tells files apart as fast as memory is read, where SHA-256 would take longer than copying them does.
    """
    digest = xxhash.xxh3_128()
    buffer = bytearray(DIGEST_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return f"xxh3_128:{digest.hexdigest()}"


def _clone(source: Path, target: Path) -> bool:
    """Share the blocks of a file, as Btrfs and XFS can, at no time and room; whether that was possible."""
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb", buffering=0) as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
            return True
        # Each file system that cannot says so in another way, and a real failure comes again while copying.
        except OSError:
            pass
    target.unlink()
    return False


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno in NO_LINK:
            return False
        raise
    return True


def _copy(source: Path, target: Path, pool: ThreadPoolExecutor) -> None:
    with source.open("rb", buffering=0) as reader, target.open("xb") as writer:
        size = os.fstat(reader.fileno()).st_size
        flushes = [pool.submit(os.fsync, writer.fileno()) for _ in _copied_in_kernel(reader, writer)]
        shutil.copyfileobj(reader, writer, DIGEST_CHUNK)
        writer.flush()
        for flush in flushes:
            flush.result()
        if os.fstat(writer.fileno()).st_size != size:
            raise OutputError(f"{source} changed while it was copied: run the conversion again.")


def _copied_in_kernel(reader: BinaryIO, writer: BinaryIO) -> Iterator[int]:
    """Copy a file chunk by chunk inside the kernel and yield each chunk's size; end early where the kernel cannot."""
    if not hasattr(os, "copy_file_range"):
        return
    try:
        while count := os.copy_file_range(reader.fileno(), writer.fileno(), COPY_CHUNK):
            yield count
    except OSError as error:
        if error.errno not in NO_KERNEL_COPY:
            raise
