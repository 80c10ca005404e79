"""What the launcher knows of its ranks: their messages, who waits for whom, who stalled, how they ended; status.json."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd.config.recipe import Recipe
from opd.launcher.sweep import state_of
from opd.run.folder import status_content, write_json
from opd.run.roles import who_waits

RANK_FACTS = {"phase", "step", "waiting", "exchanges"}  # the others are facts of the run
WRITE_SECONDS = 0.5
SHOWN_LOG_LINES = 12


@dataclass(slots=True)
class Child:
    """A rank's process and what it said last. outcome: (kind, text), kind "" while it says none."""

    rank: int
    process: subprocess.Popen[bytes]
    link: socket.socket
    log: Path | None
    facts: dict[str, Any] = field(default_factory=dict)
    outcome: tuple[str, str] = ("", "")
    heard: float = field(default_factory=time.monotonic)
    entered: float = field(default_factory=time.monotonic)
    rest: bytes = b""
    closed: bool = False

    def tell(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # gone, or too busy to hear
            self.link.sendall((json.dumps(message) + "\n").encode())

    def hear(self) -> None:
        """Take in what has arrived."""
        try:
            received = self.link.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self.closed = True
            return
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + received).split(b"\n")
        for line in filter(None, lines):
            message = json.loads(line)
            if "phase" in message:
                self.entered = self.heard
            self.outcome = tuple(message.pop("outcome", self.outcome))
            self.facts |= message

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def state(self) -> str:
        """working, waiting (for other ranks), stopped (by a signal), or ended."""
        if self.process.poll() is not None:
            return "ended"
        if state_of(Path(f"/proc/{self.process.pid}")) in ("T", "t"):
            return "stopped"
        return "waiting" if self.facts.get("waiting") else "working"

    @property
    def place(self) -> str:
        """Phase and step, as a reader would say it."""
        step = self.facts.get("step")
        return str(self.facts.get("phase", "start")) + ("" if step is None else f" of step {step + 1}")

    def last_words(self) -> str:
        """The end of its log, for a rank that died without a word of its own."""
        if self.log is None or not self.log.is_file():
            return ""
        lines = self.log.read_text(errors="replace").strip().splitlines()[-SHOWN_LOG_LINES:]
        return "".join(f"\n  {line}" for line in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How an attempt ended. kind: finished, preempted, paused, input, skipped, failed, lost; restartable: the next one may fare better.

    caused: by the end of another rank, which explains it.
    """

    kind: str
    text: str = ""
    restartable: bool = False
    caused: bool = False


def read_messages(children: Sequence[Child], seconds: float) -> None:
    """Wait up to `seconds` for messages and take them all in."""
    links = {child.link: child for child in children if not child.closed}
    if not links:
        time.sleep(seconds)
        return
    ready, _, _ = select.select(list(links), [], [], seconds)
    while ready:
        for link in ready:
            links[link].hear()
        ready, _, _ = select.select([link for link, child in links.items() if not child.closed], [], [], 0.0)


def verdict(children: Sequence[Child], asked: int) -> End:
    """What the ranks' ends mean together: a rank that was killed explains the others' errors, not the other way round."""
    outcomes = {child.rank: child.outcome for child in children}
    kinds = [kind for kind, _ in outcomes.values()]
    for kind in ("input", "skipped", "paused"):
        if kind in kinds:
            return End(kind=kind, text=next(text for found, text in outcomes.values() if found == kind))
    silent = [child for child in children if not child.outcome[0] and child.process.poll() is not None]
    if asked and ("preempted" in kinds or "interrupted" in kinds or silent):
        return preempted(asked)
    if silent:
        child = min(silent, key=lambda one: one.process.returncode)  # killed by a signal before anything else
        return End(kind="lost", text=f"rank {child.rank} {_death(child)} in phase {child.place}{child.last_words()}", restartable=True)
    if "failed" in kinds:
        rank, text = next((rank, text) for rank, (kind, text) in outcomes.items() if kind == "failed")
        child = next(child for child in children if child.rank == rank)
        return End(kind="failed", text=f"rank {rank} failed in phase {child.place}: {text}{child.last_words()}")
    if "lost" in kinds:
        rank, text = next((rank, text) for rank, (kind, text) in outcomes.items() if kind == "lost")
        return End(kind="lost", text=f"rank {rank} lost another rank: {text.splitlines()[0]}", restartable=True, caused=True)
    if "preempted" in kinds:
        return End(kind="preempted", text=next(text for kind, text in outcomes.values() if kind == "preempted"))
    if set(kinds) == {"finished"}:
        return End(kind="finished", text=outcomes[min(outcomes)][1])
    return End(kind="failed", text="; ".join(f"rank {child.rank}: {child.outcome[0] or child.state}" for child in children))


def preempted(asked: int) -> End:
    """The end that signal `asked` wished for."""
    return End(kind="preempted", text="interrupted (Ctrl-C)" if asked == signal.SIGINT else f"preempted ({signal.Signals(asked).name})")


def _death(child: Child) -> str:
    code = child.process.returncode
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code} without a word"


class Board:
    """The run's status for people and scripts: status.json (machine 0 alone), and a line for the terminal that rank 0 owns."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self._folder, self._steps, self._leads = folder, recipe.steps, recipe.launch.node_rank == 0
        self.restarts, self._saved, self._seen_saved, self._written = 0, -1, -1, 0.0
        self._facts: dict[str, Any] = {}
        self._step, self._phase = 0, "start"

    def saved_anew(self) -> bool:
        """Whether a checkpoint was written since the last time of asking."""
        before, self._seen_saved = self._seen_saved, self._saved
        return self._saved > before

    def show(self, children: Sequence[Child], stopping: bool) -> None:
        """Take in the ranks' facts, and publish twice a second."""
        leader = children[0]
        self._facts |= {name: value for name, value in leader.facts.items() if name not in RANK_FACTS}
        self._saved = max(self._saved, int(self._facts.get("saved", -1)))
        self._step, self._phase = int(leader.facts.get("step") or self._step), str(leader.facts.get("phase", "start"))
        if time.monotonic() - self._written < WRITE_SECONDS:
            return
        self._written = time.monotonic()
        leader.tell(shown=f"{self._waits(children)} | next: {self._facts.get('next', '')}")
        if self._folder.is_dir():
            self._write("running", "asked to stop" if stopping else "", children)

    def finish(self, end: End) -> None:
        """The last word in status.json; nothing for a run that never began."""
        if self._folder.is_dir() and (self._folder / "resolved.json").is_file():
            state = end.kind if end.kind in ("finished", "preempted", "paused") else "failed"
            self._write(state, end.text, ())

    def stalled(self, children: Sequence[Child], deadline_seconds: float) -> End | None:
        """An End where a rank has shown no sign of life for too long; names the rank that the others wait for."""
        alive, now = [child for child in children if child.process.poll() is None], time.monotonic()
        if not any(now - child.heard > deadline_seconds for child in alive):
            return None
        late = behind(alive) or alive
        named = " and ".join(f"rank {child.rank} in phase {child.place} ({child.state}, silent for {now - child.heard:.0f} s)" for child in late)
        others = [child for child in alive if child not in late]
        waiting = "".join(f", rank {child.rank} waits in phase {child.place}" for child in others)
        limit = f"launch.deadline_seconds={deadline_seconds:g}"
        return End(kind="lost", text=f"stalled: {named}{waiting} ({limit})", restartable=True)

    def _write(self, state: str, why: str, children: Sequence[Child]) -> None:
        if not self._leads:
            return
        facts = {name: value for name, value in self._facts.items() if name != "actors"}
        actors = self._facts.get("actors", {}) if children else {}
        facts |= {"restarts": self.restarts, "roles": {**roles(children), **actors}, "waits": self._waits(children)}
        content = status_content(state, why, step=self._step, steps=self._steps, phase=self._phase, facts=facts)
        write_json(self._folder / "status.json", content)


    def _waits(self, children: Sequence[Child]) -> str:
        """Ranks among each other, then rank 0 and its actors."""
        if not children:
            return ""
        entered, phase = time.monotonic() - children[0].entered, str(children[0].facts.get("phase", "start"))
        beside = who_waits(phase, entered, self._facts.get("actors", {}), self._facts.get("batches", {}))
        return "; ".join(filter(None, (in_words(children), beside)))


def behind(children: Sequence[Child]) -> list[Child]:
    """The ranks that the others wait for: those with fewer exchanges, else the stopped ones, else those that do not wait; none where all do."""
    counts = [child.facts.get("exchanges", 0) for child in children]
    states = [child.state for child in children]
    for late in ([count < max(counts, default=0) for count in counts], [s == "stopped" for s in states], [s != "waiting" for s in states]):
        if any(late) and not all(late):
            return [child for child, is_late in zip(children, late, strict=True) if is_late]
    return []


def roles(children: Sequence[Child]) -> Mapping[str, Any]:
    """Each process's state, phase, step and how long it has been in that phase, seconds."""
    now = time.monotonic()
    return {
        f"rank {child.rank}": {
            "state": child.state,
            "phase": child.facts.get("phase", "start"),
            "step": child.facts.get("step", 0),
            "seconds": round(now - child.entered, 1),
            "pid": child.process.pid,
        }
        for child in children
    }


def in_words(children: Sequence[Child]) -> str:
    """Who waits for whom, or what all do, in a few words."""
    if not children:
        return ""
    late, now = behind(children), time.monotonic()
    if late:
        named = ", ".join(f"rank {child.rank} ({child.facts.get('phase', 'start')} {now - child.entered:.1f} s)" for child in late)
        return f"waiting for {named}"
    phases = dict.fromkeys(str(child.facts.get("phase", "start")) for child in children)
    return f"{len(children)} rank{'s' if len(children) > 1 else ''}: {', '.join(phases)}"
