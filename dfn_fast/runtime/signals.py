"""SIGINT and SIGTERM as a request to stop: the run saves and exits. A second signal exits at once."""

import os
import signal
import sys
import threading
from types import FrameType


class Stopped(Exception):
    """Raised when the run stops because it was asked to."""


class StopRequest:
    """A context manager that catches the first SIGINT or SIGTERM and remembers it.

    The training loop checks ``requested`` between two iterations. ``exit_code`` is the shell's for the signal: 130 or
    143. Outside the main thread, where signals cannot be caught, it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or 0)

    def raise_if_requested(self) -> None:
        if self.requested:
            raise Stopped

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os.write(sys.stderr.fileno(), b"\nexiting at once; the last checkpoint on disk is complete\n")
            os._exit(128 + number)
        self.signal = number
        os.write(sys.stderr.fileno(), b"\nstopping after this iteration (interrupt again to exit at once)\n")
