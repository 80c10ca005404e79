"""A rank's line to its launcher: `python -m opd.launcher.beacon FD`.

It says what the rank does, hears what the launcher knows, and ends the rank and its children when the launcher is gone. Only the standard
library is imported before that watch stands, because the rest takes seconds.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

TICK_SECONDS = 0.25
PR_SET_PDEATHSIG = 1


class Beacon:
    """JSON lines over a socket, both ways. `order`: the launcher's first line. `shown`: its newest text for the terminal."""

    def __init__(self, link: socket.socket) -> None:
        """Waits for the launcher's order."""
        self._link, self._lock, self._ticked = link, threading.Lock(), 0.0
        self.shown, self._exchanges = "", 0
        self._lines = link.makefile("r", encoding="utf-8")
        first = self._lines.readline()
        if not first:
            os._exit(1)  # the launcher died before it said what to do
        self.order: dict[str, Any] = json.loads(first)
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, **facts: Any) -> None:
        """Send facts."""
        line = (json.dumps(facts, default=str) + "\n").encode()
        with self._lock:
            try:
                self._link.sendall(line)
            except OSError:
                self._end()

    def tick(self, read: Callable[[], Mapping[str, Any]] = dict) -> None:
        """A sign of life, a few times a second at most, with the facts that `read` gives."""
        now = time.monotonic()
        if now - self._ticked > TICK_SECONDS:
            self._ticked = now
            self.tell(**read())

    def waiting(self, is_waiting: bool) -> None:
        """Entering or leaving an exchange with the other ranks."""
        self._exchanges += is_waiting
        self.tell(waiting=is_waiting, exchanges=self._exchanges)

    def _listen(self) -> None:
        try:
            for line in self._lines:
                self.shown = json.loads(line).get("shown", self.shown)
        except (OSError, ValueError):
            pass
        self._end()

    def _end(self) -> None:
        os.killpg(0, signal.SIGKILL)  # a rank leads its own group: this takes its children along


def die_with_parent() -> None:
    """Linux: the kernel kills this process when the launcher dies, also while it is stopped or hangs in a library."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    die_with_parent()
    beacon = Beacon(socket.socket(fileno=int(sys.argv[1])))
    beacon.tell(phase="imports")
    return import_module("opd.launcher.rank").run(beacon)


if __name__ == "__main__":
    sys.exit(main())
