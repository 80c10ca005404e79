"""Worker processes that import once and do one run after another; the parent hands out work and never waits without a deadline."""

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from opd.comparison.jobs import Job, run_state
from opd.config.choices import imported

SINGLE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM")
POLL_SECONDS = 1.0
STOP_SECONDS = 120.0

RunFunction = Callable[[str, Mapping[str, Any], Path], Path]


@dataclass(frozen=True, slots=True, kw_only=True)
class Functions:
    """Who does the work, as functions a worker can import: (recipe, dotted overrides, run folder) -> run folder."""

    train: RunFunction
    evaluate: RunFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended. state: "finished", "failed" or "preempted"; `why` a sentence; `reused`: it was there already."""

    job: Job
    state: str
    why: str = ""
    seconds: float = 0.0
    reused: bool = False


class Watcher(Protocol):
    """Sees what happens; `tick` is called about once a second with the jobs now running."""

    def tick(self, running: Sequence[Job]) -> None: ...

    def done(self, outcome: Outcome) -> None: ...


def work(connection: Connection, functions: Functions, log: Path) -> None:
    """A worker's life: receive a job, run it, report; ends when the parent closes the connection or is gone."""
    with log.open("a", buffering=1, encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        while True:
            try:
                job: Job | None = connection.recv()
            except (EOFError, KeyboardInterrupt):
                return
            if job is None:
                return
            print(f"=== {job.title}: {job.folder}", flush=True)
            try:
                _function(job, functions)(job.recipe, job.overrides, job.folder)
                connection.send("")
            except KeyboardInterrupt:
                connection.send("interrupted")
            except Exception as error:  # whatever a run raises belongs to that run: the others go on
                traceback.print_exc()
                connection.send(f"{type(error).__name__}: {error}")
            sys.stderr.flush()


def _function(job: Job, functions: Functions) -> RunFunction:
    if job.by in ("", "evaluate"):
        return functions.evaluate if job.by else functions.train
    return imported(job.by, f"arm {job.arm!r}: by")


class Worker:
    """One process and the job it holds."""

    def __init__(self, functions: Functions, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, functions, log))
        self.job: Job | None = None
        self.started = 0.0
        self.process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        self.job, self.started = job, time.monotonic()
        self.connection.send(job)

    def collect(self, limit_seconds: float) -> Outcome | None:
        """The finished job's outcome, or None while it runs. A dead process or a job past its limit is an outcome too."""
        assert self.job is not None
        job, seconds = self.job, time.monotonic() - self.started
        error: str | None = None
        if self.connection.poll():
            try:
                error = self.connection.recv()
            except EOFError:
                error = None
            if error is not None:
                self.job = None
                return _judge(job, error, seconds)
        if not self.process.is_alive():
            code = self.process.exitcode
            self.job = None
            return Outcome(job=job, state="failed", why=f"its process died (exit status {code}); see logs/", seconds=seconds)
        if seconds > limit_seconds:
            self.stop(deadline=time.monotonic())
            self.job = None
            return Outcome(job=job, state="failed", why=f"longer than limit_seconds={limit_seconds:g}: ended", seconds=seconds)
        return None

    def stop(self, deadline: float) -> None:
        """Ask the process to save and end; kill it after the deadline (time.monotonic)."""
        with contextlib.suppress(OSError):  # the process may be dead already
            self.connection.send(None)
        if self.job is not None:
            self.process.terminate()
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join(10.0)
        self.connection.close()


def _judge(job: Job, error: str, seconds: float) -> Outcome:
    state, why = run_state(job.folder)
    if not error and state == "finished":
        return Outcome(job=job, state="finished", why=why, seconds=seconds)
    if state == "preempted":
        return Outcome(job=job, state="preempted", why=why, seconds=seconds)
    return Outcome(job=job, state="failed", why=error or why or f"left the run in state {state!r}", seconds=seconds)


def run_jobs(
    jobs: Sequence[Job],
    functions: Functions,
    *,
    workers: int,
    limit_seconds: float,
    logs: Path,
    watcher: Watcher,
    stopped: Callable[[], str],
) -> list[Outcome]:
    """Do every job that is not finished yet, `workers` at a time; outcomes in the order of the jobs.

    A failing job is an outcome, not an exception. `stopped` returns a reason once the user wants to stop: running jobs are then asked
    to save, and what had not ended is left out of the result.
    """
    outcomes = {n: Outcome(job=job, state="finished", reused=True) for n, job in enumerate(jobs) if run_state(job.folder)[0] == "finished"}
    for outcome in outcomes.values():
        watcher.done(outcome)
    waiting = [n for n in range(len(jobs)) if n not in outcomes]
    logs.mkdir(parents=True, exist_ok=True)
    crew: list[tuple[Worker, int]] = []
    environment = {name: os.environ.get(name) for name in SINGLE_THREAD}
    os.environ.update({name: "false" if name.startswith("TOKENIZERS") else "1" for name in SINGLE_THREAD})
    idle = [Worker(functions, logs / f"worker-{n}.log") for n in range(min(workers, len(waiting)))]
    try:
        while (waiting or crew) and not stopped():
            while waiting and len(crew) < workers:
                worker = idle.pop() if idle else Worker(functions, logs / f"worker-{len(crew)}.log")
                number = waiting.pop(0)
                worker.give(jobs[number])
                crew.append((worker, number))
            wait([handle for worker, _ in crew for handle in (worker.connection, worker.process.sentinel)], timeout=POLL_SECONDS)
            for worker, number in list(crew):
                outcome = worker.collect(limit_seconds)
                if outcome is not None:
                    outcomes[number] = outcome
                    watcher.done(outcome)
                    crew.remove((worker, number))
                    if worker.process.is_alive():
                        idle.append(worker)
            watcher.tick([jobs[number] for _, number in crew])
    finally:
        _stop_all([*idle, *(worker for worker, _ in crew)])
        for name, value in environment.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    return [outcomes[n] for n in sorted(outcomes)]


def _stop_all(workers: Sequence[Worker]) -> None:
    for worker in workers:
        if worker.job is not None and worker.process.is_alive():
            worker.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for worker in workers:
        worker.stop(deadline)
