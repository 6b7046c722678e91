"""Signals that ask a run to stop: it ends the step that it is in, keeps the result, and stops then."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTE = b"\nStopping after this step, which is kept; once more stops at once.\n"


@dataclass
class StopRequest:
    """Whether a run has been asked to stop.

    Attributes:
        signal: number of the signal that asked; None as long as nothing has.
    """

    signal: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; the second one interrupts wherever the run is."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        # A handler may run in the middle of any other write, so Python's own streams are not to be used here.
        with suppress(OSError):
            os.write(2, NOTE)


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Within the context SIGINT and SIGTERM only ask; in another thread than the main one, nothing is changed."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None stands for a handler that was not set by Python and cannot be put back.
            if handler is not None:
                signal.signal(number, handler)
