"""Peak memory of a piece of work: CUDA's own count, or on the CPU the resident memory of this process."""

import ctypes
import gc
import re
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Protocol

import psutil
import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
# Seconds between two looks at the resident memory where the system keeps no peak that can be reset.
INTERVAL = 0.002


class PeakMeter(Protocol):
    """Measures from `start` to `stop`; nothing else in the process may run in between."""

    def start(self) -> None:
        """Note what is held."""

    def stop(self) -> int:
        """The most bytes held since `start`, above what was held then."""


class CudaPeak:
    """What torch's allocator handed out on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0

    def start(self) -> None:
        """Reset the device's peak."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)

    def stop(self) -> int:
        """The device's peak above what was allocated."""
        return max(0, torch.cuda.max_memory_allocated(self.device) - self.before)


class ResidentPeak:
    """The kernel's own high-water mark of this process's resident memory, on Linux."""

    def __init__(self) -> None:
        self.before = 0

    def start(self) -> None:
        """Reset the high-water mark."""
        CLEAR.write_text("5")
        self.before = _status("VmRSS")

    def stop(self) -> int:
        """The high-water mark above what was resident."""
        return max(0, _status("VmHWM") - self.before)


class SampledPeak:
    """Resident memory looked at every few milliseconds by a thread, where the system has no better way."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.before = self.highest = 0
        self.done = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look."""
        self.before = self.highest = self._resident()
        self.done.clear()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def stop(self) -> int:
        """The most that was seen above what was resident."""
        self.done.set()
        if self.thread is not None:
            self.thread.join()
        return max(0, max(self.highest, self._resident()) - self.before)

    def _watch(self) -> None:
        while not self.done.wait(INTERVAL):
            self.highest = max(self.highest, self._resident())

    def _resident(self) -> int:
        return int(self.process.memory_info().rss)


def peak_meter(device: torch.device) -> PeakMeter | None:
    """A meter for what runs on a device; None for a device whose memory nobody counts."""
    if device.type == "cuda":
        return CudaPeak(device)
    if device.type != "cpu":
        return None
    return ResidentPeak() if _keeps_high_water_mark() else SampledPeak()


@cache
def _keeps_high_water_mark() -> bool:
    """Whether this process may reset its high-water mark; some containers forbid it."""
    try:
        CLEAR.write_text("5")
        return _status("VmHWM") > 0
    except (OSError, KeyError):
        return False


def _status(name: str) -> int:
    """A line of the process's status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise KeyError(name)
    return int(found[1]) * 1024


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had; None where that is unknown."""
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + held_back)
    return int(psutil.virtual_memory().available) if device.type == "cpu" else None


def give_back(device: torch.device) -> None:
    """Return all freed memory to the system, so that what follows begins like what came before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Return freed memory of the C library to the system: what reuses it would seem to need nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
