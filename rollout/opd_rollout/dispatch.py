"""Work on a pool of Ray actors: leased in chunks, re-issued when an actor dies or is late, every wait with a deadline."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError

from opd_rollout.actor_states import RETRY_SECONDS, Limits, Replica, ReplicaStatus, is_final, reason_of, role_of
from opd_rollout.engine import EngineLost

LOG = logging.getLogger("opd.rollout")
POLL_SECONDS = 0.25
MAX_TRIES = 4


class ActorsLost(EngineLost):
    """No actor is left that could do the work, or the engine was closed."""


@dataclass(slots=True)
class _Flight:
    replica: Replica
    lease: int | None  # None: the replica is being revived
    started: float
    then: str = "ready"  # the state of a replica that has been revived


class Pool:
    """Runs leases on replicas. revive(handle) brings an actor, new or restarted, to where it can work, or, with the second value, only to where
    it waits for weights. refill: called where all actors wait for weights; sends them, or raises ActorsLost.

    check: called while waiting; may raise. counts: leases, reissued, stragglers, revived. Every method may be called by several threads at
    a time (one generates, one updates): what they share are the replicas' states, which change only under `lock`; nobody waits for work with it.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        limits: Limits,
        revive: Callable[[Any], tuple[Any, bool]],
        check: Callable[[], None] | None = None,
        refill: Callable[[], None] | None = None,
    ) -> None:
        self.replicas, self.limits, self._revive, self._check = list(replicas), limits, revive, check or (lambda: None)
        self.refill = refill or _give_up
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
        """Every replica ready, waiting for weights, or dead. Raises ActorsLost where all are dead, ValueError for a model that cannot be loaded."""
        with self._batch((), lambda handle, lease: None, self.replicas) as batch:
            while any(replica.state in ("lost", "reviving") for replica in self.replicas):
                self._go_on(batch)
            batch.check_alive()

    def present(self, seconds: float) -> list[Replica]:
        """Replicas that can take weights; one whose actor has died unnoticed is opened anew first where no other is left.

        Raises ActorsLost where none is.
        """
        pids = self.call("pid", seconds=seconds)
        with self.lock:
            for replica in self.replicas:
                if replica.state in ("ready", "waiting") and pids.get(replica.name, 0) != self.facts[replica.name].pid:
                    replica.becomes("lost")
        if not any(replica.state in ("ready", "waiting") for replica in self.replicas):
            self.bring_up()
        return [replica for replica in self.replicas if replica.state in ("ready", "waiting")]

    def filled(self, replicas: Sequence[Replica]) -> None:
        """These have weights now."""
        with self.lock:
            for replica in replicas:
                if replica.state == "waiting":
                    replica.becomes("ready")
            self.note()

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
            role = role_of(replica, self._requests_at(replica))
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

    def call(self, method: str, *args: Any, seconds: float) -> dict[str, Any]:
        """name -> result of one method on every replica that is up; those that fail or are late are restarted and left out."""
        with self.lock:
            up = [replica for replica in self.replicas if replica.state in ("ready", "waiting")]
            asked = [(replica, getattr(replica.handle, method).remote(*args)) for replica in up]
            for replica, _ in asked:
                replica.called = method
            self.note()
        deadline, results = time.monotonic() + seconds, dict[str, Any]()
        for replica, reference in asked:
            while True:
                self._check()
                try:
                    results[replica.name] = ray.get(reference, timeout=POLL_SECONDS)
                except GetTimeoutError:
                    if time.monotonic() < deadline:
                        continue
                    self.restart(replica, f"{method} took more than {seconds:.0f} s")
                except RayError as error:
                    self.restart(replica, f"{method} failed: {reason_of(error)}")
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
            if self._queue and all(replica.state in ("waiting", "dead") for replica in self._replicas):
                self._pool.refill()
            else:
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
            reference, is_whole = self._pool._revive(replica.handle)
            replica.becomes("reviving")
            self._flights[reference] = _Flight(replica, None, time.monotonic(), "ready" if is_whole else "waiting")

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
            flight.replica.becomes(flight.then, "empty")
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
            self._pool.restart(flight.replica, reason_of(error))

    def _lost(self, flight: _Flight, error: RayError) -> None:
        """The actor is gone; Ray starts it anew, unless it has done so too often."""
        if flight.lease is not None and flight.lease not in self._results:
            self._reissue(flight.lease, error)
        if flight.replica.state == "ready":
            LOG.warning("actor %s is gone; its work is given out again", flight.replica.name)
        self._drop(flight.replica)
        flight.replica.becomes("lost")
        flight.replica.retry_at = time.monotonic() + RETRY_SECONDS
        if isinstance(error, ActorDiedError) and is_final(flight.replica):
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
            raise RuntimeError(f"the same work failed {MAX_TRIES} times on the actors: {reason_of(error)}") from error
        self._pool.counts["reissued"] += 1
        self._queue.appendleft(lease)

    def _end_late(self) -> None:
        now, limits = time.monotonic(), self._pool.limits
        for flight in list(self._flights.values()):
            limit = limits.start_seconds if flight.lease is None else limits.work_seconds
            if now - flight.started > limit and flight in self._flights.values():
                self._drop(flight.replica)
                self._pool.restart(flight.replica, f"no result within {limit:.0f} s")


def _give_up() -> None:
    raise ActorsLost("no actor has weights")
