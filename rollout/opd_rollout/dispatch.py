"""Work on a pool of Ray actors: leased in chunks, re-issued when an actor dies or is late, every wait with a deadline."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError

from opd_rollout.engine import EngineLost

LOG = logging.getLogger("opd.rollout")
POLL_SECONDS = 0.25
RETRY_SECONDS = 0.3
MAX_TRIES = 4


class ActorsLost(EngineLost):
    """No actor is left that could do the work, or the engine was closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """work_seconds: of one lease. start_seconds: from an actor's death until it is back. depth: leases at one actor at a time.
    straggler_factor: a lease that takes so many times the median is given to a second actor too, where one is idle."""

    work_seconds: float = 600.0
    start_seconds: float = 600.0
    depth: int = 2
    straggler_factor: float = 4.0


@dataclass(slots=True, kw_only=True)
class Replica:
    """One actor as this process sees it."""

    name: str
    handle: Any
    state: str = "lost"  # ready | reviving | lost | dead
    since: float = field(default_factory=time.monotonic)
    retry_at: float = 0.0
    trouble: str = "starting"  # what a replica that is not ready is in: starting | restarting | poisoned
    called: str = ""  # the method that Pool.call waits for
    shown: str = ""  # its role for people, and since when
    shown_since: float = 0.0

    def becomes(self, state: str, trouble: str = "restarting") -> None:
        if self.state == "ready" or state == "ready":
            self.since, self.trouble = time.monotonic(), trouble
        self.state = state


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """state: starting | generating | idle | updating | poisoned | restarting | gone, for `seconds`; in_flight: requests that it has.

    pid: of its process, as it was when it last came up; 0 before.
    """

    name: str
    state: str
    seconds: float
    in_flight: int
    pid: int


@dataclass(slots=True)
class _Flight:
    replica: Replica
    lease: int | None  # None: the replica is being revived
    started: float


class Pool:
    """Runs leases on replicas. revive(handle) brings an actor, new or restarted, to where it can work; None: it has to wait for weights.

    check: called while waiting; may raise. counts: leases, reissued, stragglers, revived. Every method may be called by several threads at
    a time (one generates, one updates): what they share are the replicas' states, which change only under `lock`; nobody waits for work with it.
    """

    def __init__(self, replicas: Sequence[Replica], limits: Limits, revive: Callable[[Any], Any], check: Callable[[], None] | None = None) -> None:
        self.replicas, self.limits, self._revive, self._check = list(replicas), limits, revive, check or (lambda: None)
        self.counts = dict.fromkeys(("leases", "reissued", "stragglers", "revived"), 0)
        self.facts: dict[str, Any] = {}
        self.lock, self._batches, self._closed = threading.RLock(), list[_Batch](), False

    def run(self, sizes: Sequence[int], send: Callable[[Any, int], Any], at: Replica | None = None) -> list[Any]:
        """Results of `send(handle, lease)` for a lease of every size (in requests), in order; all from one replica if `at` names it.

        Raises ValueError as the actor did, ActorsLost for none left.
        """
        with self._batch(sizes, send, [at] if at else self.replicas) as batch:
            while not batch.is_done():
                self._go_on(batch)
            return batch.in_order()

    def bring_up(self) -> None:
        """Every replica ready, or dead. Raises ActorsLost where all are, ValueError for a model that cannot be loaded."""
        with self._batch((), lambda handle, lease: None, self.replicas) as batch:
            while any(replica.state in ("lost", "reviving") for replica in self.replicas):
                self._go_on(batch)
            batch.check_alive()

    def close(self) -> None:
        """Whoever waits in another thread raises ActorsLost."""
        self._closed = True

    def status(self) -> tuple[int, list[ReplicaStatus]]:
        """Requests that wait for an actor, and what every actor does."""
        with self.lock:
            self.note()
            now = time.monotonic()
            shown = [
                ReplicaStatus(
                    name=r.name, state=r.shown, seconds=round(now - r.shown_since, 1), in_flight=self._requests_at(r),
                    pid=self.facts[r.name].pid if r.name in self.facts else 0,
                )
                for r in self.replicas
            ]
            return sum(batch.requests_waiting() for batch in self._batches), shown

    def note(self) -> None:
        """Takes down what the replicas do from now on."""
        for replica in self.replicas:
            role = _role(replica, self._requests_at(replica))
            if role != replica.shown:
                replica.shown, replica.shown_since = role, time.monotonic()

    def _requests_at(self, replica: Replica) -> int:
        return sum(batch.requests_at(replica) for batch in self._batches)

    def restart(self, replica: Replica, why: str, trouble: str = "restarting") -> None:
        """Kill an actor that is late or holds half-loaded weights; Ray starts it anew, empty."""
        LOG.warning("actor %s: %s; it is started anew", replica.name, why)
        with self.lock:
            try:
                ray.kill(replica.handle, no_restart=False)
            except RayError:
                pass  # gone already
            replica.becomes("lost", trouble)
            replica.retry_at = time.monotonic() + RETRY_SECONDS

    def call(self, method: str, *args: Any, seconds: float) -> list[Any]:
        """One method on every ready replica; those that fail or are late are restarted and left out of the result."""
        with self.lock:
            asked = [(replica, getattr(replica.handle, method).remote(*args)) for replica in self.replicas if replica.state == "ready"]
            for replica, _ in asked:
                replica.called = method
            self.note()
        deadline, results = time.monotonic() + seconds, []
        for replica, reference in asked:
            while True:
                self._check()
                try:
                    results.append(ray.get(reference, timeout=POLL_SECONDS))
                except GetTimeoutError:
                    if time.monotonic() < deadline:
                        continue
                    self.restart(replica, f"{method} took more than {seconds:.0f} s")
                except RayError as error:
                    self.restart(replica, f"{method} failed: {_reason(error)}")
                break
            with self.lock:
                replica.called = ""
                self.note()
        return results

    @contextmanager
    def _batch(self, sizes: Sequence[int], send: Callable[[Any, int], Any], replicas: Sequence[Replica]) -> "Iterator[_Batch]":
        batch = _Batch(self, sizes, send, replicas)
        with self.lock:
            self._batches.append(batch)
            self.counts["leases"] += len(sizes)
        try:
            yield batch
        finally:
            with self.lock:
                self._batches.remove(batch)
                batch.let_go()

    def _go_on(self, batch: "_Batch") -> None:
        self._check()
        if self._closed:
            raise ActorsLost("the engine is closed")
        batch.step()


