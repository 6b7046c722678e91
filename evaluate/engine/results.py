"""Where measurements of a model are kept, and what such a file says besides its figures.

A converted model's own folder gets a folder `results` with `eval.json` and `bench.json`, which travel with it to the
Hub; measurements of any other model go to `results/NAME` in the working directory.
"""

import os
import platform
import re
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch

from ...convert.reading.checkpoint import Checkpoint
from ...convert.writing.receipt import digest_inputs
from ...errors import OutputError
from ...files.containment import inside
from ...files.documents import read_document
from ...files.fast_copy import digest_of
from ...files.json_files import json_text
from ...files.output_folder import TOOL, is_ours
from ...files.own_files import CONFIG_FILE
from ...files.whole_files import refuse_link, write_atomically
from .schema import MeasuredModel, ResultsFile, Setup

AnyResults = TypeVar("AnyResults", bound=ResultsFile)

FOLDER = "results"
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


def read_results(folder: Path, kind: type[AnyResults]) -> AnyResults | None:
    """The measurements of one kind in a results folder; None if there are none.

    Raises:
        DataError: the file is damaged, or of a newer version of this package
    """
    return read_document(kind, results_path(folder, kind), remedy="remove it and measure again")


def write_results(folder: Path, results: ResultsFile) -> Path:
    """Write measurements, whole or not at all; returns the file.

    Raises:
        OutputError: the folder cannot be written
    """
    path = results_path(folder, type(results))
    write_text(path, json_text(results.plain()))
    return path


def results_path(folder: Path, kind: type[ResultsFile]) -> Path:
    """The file of one kind in a results folder."""
    return folder / f"{kind.model_fields['kind'].default}.json"


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error


def describe_model(checkpoint: Checkpoint, dtype: torch.dtype) -> MeasuredModel:
    """What identifies a model in results: as it was named, its type, and the digests of its files."""
    beside = [name for name in SETTINGS_FILES if (checkpoint.path / name).is_file()]
    return MeasuredModel(
        source=checkpoint.source,
        name=checkpoint.path.name if Path(checkpoint.source).exists() else checkpoint.source,
        model_type=checkpoint.config.model_type,
        dtype=str(dtype).removeprefix("torch."),
        converted=checkpoint.is_converted,
        bytes=checkpoint.nbytes,
        digests=digest_inputs(checkpoint),
        settings={name: digest_of(inside(checkpoint.path, name)) for name in beside},
    )


def describe_setup(device: torch.device) -> Setup:
    """Hardware and versions as they are now."""
    return Setup(
        time=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        device=str(device),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        cpu=_cpu(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        system=platform.platform(),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        versions={"python": platform.python_version(), **package_versions()},
    )


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

    found = {package: _version(package) for package in PACKAGES[1:]}
    return {TOOL: __version__} | {package: number for package, number in found.items() if number is not None}


# Reading what a package says of itself takes milliseconds, and every task asks.
@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
