"""What the benchmarks share: finding models and data, and writing results with all that is needed to compare them."""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PACKAGES = ("attnconv", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")
SMOLLM2 = "smollm2-135m-instruct"


def parser_of(description: str | None, *, model: str | None = None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    if model is not None:
        parser.add_argument("--model", type=Path, help=f"folder of the model; default $ATTNCONV_MODELS/{model}")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: torch's own choice")
    parser.add_argument("--label", default="", help="a word about this run, kept in the result")
    return parser


def add_rows_option(parser: argparse.ArgumentParser) -> None:
    """The option of benchmarks that run so long that they may be stopped."""
    parser.add_argument(
        "--rows", type=Path, help="file of rows that are there already and of new ones; see common.Rows"
    )


def find_model(given: Path | None, name: str = SMOLLM2) -> Path:
    """The folder of a model: the one given, else `$ATTNCONV_MODELS/NAME`, else `../models/NAME`."""
    folder = given or Path(os.environ.get("ATTNCONV_MODELS") or REPOSITORY.parent / "models") / name
    if not (folder / "config.json").is_file():
        sys.exit(f"{folder} holds no model: name the folder with --model, or that above it with ATTNCONV_MODELS.")
    return folder


def find_data(relative: str) -> Path:
    """A file below `data/` of the shared folder: `$ATTNCONV_SHARED`, else `../shared`."""
    shared = Path(os.environ.get("ATTNCONV_SHARED") or REPOSITORY.parent / "shared")
    path = shared / "data" / relative
    if not path.is_file():
        sys.exit(f"{path} is missing: name the folder that holds data/{relative} with ATTNCONV_SHARED.")
    return path


def set_threads(threads: int | None) -> None:
    """Run torch on this many threads, here and in processes started from here."""
    if threads is None:
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def write_result(name: str, *, settings: Mapping[str, Any], results: Mapping[str, Any], label: str = "") -> Path:
    """Write a result as a new file `NAME-TIME.json` and print it; earlier results stay as they are."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    document = {
        "benchmark": name,
        "label": label,
        "time": stamp,
        **commit_state(),
        "hardware": _hardware(),
        "versions": _versions(),
        # Without the folders of this machine.
        "command": [
            "python",
            *(Path(part).name if part.startswith(("/", "~")) else part for part in sys.orig_argv[1:]),
        ],
        "settings": dict(settings),
        "results": dict(results),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}-{stamp}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document["results"], indent=2))
    print(f"written to {path}")
    return path


class Rows:
    """Rows of a long run, each written as soon as it is there: a run that was stopped goes on behind them.

    Args:
        path: a file of JSON lines, which need not exist; None to keep nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
        self._kept: dict[str, dict[str, Any]] = {_key(line["of"]): line["row"] for line in map(json.loads, lines)}

    def row(self, of: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured of this before, else what `measure` gives now."""
        key = _key(of)
        if key not in self._kept:
            self._kept[key] = measure()
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"of": dict(of), "row": self._kept[key]}) + "\n")
        return dict(self._kept[key])


def _key(of: Mapping[str, Any]) -> str:
    return json.dumps(dict(of), sort_keys=True)


def commit_state() -> dict[str, Any]:
    """The commit that ran, and whether tracked files differed from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
        ).stdout.strip()

    return {"commit": git("rev-parse", "HEAD") or None, "dirty": bool(git("status", "--porcelain", "-uno"))}


def _hardware() -> dict[str, Any]:
    import torch

    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def alternate(cases: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each case; the cases take turns, so that a slow spell of the machine hits all of them."""
    for _ in range(warmup):
        for case in cases.values():
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_a_row(cases: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median seconds of each case, all of one before those of the next: what a case leaves in the caches serves it."""
    return {
        name: seconds for name, case in cases.items() for seconds in alternate({name: case}, repeats=repeats).values()
    }


@dataclass(frozen=True)
class Finished:
    """A command that has run: its exit code, output, seconds and highest resident memory in bytes."""

    code: int
    stdout: str
    seconds: float
    peak_bytes: int


def run_command(command: Sequence[str | Path], *, check: bool = True) -> Finished:
    """Run a command, let its stderr through, and measure it."""
    began = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    stdout = process.stdout.read()
    # wait4 gives the memory of this child alone, and of its own children if they were larger.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if check and process.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed with exit code {process.returncode}.")
    return Finished(process.returncode, stdout, seconds, usage.ru_maxrss * 1024)


def attnconv_command(*arguments: str | Path) -> list[str | Path]:
    """The command line of this interpreter's attnconv."""
    return [sys.executable, "-m", "attnconv", *arguments]


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
