"""The work folder of a run: what an interrupted conversion needs to go on as if nothing had happened.

It stands beside the output, as `.<name>.attnconv-work`, until the output is complete:

    run.json                  what is converted how, what was measured so far, and the digest of a finished receipt
    metrics.jsonl             see `metrics`
    checkpoint-<stage>-<step>/
        trained.safetensors   the cores and adapters, fp32
        optimizer.safetensors AdamW's two moments of what the stage trains
        state.json            stage, step, place in the data, tokens, seconds
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import OutputError, TrainingError
from ..files.fast_copy import digest_of
from ..files.foreign_errors import first_line
from ..files.locks import FolderLock, lock_folder
from ..files.output_folder import is_full
from ..files.own_files import METRICS_FILE, RECEIPT_FILE
from .packing import Position

FORMAT = 2
WORK_FOLDER = re.compile(r"\.(.+)\.attnconv-work")
CHECKPOINT = re.compile(r"checkpoint-(\d+)-(\d+)")


@dataclass(frozen=True)
class StageState:
    """Where a stage stands.

    Attributes:
        stage: index of the stage in the recipe.
        step: optimizer steps done in it.
        tokens: training tokens seen in it, by all processes.
        seconds: time spent on its steps.
        position: place in the data behind the last sequence used.
    """

    stage: int
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    position: Position = field(default_factory=Position)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint as it was read back.

    Attributes:
        state: where the stage stood.
        trained: cores and adapters by name.
        optimizer: AdamW's moments, as `<parameter>/<moment>`.
    """

    state: StageState
    trained: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


