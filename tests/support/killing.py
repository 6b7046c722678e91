"""Writes an output folder in children that are killed before any of their file operations, one after another.

Called as a program, which is small and so quickly forked; prints what was found after each of them.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from attnconv.files import output_folder as files
from attnconv.files.output_folder import atomic_folder

NAMES = ("a.txt", "b.txt", "folder/c.txt")
EVENTS = ("os", "open", "shutil", "ctypes", "fcntl", "tempfile")
"""What Python announces to an audit hook before it asks the system for something that concerns files."""


def fill(folder: Path, version: str) -> None:
    """Write what passes for a conversion."""
    (folder / "config.json").write_text(json.dumps({"attnconv": {"version": 1}}))
    (folder / "folder").mkdir()
    for name in NAMES:
        (folder / name).write_text(version)


def version(folder: Path) -> str | None:
    """The version of a complete folder, None if there is no folder."""
    if not folder.exists():
        return None
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == {*NAMES, "config.json", "folder"}
    found = {(folder / name).read_text() for name in NAMES}
    assert len(found) == 1
    return found.pop()


def write(output: Path, text: str, *, overwrite: bool = False) -> None:
    with atomic_folder(output, overwrite=overwrite) as folder:
        fill(folder, text)


def kill_at(count: int, output: Path) -> int:
    """How a child ends that is killed before the file operation of this number, if it comes to it."""
    child = os.fork()
    if not child:
        seen = 0

        def hook(event: str, _: Any) -> None:
            nonlocal seen
            if event.partition(".")[0] in EVENTS and event != "os.kill":
                seen += 1
                if seen > count:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        write(output, "new", overwrite=True)
        # Whatever follows, such as the end of the process, is not ours.
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fail(output: Path) -> None:
    """A run that ends in an error."""
    try:
        with atomic_folder(output, overwrite=True) as folder:
            fill(folder, str(1 // 0))
    except ZeroDivisionError:
        return
    raise AssertionError("it came through")


def main(output: Path, *, can_exchange: bool, then: str) -> None:
    if not can_exchange:
        files.exchange = lambda first, second: False
    for count in range(200):
        write(output, "old", overwrite=True)
        ended = kill_at(count, output)
        found = version(output)
        if then == "a good run":
            write(output, "next", overwrite=True)
        else:
            fail(output)
        beside = [path.name for path in output.parent.iterdir()]
        print(json.dumps({"ended": ended, "found": found, "after": version(output), "beside": beside}))
        if ended == 0:
            break


if __name__ == "__main__":
    main(Path(sys.argv[1]), can_exchange=sys.argv[2] == "True", then=sys.argv[3])
