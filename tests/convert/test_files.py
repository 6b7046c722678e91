"""Output folders that appear whole or not at all, whatever happens on the way."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killing
import pytest
import torch
from killing import fill, version, write
from safetensors.torch import save_file

from attnconv.errors import OutputError
from attnconv.files import output_folder as files
from attnconv.files.locks import lock_folder
from attnconv.files.output_folder import atomic_folder, is_full, is_ours
from attnconv.files.own_files import list_files


def in_child(task: Callable[[], None]) -> int:
    """Run a task in a process of its own and return how it ended."""
    process = multiprocessing.get_context("fork").Process(target=task)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def alone(output: Path) -> Iterator[None]:
    """Afterwards nothing may lie beside the output."""
    yield
    assert [path.name for path in output.parent.iterdir()] in (["out"], [])


@pytest.mark.usefixtures("alone")
class TestWriting:
    def test_appears_at_the_end(self, output: Path) -> None:
        with atomic_folder(output) as folder:
            fill(folder, "new")
            assert not output.exists()
            assert folder.parent == output.parent
            assert folder.name.startswith(".out.attnconv-")
        assert version(output) == "new"

    def test_parents_are_made(self, tmp_path: Path) -> None:
        write(tmp_path / "out" / "of" / "reach", "new")
        assert version(tmp_path / "out" / "of" / "reach") == "new"

    def test_an_error_leaves_nothing(self, output: Path) -> None:
        with pytest.raises(ZeroDivisionError), atomic_folder(output) as folder:
            fill(folder, str(1 // 0))
        assert not output.exists()

    def test_an_interrupt_leaves_the_old(self, output: Path) -> None:
        write(output, "old")
        with pytest.raises(KeyboardInterrupt), atomic_folder(output, overwrite=True) as folder:  # noqa: PT012
            (folder / "a.txt").write_text("half")
            raise KeyboardInterrupt
        assert version(output) == "old"

    @pytest.mark.parametrize("can_exchange", [True, False])
    def test_replaces_an_earlier_result(
        self, output: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not can_exchange:
            monkeypatch.setattr(files, "exchange", lambda first, second: False)
        write(output, "old")
        write(output, "new", overwrite=True)
        assert version(output) == "new"

    def test_an_empty_folder_is_free(self, output: Path) -> None:
        output.mkdir()
        write(output, "new")
        assert version(output) == "new"

    def test_has_the_permissions_of_any_new_folder(self, output: Path, tmp_path: Path) -> None:
        previous = os.umask(0o027)
        try:
            write(output, "new")
            with atomic_folder(output, overwrite=True) as folder:
                save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
        finally:
            os.umask(previous)
        assert oct(output.stat().st_mode & 0o777) == "0o750"
        assert oct((output / "a.safetensors").stat().st_mode & 0o777) == "0o640"

    def test_of_two_runs_the_first_to_end_wins(self, output: Path) -> None:
        with pytest.raises(OutputError, match="add --overwrite"), atomic_folder(output) as folder:  # noqa: PT012
            fill(folder, "slow")
            write(output, "fast")
            assert version(folder) == "slow"
        assert version(output) == "fast"

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "link").symlink_to(tmp_path / "out" / "real")
        write(tmp_path / "out" / "link", "old")
        write(tmp_path / "out" / "link", "new", overwrite=True)
        assert (tmp_path / "out" / "link").is_symlink()
        assert version(tmp_path / "out" / "real") == "new"


class TestRefusals:
    def test_what_is_not_ours(self, output: Path) -> None:
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="is not the result of a conversion, so it is not touched"):
                write(output, "new", overwrite=overwrite)
        assert (output / "thesis.tex").read_text() == "years of work"

    @pytest.mark.parametrize("config", ["{}", "[", '{"model_type": "llama"}'])
    def test_a_model_that_is_not_ours(self, output: Path, config: str) -> None:
        output.mkdir()
        (output / "config.json").write_text(config)
        with pytest.raises(OutputError, match="is not the result of a conversion"):
            write(output, "new", overwrite=True)

    def test_a_file(self, output: Path) -> None:
        output.write_text("notes")
        with pytest.raises(OutputError, match="exists and is not a folder"):
            write(output, "new", overwrite=True)

    @pytest.mark.parametrize("name", ["notes.txt", "results/notes.md", "runs/a.txt", ".git/HEAD"])
    def test_files_of_the_user_beside_an_earlier_result(self, output: Path, name: str) -> None:
        write(output, "old")
        (output / "receipt.json").write_text(json.dumps({"tool": "attnconv", "files": list_files(output)}))
        ours = ["results/eval.json", "results/report.html", "metrics.jsonl", "README.md"]
        for path in (*ours, name):
            (output / path).parent.mkdir(exist_ok=True)
            (output / path).write_text("words")
        with pytest.raises(OutputError, match=rf"did not write and --overwrite would delete \({name}\): move them"):
            write(output, "new", overwrite=True)
        assert (output / name).read_text() == "words"
        (output / name).unlink()
        write(output, "new", overwrite=True)
        assert version(output) == "new"

    def test_of_many_files_of_the_user_some_are_named(self, output: Path) -> None:
        write(output, "old")
        (output / "receipt.json").write_text(json.dumps({"tool": "attnconv", "files": list_files(output)}))
        for index in range(5):
            (output / f"{index}.log").symlink_to(output.parent)
        with pytest.raises(OutputError, match=r"delete \(0\.log, 1\.log, 2\.log and 2 more\)"):
            write(output, "new", overwrite=True)

    def test_an_earlier_result_without_overwrite(self, output: Path) -> None:
        write(output, "old")
        with pytest.raises(OutputError, match="add --overwrite"):
            write(output, "new")
        assert version(output) == "old"

    def test_an_output_that_appears_meanwhile(self, output: Path) -> None:
        with pytest.raises(OutputError, match="exists"), atomic_folder(output) as folder:  # noqa: PT012
            fill(folder, "new")
            output.mkdir()
            (output / "notes").write_text("mine")
        assert (output / "notes").read_text() == "mine"

    def test_a_parent_that_is_a_file(self, output: Path) -> None:
        output.write_text("notes")
        with pytest.raises(OutputError, match="cannot be written"):
            write(output / "deeper", "new")

    def test_a_parent_that_cannot_be_written(self, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(**_: Any) -> str:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(output.parent))

        monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
        with pytest.raises(OutputError, match="cannot be written: Permission denied"):
            write(output, "new")

    @pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
    def test_a_parent_without_permission(self, output: Path) -> None:
        output.parent.chmod(0o500)
        try:
            with pytest.raises(OutputError, match="cannot be written: Permission denied"):
                write(output, "new")
        finally:
            output.parent.chmod(0o700)


def test_ours_is_told_by_the_config_or_the_receipt(tmp_path: Path) -> None:
    assert not is_ours(tmp_path)
    (tmp_path / "receipt.json").write_text('{"tool": "something else"}')
    assert not is_ours(tmp_path)
    (tmp_path / "receipt.json").write_text('{"tool": "attnconv"}')
    assert is_ours(tmp_path)
    (tmp_path / "receipt.json").unlink()
    (tmp_path / "config.json").write_text('{"attnconv": {}}')
    assert is_ours(tmp_path)


class TestKilled:
    """A process killed before any of its file operations, one after another until it gets through."""

    @pytest.mark.parametrize("can_exchange", [True, False])
    @pytest.mark.parametrize("then", ["a good run", "a failing run"])
    def test_at_any_moment(self, output: Path, can_exchange: bool, then: str) -> None:
        command = [sys.executable, killing.__file__, str(output), str(can_exchange), then]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        for row in rows:
            # Between the two renames that stand for the one step, the old folder waits under another name.
            assert row["found"] in (("old", "new") if can_exchange else ("old", "new", None))
            assert row["after"] == ("next" if then == "a good run" else row["found"] or "old")
            assert row["beside"] == ["out"]
        *killed, last = [row["ended"] for row in rows]
        assert set(killed) == {-signal.SIGKILL}
        assert last == 0
        assert len(killed) > 20
        ends = [row["found"] for row in rows]
        assert ends[0] == "old"
        assert ends[-1] == "new"
        assert (None in ends) == (not can_exchange)

    def test_a_living_run_is_left_alone(self, output: Path) -> None:
        stale = output.parent / ".out.attnconv-new-abcdefgh"
        stale.mkdir()
        lock = lock_folder(stale)
        assert lock is not None
        write(output, "new")
        assert stale.exists()
        lock.release()
        write(output, "next", overwrite=True)
        assert not stale.exists()

    def test_other_hidden_folders_are_left_alone(self, output: Path) -> None:
        names = [".out.attnconv-work", ".other.attnconv-new-abcdefgh", ".out.attnconv-new-abc", ".git"]
        for name in names:
            (output.parent / name).mkdir(parents=True)
        write(output, "new")
        assert {path.name for path in output.parent.iterdir()} == {*names, "out"}


class TestFullDisk:
    """Room runs out while weights are written, by Python's own writer and by the one in Rust."""

    TENSORS = {"a": torch.zeros(1 << 20)}  # noqa: RUF012

    def overfill(self, folder: Path, writer: str) -> None:
        if writer == "safetensors":
            save_file(self.TENSORS, folder / "model.safetensors")
        else:
            (folder / "model.bin").write_bytes(bytes(1 << 22))

    @pytest.mark.parametrize("writer", ["safetensors", "python"])
    def test_of_a_file_system(self, output: Path, writer: str) -> None:
        disk = output.parent / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small file system")
        try:
            write(disk / "out", "old")
            with pytest.raises(OutputError, match="no room on the disk") as caught:  # noqa: SIM117
                with atomic_folder(disk / "out", overwrite=True) as folder:
                    self.overfill(folder, writer)
            assert str(disk / "out") in str(caught.value)
            assert [path.name for path in disk.iterdir()] == ["out"]
            assert version(disk / "out") == "old"
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    @pytest.mark.parametrize("writer", ["safetensors", "python"])
    def test_of_the_allowed_file_size(self, output: Path, writer: str) -> None:
        write(output, "old")

        def task() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            try:
                with atomic_folder(output, overwrite=True) as folder:
                    self.overfill(folder, writer)
            except OutputError:
                os._exit(7)
            os._exit(1)

        assert in_child(task) == 7
        assert version(output) == "old"
        assert [path.name for path in output.parent.iterdir()] == ["out"]

    def test_other_errors_are_not_taken_for_it(self) -> None:
        assert not is_full(OSError(errno.EIO, "input/output error"))
        assert not is_full(ValueError("os error 281)"))
        assert is_full(OSError(errno.ENOSPC, "no space"))
        assert is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
