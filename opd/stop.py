"""Requests to stop: signals turned into a wish that is honoured where nothing is lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from opd.errors import Preempted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Handler(Protocol):
    """What takes the stop signals."""

    def handle(self, number: int, frame: FrameType | None) -> None: ...


@dataclass(slots=True)
class StopRequest:
    """Set by SIGINT, SIGTERM or SIGUSR1, and honoured by PhaseClock; a second SIGINT ends the process at once.

    at_once: nothing is at stake yet (models are being loaded), so that the first signal ends the work too.
    """

    reason: str = ""
    at_once: bool = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = self.reason or ("interrupted (Ctrl-C)" if number == signal.SIGINT else f"preempted ({signal.Signals(number).name})")
        if self.at_once:
            raise Preempted(self.reason)


@contextmanager
def stop_signals(request: Handler) -> Iterator[None]:
    """Route the three stop signals to `request` while the block runs; in another thread than the main one nothing can be routed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