class WorkFolder:
    """The folder beside an output in which a run keeps what it would need to go on.

    Args:
        output: the folder that the run will write in the end, or a work folder itself.
    """

    def __init__(self, output: Path) -> None:
        itself = WORK_FOLDER.fullmatch(output.name)
        self.output = output.with_name(itself[1]) if itself else output
        self.path = self.output.with_name(f".{self.output.name}.attnconv-work")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Within the context no other process can work in the folder, which is made if it is not there.

        Raises:
            OutputError: another process is at work in it, or it cannot be made.
        """
        lock = self._lock()
        try:
            yield
        finally:
            if not self.exists():
                self.remove()
            lock.release()

    @property
    def metrics(self) -> Path:
        """Where the run's metrics are collected."""
        return self.path / METRICS_FILE

    def exists(self) -> bool:
        """Whether a run was begun and not finished."""
        return (self.path / "run.json").is_file()

    def begin(self, identity: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> None:
        """Start afresh for a run of this identity; what an earlier run left is removed.

        Args:
            identity: what must be as it is when the run goes on; JSON data.
            measured: what is known already.
        """
        self._make()
        self.clear()
        self._write_run({"format": FORMAT, "identity": dict(identity), "measured": dict(measured or {})})

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse to go on with something else than what was begun.

        Args:
            identity: what must be as it was.

        Raises:
            TrainingError: the folder is damaged, or was begun with another recipe, model, weights, text or number of
                processes.
        """
        run = self._read_run()
        if run.get("format") != FORMAT:
            raise TrainingError(f"{self.path} is of another version of attnconv: start over with --overwrite.")
        now = json.loads(json.dumps(identity))
        for key, value in now.items():
            before = run["identity"].get(key)
            if before == value:
                continue
            change = f" ({before}, and now {value})" if isinstance(value, int) else ""
            if keys := list(_differences(before, value)):
                change = f" (it differs in {', '.join(keys)})" if key == "recipe" else f" ({', '.join(keys)})"
            other = "other" if key in ("weights", "data") else "another"
            raise TrainingError(
                f"The unfinished run in {self.path} has {other} {key}{change}: resume it unchanged, "
                "or start over with --overwrite."
            )

    def finishing(self, receipt: Path) -> None:
        """Note that the output with this receipt is about to be put in its place."""
        run = self._read_run()
        run["receipt"] = digest_of(receipt)
        self._write_run(run)

    def is_finished(self, output: Path) -> bool:
        """Whether the run's output was put in its place, so that only this folder is left over."""
        receipt = output / RECEIPT_FILE
        try:
            noted = self._read_run().get("receipt")
        # Whoever starts over does not need it, and whoever goes on is told.
        except TrainingError:
            return False
        return noted is not None and receipt.is_file() and digest_of(receipt) == noted

    def measured(self) -> dict[str, Any]:
        """What `record` wrote so far."""
        measured: dict[str, Any] = self._read_run()["measured"]
        return measured

    def record(self, key: str, value: Any) -> None:
        """Keep a result, JSON data, under a name."""
        run = self._read_run()
        run["measured"][key] = value
        self._write_run(run)

    def save(
        self, state: StageState, trained: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]
    ) -> None:
        """Write a checkpoint, whole or not at all, then remove the one before it."""
        target = self.path / f"checkpoint-{state.stage}-{state.step}"
        building = self.path / f"{target.name}.partial"
        try:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            save_file(dict(trained), building / "trained.safetensors")
            save_file(dict(optimizer), building / "optimizer.safetensors")
            (building / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
            for file in building.iterdir():
                _flush(file)
            shutil.rmtree(target, ignore_errors=True)
            building.rename(target)
        except (OSError, SafetensorError) as error:
            reason = "the disk is full" if is_full(error) else first_line(error)
            raise OutputError(f"The checkpoint {target} cannot be written: {reason}.") from error
        for _, older in self._checkpoints():
            if older != target:
                shutil.rmtree(older, ignore_errors=True)

    def saved(self) -> str:
        """What of the run is saved, for a sentence that goes on."""
        checkpoints = self._checkpoints() if self.path.is_dir() else []
        if not checkpoints:
            return "no step of it is saved yet; "
        stage, step = max(checkpoints)[0]
        return f"step {step} of stage {stage + 1} is saved; "

    def latest(self) -> Snapshot | None:
        """The last checkpoint; None if there is none yet.

        Raises:
            TrainingError: it cannot be read.
        """
        checkpoints = self._checkpoints()
        if not checkpoints:
            return None
        folder = max(checkpoints)[1]
        try:
            raw = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            state = StageState(**{**raw, "position": Position(**raw["position"])})
            trained, optimizer = (load_file(folder / f"{name}.safetensors") for name in ("trained", "optimizer"))
            return Snapshot(state, trained, optimizer)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TrainingError(
                f"The checkpoint {folder} is damaged: start over with --overwrite ({first_line(error)})."
            ) from error

    def clear(self) -> None:
        """Remove what is in the folder, but not the folder itself, for a lock may be on it."""
        (self.path / "run.json").unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """Remove the folder unless a checkpoint is in it."""
        if self.path.is_dir() and not self._checkpoints():
            self.remove()

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"The work folder {self.path} cannot be made: {error.strerror}.") from error

    def _lock(self) -> FolderLock:
        while True:
            self._make()
            lock = lock_folder(self.path)
            if lock is not None and (not lock.held or lock.is_on(self.path)):
                return lock
            if lock is None and self.path.exists():
                raise OutputError(
                    f"Another process is at work on {self.output} right now: wait for its end, or give another output."
                )
            # It was removed between the two calls, by a run that came to its end.
            if lock is not None:
                lock.release()

    def _checkpoints(self) -> list[tuple[tuple[int, int], Path]]:
        found = ((CHECKPOINT.fullmatch(path.name), path) for path in self.path.iterdir())
        return [((int(match[1]), int(match[2])), path) for match, path in found if match]

    def _read_run(self) -> dict[str, Any]:
        try:
            run = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise TrainingError(f"{self.path}/run.json cannot be read; start over with --overwrite.") from error
        parts = [run] if not isinstance(run, dict) else [run.get(key) for key in ("identity", "measured")]
        if not all(isinstance(part, dict) for part in parts):
            raise TrainingError(f"{self.path}/run.json is damaged; start over with --overwrite.")
        return dict(run)

    def _write_run(self, run: Mapping[str, Any]) -> None:
        building = self.path / "run.json.partial"
        try:
            building.write_text(json.dumps(run, indent=1), encoding="utf-8")
            _flush(building)
            building.replace(self.path / "run.json")
        except OSError as error:
            reason = "the disk is full" if is_full(error) else first_line(error)
            raise OutputError(f"The work folder {self.path} cannot be written: {reason}.") from error


def fingerprint(text: str) -> str:
    """A short name for a text that no other text has."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """The keys, such as `stages.0.steps`, in which two trees of JSON data differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{place}.{index}")
    elif before != now and place:
        yield place


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
