"""What the engine's side knows of one Ray actor, and how it is told to people."""

import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

RETRY_SECONDS = 0.3


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
    state: str = "lost"  # ready | reviving | lost | waiting (open, and without weights until the next version) | dead
    since: float = field(default_factory=time.monotonic)
    retry_at: float = 0.0
    trouble: str = "starting"  # what a replica that is not ready is in: starting | restarting | poisoned | empty
    called: str = ""  # the method that Pool.call waits for
    shown: str = ""  # its role for people, and since when
    shown_since: float = 0.0

    def becomes(self, state: str, trouble: str = "restarting") -> None:
        if self.state in ("ready", "waiting") or state in ("ready", "waiting"):
            self.since, self.trouble = time.monotonic(), trouble
        self.state = state


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """state: starting | generating | idle | updating | poisoned | restarting | empty (it waits for weights) | gone, for `seconds`; in_flight:
    requests that it has.

    pid: of its process, as it was when it last came up; 0 before.
    """

    name: str
    state: str
    seconds: float
    in_flight: int
    pid: int


def role_of(replica: Replica, in_flight: int) -> str:
    """One word for people."""
    if replica.state == "dead":
        return "gone"
    if replica.state != "ready":
        return replica.trouble
    updating = dict.fromkeys(("load", "begin_update", "transfer", "end_update"), "updating")
    return {**updating, "": "generating" if in_flight else "idle"}.get(replica.called, replica.called)


def is_final(replica: Replica) -> bool:
    """Whether Ray has given an actor up; asks the cluster, because an error says "died" also while a restart is under way."""
    try:
        ray.get(replica.handle.pid.remote(), timeout=RETRY_SECONDS)
    except ActorDiedError:
        return True
    except RayError:
        return False
    return False


def reason_of(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')[:300]}"