class _Batch:
    """One call of Pool.run."""

    def __init__(self, pool: Pool, sizes: Sequence[int], send: Callable[[Any, int], Any], replicas: Sequence[Replica]) -> None:
        self._pool, self._send, self._sizes, self._replicas = pool, send, tuple(sizes), replicas
        self._queue, self._tries = deque(range(len(sizes))), [0] * len(sizes)
        self._results: dict[int, Any] = {}
        self._flights: dict[Any, _Flight] = {}
        self._taken: list[float] = []

    def is_done(self) -> bool:
        return len(self._results) == len(self._sizes)

    def in_order(self) -> list[Any]:
        return [self._results[lease] for lease in range(len(self._sizes))]

    def requests_waiting(self) -> int:
        return sum(self._sizes[lease] for lease in self._queue)

    def requests_at(self, replica: Replica) -> int:
        held = {flight.lease for flight in self._flights.values() if flight.replica is replica}
        return sum(self._sizes[lease] for lease in held if lease is not None)

    def let_go(self) -> None:
        """Replicas that this batch was reviving are anybody's again; their actors take a second call of `revive` for the first."""
        for flight in self._flights.values():
            if flight.lease is None and flight.replica.state == "reviving":
                flight.replica.becomes("lost")

    def step(self) -> None:
        """Hand out what can be, wait a little, take in what came back."""
        with self._pool.lock:
            self._hand_out()
            self._hand_out_twice()
            self._start_revivals()
            self._pool.note()
            waiting = list(self._flights)
        if waiting:
            ready, _ = ray.wait(waiting, num_returns=1, timeout=POLL_SECONDS)
        else:
            self.check_alive()
            ready = []
            time.sleep(POLL_SECONDS)
        with self._pool.lock:
            for reference in ready:
                if reference in self._flights:  # not dropped with its actor a moment ago
                    self._take_in(reference)
            self._end_late()
            self._pool.note()

    def check_alive(self) -> None:
        if all(replica.state == "dead" for replica in self._replicas):
            raise ActorsLost(
                "every actor is gone and does not come back (Ray has died, or see engine.restarts); run the same command again to go on from "
                "the last checkpoint"
            )

    def _load(self, replica: Replica) -> int:
        return sum(flight.replica is replica for flight in self._flights.values())

    def _hand_out(self) -> None:
        for _ in range(self._pool.limits.depth):
            for replica in self._replicas:
                if self._queue and replica.state == "ready" and self._load(replica) < self._pool.limits.depth:
                    self._issue(replica, self._queue.popleft())

    def _issue(self, replica: Replica, lease: int) -> None:
        self._flights[self._send(replica.handle, lease)] = _Flight(replica, lease, time.monotonic())

    def _hand_out_twice(self) -> None:
        if self._queue or not self._taken:
            return
        patience = self._pool.limits.straggler_factor * max(median(self._taken), POLL_SECONDS)
        for replica in self._replicas:
            if replica.state != "ready" or self._load(replica):
                continue
            holders: dict[int, list[_Flight]] = {}
            for flight in self._flights.values():
                if flight.lease is not None and flight.lease not in self._results:
                    holders.setdefault(flight.lease, []).append(flight)
            late = [flights[0] for flights in holders.values() if len(flights) == 1 and time.monotonic() - flights[0].started > patience]
            if late:
                oldest = min(late, key=lambda flight: flight.started)
                assert oldest.lease is not None
                self._pool.counts["stragglers"] += 1
                self._issue(replica, oldest.lease)

    def _start_revivals(self) -> None:
        for replica in self._replicas:
            if replica.state != "lost" or time.monotonic() < replica.retry_at:
                continue
            if time.monotonic() - replica.since > self._pool.limits.start_seconds:
                LOG.warning("actor %s did not come back within %.0f s; going on without it", replica.name, self._pool.limits.start_seconds)
                replica.becomes("dead")
                continue
            reference = self._pool._revive(replica.handle)
            if reference is None:
                replica.becomes("dead")
                continue
            replica.becomes("reviving")
            self._flights[reference] = _Flight(replica, None, time.monotonic())

    def _take_in(self, reference: Any) -> None:
        flight = self._flights.pop(reference)
        try:
            value = ray.get(reference, timeout=0)
        except RayTaskError as error:
            self._failed(flight, error)
        except RayError as error:
            self._lost(flight, error)
        else:
            self._arrived(flight, value)

    def _arrived(self, flight: _Flight, value: Any) -> None:
        if flight.lease is None:
            flight.replica.becomes("ready")
            self._pool.counts["revived"] += 1
            self._pool.facts[flight.replica.name] = value
        elif flight.lease not in self._results:  # the other holder of a lease may have been faster
            self._results[flight.lease] = value
            self._taken.append(time.monotonic() - flight.started)

    def _failed(self, flight: _Flight, error: RayTaskError) -> None:
        """The actor lives and its method raised."""
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from error
        if flight.lease is not None and flight.lease not in self._results:
            self._reissue(flight.lease, error)
        if type(error.cause).__name__ == "OtherWeights":
            flight.replica.becomes("lost")  # and revived with the right ones
        elif flight.replica.state in ("ready", "reviving"):
            self._drop(flight.replica)
            self._pool.restart(flight.replica, _reason(error))

    def _lost(self, flight: _Flight, error: RayError) -> None:
        """The actor is gone; Ray starts it anew, unless it has done so too often."""
        if flight.lease is not None and flight.lease not in self._results:
            self._reissue(flight.lease, error)
        if flight.replica.state == "ready":
            LOG.warning("actor %s is gone; its work is given out again", flight.replica.name)
        self._drop(flight.replica)
        flight.replica.becomes("lost")
        flight.replica.retry_at = time.monotonic() + RETRY_SECONDS
        if isinstance(error, ActorDiedError) and _is_final(flight.replica):
            flight.replica.becomes("dead")

    def _drop(self, replica: Replica) -> None:
        for reference, flight in list(self._flights.items()):
            if flight.replica is replica:
                del self._flights[reference]
                if flight.lease is not None and flight.lease not in self._results:
                    self._reissue(flight.lease, None)

    def _reissue(self, lease: int, error: Exception | None) -> None:
        if lease in self._queue or any(flight.lease == lease for flight in self._flights.values()):
            return
        self._tries[lease] += 1
        if self._tries[lease] > MAX_TRIES and error is not None:
            raise RuntimeError(f"the same work failed {MAX_TRIES} times on the actors: {_reason(error)}") from error
        self._pool.counts["reissued"] += 1
        self._queue.appendleft(lease)

    def _end_late(self) -> None:
        now, limits = time.monotonic(), self._pool.limits
        for flight in list(self._flights.values()):
            limit = limits.start_seconds if flight.lease is None else limits.work_seconds
            if now - flight.started > limit and flight in self._flights.values():
                self._drop(flight.replica)
                self._pool.restart(flight.replica, f"no result within {limit:.0f} s")


def _role(replica: Replica, in_flight: int) -> str:
    """One word for people."""
    if replica.state == "dead":
        return "gone"
    if replica.state != "ready":
        return replica.trouble
    updating = dict.fromkeys(("load", "begin_update", "transfer", "end_update"), "updating")
    return {**updating, "": "generating" if in_flight else "idle"}.get(replica.called, replica.called)


def _is_final(replica: Replica) -> bool:
    """Whether Ray has given an actor up; asks the cluster, because an error says "died" also while a restart is under way."""
    try:
        ray.get(replica.handle.pid.remote(), timeout=RETRY_SECONDS)
    except ActorDiedError:
        return True
    except RayError:
        return False
    return False


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')[:300]}"
