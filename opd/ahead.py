"""Answers for coming steps, collected in a thread while the learner works on the present one."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from opd.errors import Preempted
from opd.launcher.ranks import ALONE, Ranks
from opd.loop import RolloutSource
from opd.replaying.bundle import pack, unpack
from opd.types import Judged, Meter

POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step's answers and what they were like. after: the source's state once they were there. seconds: that they took."""

    judged: Sequence[Judged]
    meters: Mapping[str, Meter]
    after: Mapping[str, Any]
    seconds: float


class Ahead:
    """Implements opd.loop.RolloutSource over another one; steps are collected in the order in which they were begun, one at a time.

    The source's cursor runs ahead of the learner: `state` holds the answers that are finished and not yet used, beside the cursor after
    them. What was still being written is begun again after a resume. check: called while waiting; may raise to end the wait. ranks: each
    collects its part of every step; the source exchanges values over `ranks.beside`.
    """

    def __init__(self, source: RolloutSource, check: Callable[[], None] = lambda: None, ranks: Ranks = ALONE) -> None:
        self._source, self._check, self._ranks = source, check, ranks
        self._pool = ThreadPoolExecutor(1, "rollouts")
        self._begun: dict[int, Future[Batch]] = {}
        self._after: Mapping[str, Any] = source.state()
        self._meters: dict[str, Meter] = {}
        self._plain: dict[int, Any] = {}
        self.loaded = -1  # version of the weights that the student was given last
        self.seconds = 0.0  # that the answers given out last took to write

    def begin(self, step: int, last: Mapping[str, float]) -> None:
        """Collect a step in the background, with what is known now; nothing for one that was begun already."""
        if step not in self._begun:
            self._begun[step] = self._pool.submit(self._work, step, dict(last))

    def ready(self, step: int) -> None:
        """Wait until the step's answers are there, if they were begun."""
        if step in self._begun:
            self._wait([self._begun[step]])

    def settle(self) -> None:
        """Wait until nothing is in flight."""
        self._wait(list(self._begun.values()))

    def collect(self, step: int, last: Mapping[str, float]) -> list[Judged]:
        """The step's answers, begun now where they were not; each is given out once. Raises what collecting them raised."""
        self.begin(step, last)
        self._wait([self._begun[step]])
        batch = self._begun.pop(step).result()
        self._plain.pop(step, None)
        self._after, self._meters, self.seconds = batch.after, dict(batch.meters), batch.seconds
        return list(batch.judged)

    def collect_fresh(self, step: int, last: Mapping[str, float], version: int, max_staleness: int) -> list[Judged]:
        """The step's answers without groups that are too old for a learner at `version`; others are drawn where none is left."""
        judged, dropped = self.collect(step, last), 0
        while not any(self._ranks.gather(bool(fresh := fresh_groups(judged, version, max_staleness)))):
            dropped += num_groups(judged)
            judged = self.collect(step, last)
        dropped += num_groups(judged) - num_groups(fresh)
        self._meters |= {**staleness_meters(fresh, version), "staleness/dropped_groups": Meter(sum=float(dropped), count=1.0)}
        return fresh

    def meters(self) -> Mapping[str, Meter]:
        """Of the answers given out last."""
        return self._meters

    def state(self) -> dict[str, Any]:
        """Plain values: finished answers in the order of their steps, and the source's state after them."""
        finished = {}
        for step, future in self._begun.items():
            if not future.done() or future.exception() is not None:
                break  # the thread works in order: nothing behind it is done
            finished[step] = future.result()
        after = list(finished.values())[-1].after if finished else self._after
        self._plain |= {step: to_plain(batch) for step, batch in finished.items() if step not in self._plain}
        return {"taken": self._after, "source": after, "unused": [[step, self._plain[step]] for step in finished]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError while something is in flight."""
        if self._begun:
            raise ValueError("answers are in flight; load a state before the first step is begun")
        self._source.load_state(state["source"])
        self._after = state["taken"]
        for step, plain in state["unused"]:
            self._begun[step] = done = Future()
            done.set_result(from_plain(plain))

    def batches(self) -> dict[str, int]:
        """Steps whose answers are finished and wait for the learner, and those that are begun."""
        done = [future.done() for future in list(self._begun.values())]
        return {"finished": sum(done), "begun": len(done) - sum(done)}

    def close(self) -> None:
        """Ends the thread; close the engine first, which ends what it waits for."""
        self._pool.shutdown(wait=self._ranks.count == 1, cancel_futures=True)  # it may wait for a rank that has ended

    def _work(self, step: int, last: Mapping[str, float]) -> Batch:
        started = time.perf_counter()
        try:
            judged = self._source.collect(step, last)
        except Exception as error:  # so that no rank waits for the answers of one that has none
            self._ranks.beside.announce(error if isinstance(error, Preempted | ValueError) else Preempted(f"{type(error).__name__}: {error}"))
            raise
        seconds = time.perf_counter() - started
        return Batch(judged=tuple(judged), meters=dict(self._source.meters()), after=self._source.state(), seconds=seconds)

    def _wait(self, futures: Sequence[Future[Batch]]) -> None:
        while wait(futures, timeout=POLL_SECONDS).not_done:  # the engine and the verifiers have deadlines of their own
            self._check()


def agreed(states: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every rank's `state`, cut to the steps that all of them have finished; other sources' states as they are."""
    if "unused" not in states[0]:
        return list(states)
    common = min(len(state["unused"]) for state in states)
    return [{**s, "source": s["unused"][common - 1][1]["after"] if common else s["taken"], "unused": s["unused"][:common]} for s in states]


def of_rank(states: Sequence[Mapping[str, Any]], rank: int, count: int) -> Mapping[str, Any]:
    """A rank's state; with another number of ranks than there were, unused answers are written anew."""
    if len(states) == count or "unused" not in states[0]:
        return states[rank % len(states)]
    return {**states[0], "source": states[0]["taken"], "unused": []}


def fresh_groups(judged: Sequence[Judged], version: int, max_staleness: int) -> list[Judged]:
    """The answers, numbered anew, of groups of which no token is older than `max_staleness` versions, or from weights that were taken back."""
    stale = {item.group for item in judged for drawn, _, _ in item.completion.versions if not 0 <= version - drawn <= max_staleness}
    numbers: dict[int, int] = {}
    return [replace(item, group=numbers.setdefault(item.group, len(numbers))) for item in judged if item.group not in stale]


def num_groups(judged: Sequence[Judged]) -> int:
    return len({item.group for item in judged})


def staleness_meters(judged: Sequence[Judged], version: int) -> dict[str, Meter]:
    """Mean age of the tokens and share of answers that more than one version wrote; ages in versions of the learner."""
    written = [item.completion.versions for item in judged if item.completion.versions]
    if not written:
        return {}
    ages = [(version - drawn, end - start) for spans in written for drawn, start, end in spans]
    mixed = sum(len(spans) > 1 for spans in written)
    return {
        "staleness/mean": Meter(sum=float(sum(age * length for age, length in ages)), count=float(sum(length for _, length in ages))),
        "staleness/mixed": Meter(sum=float(mixed), count=float(len(written))),
    }


def to_plain(batch: Batch) -> dict[str, Any]:
    """JSON values, bit for bit."""
    return {**pack([batch.judged, batch.meters]), "after": batch.after, "seconds": batch.seconds}


def from_plain(plain: Mapping[str, Any]) -> Batch:
    """What `to_plain` was given."""
    judged, meters = unpack(plain)
    return Batch(judged=judged, meters=meters, after=plain["after"], seconds=plain["seconds"])
