"""Timing work on a device to its end, with its peak memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .memory import peak_meter, trim

Clock = Callable[[], float]


@dataclass(frozen=True)
class Reading:
    """What one run of an action took.

    Attributes:
        output: what it returned.
        seconds: wall time until the device had finished.
        peak_bytes: highest memory above what was held before; None if nobody counts it.
    """

    output: Any
    seconds: float
    peak_bytes: int | None


class Stopwatch:
    """Times actions on a device.

    Args:
        device: where they run; work that was only queued there is waited for.
        clock: seconds since any moment.
    """

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter) -> None:
        self.device = device
        self.clock = clock
        self.meter = peak_meter(device)

    def read(self, action: Callable[[], Any], *, tidy: bool = True) -> Reading:
        """Run an action.

        Args:
            action: what to measure.
            tidy: return freed memory to the system before, which takes longer than short actions themselves.
        """
        if tidy:
            trim()
        self._wait()
        if self.meter is not None:
            self.meter.start()
        try:
            began = self.clock()
            output = action()
            self._wait()
            seconds = self.clock() - began
        finally:
            # A meter may have a thread running, which an action that fails must not leave behind.
            peak = None if self.meter is None else self.meter.stop()
        return Reading(output, seconds, peak)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
