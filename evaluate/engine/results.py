"""Where measurements of a model are kept, and what such a file says besides its figures.

A converted model's own folder gets a folder `results` with `eval.json` and `bench.json`, which travel with it to the
Hub; measurements of any other model go to `results/NAME` in the working directory.
"""

import os
import platform
import re
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...convert.reading.checkpoint import Checkpoint
from ...convert.writing.receipt import digest_inputs
from ...errors import CheckpointError, DataError, OutputError
from ...files.containment import inside
from ...files.fast_copy import digest_of
from ...files.json_files import json_text, read_json
from ...files.output_folder import TOOL, is_ours
from ...files.own_files import CONFIG_FILE
from ...files.whole_files import refuse_link, write_atomically

FOLDER = "results"
EVALUATION = "eval"
BENCHMARK = "bench"
VERSION = 1
# Where a document of each kind has its figures, and as what.
_MEASURED: Mapping[str, tuple[str, type]] = {EVALUATION: ("tasks", dict), BENCHMARK: ("cases", list)}
# What decides, besides the weights, what a model answers to a text.
SETTINGS_FILES = (CONFIG_FILE, "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
PACKAGES = (TOOL, "torch", "transformers", "peft", "safetensors", "tokenizers", "triton", "numpy", "lm-eval")


def results_folder(source: str | Path, output: str | Path | None = None) -> Path:
    """The folder for measurements of a model: `output` if given, else as the head of this module says.

    Raises:
        OutputError: a converted model's `results` is a link, which may lead out of its folder.
    """
    if output is not None:
        return Path(output).expanduser()
    folder = Path(source).expanduser()
    if folder.is_dir() and is_ours(folder):
        return refuse_link(folder / FOLDER)
    name = re.sub(r"[^\w.-]+", "-", str(source).rstrip("/").rsplit("/", 1)[-1]).strip(".-")
    return Path(FOLDER) / (name or "model")


def read_results(folder: Path, kind: str) -> dict[str, Any] | None:
    """The measurements of one kind in a results folder; None if there are none.

    Raises:
        DataError: the file is damaged, or of a newer version of this package.
    """
    path = folder / f"{kind}.json"
    if not path.is_file():
        return None
    try:
        document = read_json(path)
    except CheckpointError as error:
        raise DataError(f"{error} Remove it and measure again.") from error
    if document.get("tool") != TOOL or document.get("kind") != kind:
        raise DataError(f"{path} was not written by {TOOL}: give another folder.")
    if document.get("version", 0) > VERSION:
        raise DataError(f"{path} was written by a newer version of {TOOL}: update it, or measure again.")
    for key, wanted in (("model", dict), _MEASURED[kind]):
        if not isinstance(document.get(key), wanted):
            raise DataError(f'{path} is damaged, its "{key}" cannot be read. Remove it and measure again.')
    return document


def write_results(folder: Path, kind: str, document: Mapping[str, Any]) -> Path:
    """Write the measurements of one kind, whole or not at all; returns the file.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = folder / f"{kind}.json"
    write_text(path, json_text({"tool": TOOL, "version": VERSION, "kind": kind, **document}))
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error


def describe_model(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """What identifies a model in results: as it was named, its type, and the digests of its files."""
    beside = [name for name in SETTINGS_FILES if (checkpoint.path / name).is_file()]
    return {
        "source": checkpoint.source,
        "name": checkpoint.path.name if Path(checkpoint.source).exists() else checkpoint.source,
        "model_type": checkpoint.config.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "converted": checkpoint.is_converted,
        "bytes": checkpoint.nbytes,
        "digests": digest_inputs(checkpoint),
        "settings": {name: digest_of(inside(checkpoint.path, name)) for name in beside},
    }


def model_identity(about: Mapping[str, Any]) -> list[Any]:
    """What makes a described model the same model: weights, configuration, tokenizer, and the dtype that it ran in."""
    return [sorted(about["digests"].values()), about.get("settings", {}), about["dtype"], about["converted"]]


def describe_setup(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, without which no figure means anything."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "system": platform.platform(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def package_versions() -> dict[str, str]:
    """Versions of the packages that can change a figure."""
    from ... import __version__

    found = {TOOL: __version__}
    for package in PACKAGES[1:]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
