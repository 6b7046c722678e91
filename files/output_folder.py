"""Output folders that appear all at once: a run writes into a sibling, which takes the old one's place at the end."""

import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OutputError
from .json_files import read_json
from .locks import FolderLock, lock_folder
from .own_files import CONFIG_FILE, RECEIPT_FILE, SECTION, strange_files
from .swap_folders import exchange

logger = logging.getLogger(__name__)

TOOL = "attnconv"
"""What a receipt names as the tool that wrote it."""

SHOWN_NAMES = 3
"""How many files an error names."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system answers when a disk, a quota or the largest allowed file is full."""


@contextmanager
def atomic_folder(output: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `output` that becomes `output` when the block ends without an error.

    Until then `output` is as it was; a process killed at any moment leaves the old folder or the new one, complete.
    What a killed run left beside `output` is removed, or put back, by the next.

    Args:
        output: the folder to write; its parents are created.
        overwrite: replace an `output` that is the result of an earlier conversion.

    Yields:
        the temporary folder, on the same file system.

    Raises:
        OutputError: `output` exists and may not be replaced, its parent cannot be written, or the disk is full.
    """
    output = _real(output)
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(output)
        check_output(output, overwrite=overwrite)
        folder, lock = _new_folder(output)
    try:
        with _room_for(output):
            yield folder
        with _writing(output), _room_for(output):
            _flush(folder)
            check_output(output, overwrite=overwrite)
            _install(folder, output)
    finally:
        # After an exchange this is the old output.
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


@contextmanager
def scratch_folder(output: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `output`, and so on its file system, that is removed again in any case.

    What a killed run left there is removed by the next.

    Raises:
        OutputError: the parent of `output` cannot be written, or the disk is full.
    """
    output = _real(output)
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(output)
        folder, lock = _new_folder(output)
    try:
        with _room_for(output):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


@contextmanager
def trial_folder(output: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `output` for trying what is to be written later; it is removed again.

    Args:
        output: the folder that will be written; its parents are created.
        overwrite: it may be an earlier result.

    Raises:
        OutputError: `output` could not be written, or a folder could not be put in its place.
    """
    output = _real(output)
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        check_output(output, overwrite=overwrite)
        folder, lock = _new_folder(output)
    try:
        with _room_for(output):
            yield folder
        _check_replaceable(output, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def check_output(output: str | Path, *, overwrite: bool = False) -> None:
    """Check that a conversion may write its result to a folder: a new one, an empty one, or an earlier result.

    Args:
        output: the folder.
        overwrite: allow an earlier result to be replaced.

    Raises:
        OutputError: it is a file, or holds something else, or an earlier result without `overwrite`, or one beside
            which somebody put files of another kind.
    """
    output = _real(output)
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{output} exists and is not a folder: give another output.")
    if not any(output.iterdir()):
        return
    if not is_ours(output):
        raise OutputError(f"{output} exists and is not the result of a conversion, so it is not touched: give another.")
    if not overwrite:
        raise OutputError(f"{output} exists: add --overwrite to replace this earlier result, or give another output.")
    strange = strange_files(output, _receipt(output))
    if strange:
        more = f" and {len(strange) - SHOWN_NAMES} more" if len(strange) > SHOWN_NAMES else ""
        raise OutputError(
            f"{output} holds files that attnconv did not write and --overwrite would delete "
            f"({', '.join(strange[:SHOWN_NAMES])}{more}): move them away, or give another output"
        )


def is_ours(folder: Path) -> bool:
    """Whether a folder is the result of a conversion: its config.json or its receipt says so."""
    with suppress(CheckpointError):
        if SECTION in read_json(folder / CONFIG_FILE):
            return True
    return _receipt(folder).get("tool") == TOOL


def is_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that there is no room left on the disk."""
    link: BaseException | None = error
    while link is not None:
        # Writers in other languages put the system's number into the message of an exception of their own.
        if (isinstance(link, OSError) and link.errno in FULL) or any(f"os error {code})" in str(link) for code in FULL):
            return True
        link = link.__cause__ or link.__context__
    return False


def _receipt(folder: Path) -> dict[str, Any]:
    """The receipt of a folder, empty if it has none that can be read."""
    with suppress(CheckpointError):
        return read_json(folder / RECEIPT_FILE)
    return {}


def _real(output: str | Path) -> Path:
    return Path(os.path.realpath(Path(output).expanduser()))


def _prefix(output: Path, kind: str) -> str:
    return f".{output.name}.attnconv-{kind}-"


def _new_folder(output: Path) -> tuple[Path, FolderLock]:
    """A fresh locked folder; the lock tells other runs that this one is alive."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(output, "new"), dir=output.parent))
        lock = lock_folder(folder)
        # Another run may have taken it for a dead one's between the two calls.
        if lock is not None and folder.exists():
            folder.chmod(0o777 & ~_umask())
            return folder, lock


def _check_replaceable(output: Path, full: Path) -> None:
    """Refuse an output that no folder can take the place of, such as a mount point.

    The system is asked to rename the output to a folder that is not empty, which it never does; that it says so, and
    nothing else, shows that the output could be renamed.
    """
    if not output.exists():
        return
    try:
        output.rename(full)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        reason = "it is a mount point" if error.errno == errno.EBUSY else str(error.strerror)
        raise OutputError(f"{output} cannot be replaced as a whole ({reason}): give a folder inside of it.") from error


def _clean_up(output: Path) -> None:
    """Remove what dead runs left beside `output`; put the old output back where one died while replacing it."""
    pattern = re.compile(re.escape(f".{output.name}.attnconv-") + "(new|old)-[a-z0-9_]{8}")
    for folder in sorted(output.parent.iterdir(), reverse=True):
        kind = pattern.fullmatch(folder.name)
        lock = lock_folder(folder) if kind else None
        if kind is None or lock is None or not lock.held:
            continue
        if kind[1] == "old" and not output.exists():
            logger.warning("%s was being replaced when a run was killed: the old folder is put back", output)
            folder.rename(output)
        else:
            logger.info("removing %s, left by a run that was killed", folder)
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _install(folder: Path, output: Path) -> None:
    """Make `folder` appear as `output`; what was there is in `folder` or gone afterwards."""
    if not output.exists():
        folder.rename(output)
    elif not exchange(folder, output):
        old = Path(tempfile.mkdtemp(prefix=_prefix(output, "old"), dir=output.parent))
        output.rename(old)
        folder.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    _flush_entry(output.parent)


def _flush(folder: Path) -> None:
    """Make everything in a folder survive a power cut, with the permissions that any new file has."""
    mask = _umask()
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            # Some writers, safetensors for one, make files for their owner alone. A link is the base's own file.
            if path.stat().st_nlink == 1:
                path.chmod(0o666 & ~mask)
            _flush_entry(path)
        _flush_entry(Path(root))


def _flush_entry(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Turn the system's refusals to create or rename a folder into an OutputError."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}.") from error


@contextmanager
def _room_for(output: Path) -> Iterator[None]:
    """Turn a full disk into an OutputError; everything else passes."""
    try:
        yield
    # The writers of weights, in other languages, have exception types of their own.
    except Exception as error:
        if isinstance(error, OutputError) or not is_full(error):
            raise
        raise OutputError(
            f"There is no room on the disk to write {output}; nothing that was there has changed."
        ) from error
