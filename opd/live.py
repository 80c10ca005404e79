"""Where a run stands: the phase clock, requests to stop, status.json and the terminal view."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opd.errors import Preempted
from opd.runfolder import write_json

UNSTOPPABLE = {"learn", "sync", "checkpoint"}  # weights are changing: finish, then stop


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
def stop_signals(request: StopRequest) -> Iterator[None]:
    """Route the three stop signals to `request` while the block runs; in another thread than the main one nothing can be routed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class PhaseClock:
    """Seconds by phase of the current step; entering a phase publishes it and honours a request to stop."""

    status: "Status"
    stop: StopRequest
    _phase: str = ""
    _seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._phase = phase
        self.check()
        self.status.phase(phase)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    def check(self, *_: object) -> None:
        """Raises Preempted after a request to stop, where stopping is safe. Long phases call it before every forward pass and verdict."""
        if self.stop.reason and self.safe:
            raise Preempted(self.stop.reason)

    @property
    def safe(self) -> bool:
        """Whether everything since the last recorded step may be thrown away: weights and records are as that step left them."""
        return self._phase not in UNSTOPPABLE

    def seconds(self) -> Mapping[str, float]:
        """Seconds since the last call, by phase; the count starts anew."""
        taken, self._seconds = self._seconds, {}
        return taken


class Status:
    """status.json: state, step, phase, pid, why. Written at most twice a second, and at every change of state."""

    def __init__(self, path: Path, steps: int) -> None:
        self._path, self._steps, self._step, self._phase, self._written = path, steps, 0, "start", 0.0

    def phase(self, phase: str) -> None:
        self._phase = phase
        if time.monotonic() - self._written > 0.5:
            self.write("running")

    def step(self, step: int) -> None:
        self._step = step

    @property
    def coming(self) -> int:
        """The step that is under way or comes next, counted from 1."""
        return self._step + 1

    def write(self, state: str, why: str = "") -> None:
        self._written = time.monotonic()
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(
            self._path,
            {"state": state, "step": self._step, "steps": self._steps, "phase": self._phase, "pid": os.getpid(), "why": why, "updated": now},
        )


class LiveView:
    """A progress bar with rates on a terminal, a plain line now and then elsewhere, nothing when quiet."""

    def __init__(self, name: str, steps: int, *, quiet: bool, line_seconds: float = 10.0, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, quiet=quiet)
        self._quiet, self._steps, self._line_seconds = quiet, steps, line_seconds
        self._started, self._first, self._last_line = time.monotonic(), 0, 0.0
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[now]}"))
        self._bar = Progress(*columns, console=self._console) if self._console.is_terminal and not quiet else None
        self._task = self._bar.add_task(name, total=steps, now="") if self._bar else None
        if self._bar:
            self._bar.start()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start_at(self, step: int) -> None:
        self._first, self._started = step, time.monotonic()
        if self._bar and self._task is not None:
            self._bar.reset(self._task, completed=step)

    def update(self, step: int, row: Mapping[str, float]) -> None:
        numbers = " ".join(f"{label} {row[key]:.{digits}f}" for label, key, digits in SHOWN if key in row)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, now=numbers)
        elif not self._quiet and (time.monotonic() - self._last_line > self._line_seconds or step == self._steps):
            self._last_line = time.monotonic()
            rate = (self._last_line - self._started) / max(step - self._first, 1)
            self.say(f"step {step}/{self._steps} {numbers}, about {rate * (self._steps - step):.0f} s left")
            sys.stderr.flush()

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


SHOWN = (
    ("loss", "loss/total", 4),
    ("accuracy", "accuracy/train", 3),
    ("dev", "eval/dev", 3),
    ("s/step", "seconds/step", 2),
    ("tok/s", "rate/tokens", 0),
)
