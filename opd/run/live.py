"""Where a run stands: the phase clock, requests to stop, status.json and the terminal view."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opd.errors import Preempted
from opd.launcher.ranks import ALONE, Ranks
from opd.run.folder import status_content, write_json
from opd.run.roles import who_waits
from opd.stop import StopRequest

WRITE_SECONDS = 0.5
UNSTOPPABLE = {"learn", "sync", "checkpoint"}  # weights are changing: finish, then stop
LOCAL = {"rollout", "views", "join", "evaluate"}  # no collective but those of Ranks: one rank's error can be announced to the others


class Reports(Protocol):
    """Where a process says what it is doing: status.json, or the launcher that writes it. coming: the step under way, from 1."""

    @property
    def coming(self) -> int: ...

    def phase(self, phase: str) -> None: ...

    def tick(self) -> None: ...

    def step(self, step: int) -> None: ...

    def facts(self, **facts: Any) -> None: ...

    def watch(self, name: str, read: Callable[[], Mapping[str, Any]]) -> None:
        """A fact that changes by itself: "actors" (opd.run.roles.of_actors) or "batches"; asked again and again from now on."""
        ...

    def write(self, state: str, why: str = "") -> None: ...


@dataclass(slots=True)
class PhaseClock:
    """Seconds by phase of the current step; entering a phase publishes it and honours a request to stop, on all ranks alike.

    around: entered with the name of every phase, for who wants to see them.
    """

    status: Reports
    stop: StopRequest
    ranks: Ranks = ALONE
    around: Callable[[str], AbstractContextManager[Any]] = nullcontext
    _phase: str = ""
    _seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.status.phase(phase)
        reasons = self.ranks.gather(self.stop.reason)
        self._phase = phase
        self.stop.reason = self.stop.reason or next(filter(None, reasons), "")
        if any(reasons) and self.safe:
            raise Preempted(self.stop.reason)
        started = time.perf_counter()
        try:
            with self.around(phase), self.ranks.announcing() if phase in LOCAL else nullcontext():
                yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    def check(self, *_: object) -> None:
        """Raises Preempted after a request to stop, where stopping is safe. Long phases call it before every forward pass and verdict."""
        self.status.tick()
        if self.stop.reason and self.safe and (self.ranks.count == 1 or self._phase in LOCAL):
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
    """status.json of a run in one process: state, step, phase, pid, why, and what is known besides (weight version, tokens a second, next
    action, what actors do, who waits for whom). Written at most twice a second, and at every change of state."""

    def __init__(self, path: Path, steps: int) -> None:
        self._path, self._steps, self._step, self._phase, self._written = path, steps, 0, "start", 0.0
        self._facts: dict[str, Any] = {}
        self._read: dict[str, Callable[[], Mapping[str, Any]]] = {}
        self._entered, self._turn = time.monotonic(), threading.Lock()

    def phase(self, phase: str) -> None:
        self._phase, self._entered = phase, time.monotonic()
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write("running")

    def tick(self) -> None:
        """A sign of life from a long phase, of any thread: what is watched may have changed."""
        if self._read and time.monotonic() - self._written > WRITE_SECONDS:
            self.write("running")

    def watch(self, name: str, read: Callable[[], Mapping[str, Any]]) -> None:
        self._read[name] = read

    def words(self) -> str:
        """Who waits for whom and what comes next, for the terminal; "" where nothing is watched."""
        if not self._read:
            return ""
        found = self._watched()
        return f"{found['waits']} | next: {self._facts.get('next', '')}"

    def step(self, step: int) -> None:
        self._step = step

    @property
    def coming(self) -> int:
        """The step that is under way or comes next, counted from 1."""
        return self._step + 1

    def facts(self, **facts: Any) -> None:
        self._facts |= facts

    def write(self, state: str, why: str = "") -> None:
        with self._turn:
            self._written = time.monotonic()
            facts = {**self._facts, **(self._watched() if state == "running" else {})}
            write_json(self._path, status_content(state, why, step=self._step, steps=self._steps, phase=self._phase, facts=facts))

    def _watched(self) -> dict[str, Any]:
        if not self._read:
            return {}
        found, seconds = {name: dict(read()) for name, read in self._read.items()}, time.monotonic() - self._entered
        actors, batches = found.pop("actors", {}), found.get("batches", {})
        learner = {"learner": {"state": "working", "phase": self._phase, "seconds": round(seconds, 1)}}
        return {"roles": {**learner, **actors}, **found, "waits": who_waits(self._phase, seconds, actors, batches)}


class LiveView:
    """A progress bar with rates on a terminal, a plain line now and then elsewhere, nothing when quiet."""

    def __init__(
        self,
        name: str,
        steps: int,
        *,
        quiet: bool,
        line_seconds: float = 10.0,
        console: Console | None = None,
        roles: Callable[[], str] = str,
    ) -> None:
        """roles: what the processes of the run are doing, in a few words; "" where there is only this one."""
        self._roles = roles
        self._console = console or Console(stderr=True, quiet=quiet)
        self._quiet, self._steps, self._line_seconds = quiet, steps, line_seconds
        self._started, self._first, self._last_line = time.monotonic(), 0, 0.0
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[now]}"))
        self._bar = Progress(*columns, console=self._console) if self._console.is_terminal and not quiet else None
        self._task = self._bar.add_task(name, total=steps, now="") if self._bar else None
        if self._bar:
            self._bar.start()

    def say(self, text: str) -> None:
        """On the terminal; when whoever read it has gone (`opd train ... 2>&1 | head`) the run goes on unseen: its files are the record."""
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            sys.stderr.flush()
        except (BrokenPipeError, SystemExit):  # the latter is what the console makes of the former
            self._quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def start_at(self, step: int) -> None:
        self._first, self._started = step, time.monotonic()
        if self._bar and self._task is not None:
            self._bar.reset(self._task, completed=step)

    def update(self, step: int, row: Mapping[str, float]) -> None:
        numbers = " ".join(f"{label} {row[key]:z.{digits}f}" for label, key, digits in SHOWN if key in row)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, now=_Now(numbers, self._roles))
        elif not self._quiet and (time.monotonic() - self._last_line > self._line_seconds or step == self._steps):
            self._last_line = time.monotonic()
            rate = (self._last_line - self._started) / max(step - self._first, 1)
            self.say(f"step {step}/{self._steps} {_Now(numbers, self._roles)}, about {rate * (self._steps - step):.0f} s left")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


@dataclass(frozen=True, slots=True)
class _Now:
    """Numbers of the last step and what the roles do at the moment of reading: the bar reads ten times a second."""

    numbers: str
    roles: Callable[[], str]

    def __str__(self) -> str:
        roles = self.roles()
        return f"{self.numbers} | {roles}" if roles else self.numbers


SHOWN = (
    ("loss", "loss/total", 4),
    ("accuracy", "accuracy/train", 3),
    ("dev", "eval/dev", 3),
    ("s/step", "seconds/step", 2),
    ("tok/s", "rate/tokens", 0),
)
