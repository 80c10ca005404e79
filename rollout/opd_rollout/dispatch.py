"""Work on a pool of Ray actors: leased in chunks, re-issued when an actor dies or is late, every wait with a deadline."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError

LOG = logging.getLogger("opd.rollout")
POLL_SECONDS = 0.25
RETRY_SECONDS = 0.3
MAX_TRIES = 4


class ActorsLost(RuntimeError):
    """No actor is left that could do the work."""


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

    def becomes(self, state: str) -> None:
        if self.state == "ready" or state == "ready":
            self.since = time.monotonic()
        self.state = state


@dataclass(slots=True)
class _Flight:
    replica: Replica
    lease: int | None  # None: the replica is being revived
    started: float


class Pool:
    """Runs leases on replicas. revive(handle) brings an actor, new or restarted, to where it can work; None: it has to wait for weights.

    check: called while waiting; may raise. counts: leases, reissued, stragglers, revived.
    """

    def __init__(self, replicas: Sequence[Replica], limits: Limits, revive: Callable[[Any], Any], check: Callable[[], None] | None = None) -> None:
        self.replicas, self.limits, self._revive, self._check = list(replicas), limits, revive, check or (lambda: None)
        self.counts = dict.fromkeys(("leases", "reissued", "stragglers", "revived"), 0)
        self.facts: dict[str, Any] = {}

    def run(self, number: int, send: Callable[[Any, int], Any]) -> list[Any]:
        """Results of `send(handle, lease)` for lease 0 to number - 1, in order. Raises ValueError as the actor did, ActorsLost for none left."""
        batch = _Batch(self, number, send)
        while not batch.is_done():
            self._check()
            batch.step()
        return batch.in_order()

    def bring_up(self) -> None:
        """Every replica ready, or dead. Raises ActorsLost where all are, ValueError for a model that cannot be loaded."""
        batch = _Batch(self, 0, lambda handle, lease: None)
        while any(replica.state in ("lost", "reviving") for replica in self.replicas):
            self._check()
            batch.step()
        batch.check_alive()

    def restart(self, replica: Replica, why: str) -> None:
        """Kill an actor that is late or holds half-loaded weights; Ray starts it anew, empty."""
        LOG.warning("actor %s: %s; it is started anew", replica.name, why)
        try:
            ray.kill(replica.handle, no_restart=False)
        except RayError:
            pass  # gone already
        replica.becomes("lost")
        replica.retry_at = time.monotonic() + RETRY_SECONDS

    def call(self, method: str, *args: Any, seconds: float) -> list[Any]:
        """One method on every ready replica; those that fail or are late are restarted and left out of the result."""
        asked = [(replica, getattr(replica.handle, method).remote(*args)) for replica in self.replicas if replica.state == "ready"]
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
        return results


class _Batch:
    """One call of Pool.run."""

    def __init__(self, pool: Pool, number: int, send: Callable[[Any, int], Any]) -> None:
        self._pool, self._send = pool, send
        self._queue, self._tries = deque(range(number)), [0] * number
        self._results: dict[int, Any] = {}
        self._number, self._flights = number, dict[Any, _Flight]()
        self._taken: list[float] = []
        for replica in pool.replicas:
            if replica.state == "reviving":  # by a call that was interrupted
                replica.becomes("lost")
        pool.counts["leases"] += number

    def is_done(self) -> bool:
        return len(self._results) == self._number

    def in_order(self) -> list[Any]:
        return [self._results[lease] for lease in range(self._number)]

    def step(self) -> None:
        """Hand out what can be, wait a little, take in what came back."""
        self._hand_out()
        self._hand_out_twice()
        self._start_revivals()
        if self._flights:
            ready, _ = ray.wait(list(self._flights), num_returns=1, timeout=POLL_SECONDS)
            for reference in ready:
                if reference in self._flights:  # not dropped with its actor a moment ago
                    self._take_in(reference)
        else:
            self.check_alive()
            time.sleep(POLL_SECONDS)
        self._end_late()

    def check_alive(self) -> None:
        if all(replica.state == "dead" for replica in self._pool.replicas):
            raise ActorsLost(
                "every actor is gone and does not come back (see engine.restarts); run the same command again to go on from the last checkpoint"
            )

    def _load(self, replica: Replica) -> int:
        return sum(flight.replica is replica for flight in self._flights.values())

    def _hand_out(self) -> None:
        for _ in range(self._pool.limits.depth):
            for replica in self._pool.replicas:
                if self._queue and replica.state == "ready" and self._load(replica) < self._pool.limits.depth:
                    self._issue(replica, self._queue.popleft())

    def _issue(self, replica: Replica, lease: int) -> None:
        self._flights[self._send(replica.handle, lease)] = _Flight(replica, lease, time.monotonic())

    def _hand_out_twice(self) -> None:
        if self._queue or not self._taken:
            return
        patience = self._pool.limits.straggler_factor * max(median(self._taken), POLL_SECONDS)
        for replica in self._pool.replicas:
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
        for replica in self._pool.replicas:
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
