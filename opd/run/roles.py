"""What the roles of a run are doing, in words and in records for status.json: the learner, actors, teachers, and what waits between them."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

RESTING = ("idle", "gone")
ASKING = ("rollout", "sync", "teacher", "evaluate")  # phases in which the learner may wait for an actor


class ActorStatus(Protocol):
    """What an engine says of one of its actors."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def seconds(self) -> float: ...

    @property
    def in_flight(self) -> int: ...

    @property
    def pid(self) -> int: ...


def of_actors(engines: Iterable[tuple[int, Iterable[ActorStatus]]]) -> dict[str, dict[str, Any]]:
    """Name -> state, seconds in that state and requests in flight; `waiting` (of all actors of its engine): requests that none has yet."""
    return {
        actor.name: {"state": actor.state, "seconds": actor.seconds, "in_flight": actor.in_flight, "waiting": waiting, "pid": actor.pid}
        for waiting, actors in engines
        for actor in actors
    }


def who_waits(phase: str, seconds: float, actors: Mapping[str, Mapping[str, Any]], batches: Mapping[str, int]) -> str:
    """Who waits for whom, in a few words; "" where there are no actors and nothing is written ahead.

    seconds: since the learner entered its phase. batches: finished (wait for the learner) and begun (are being written).
    """
    busy = [f"{name} ({actor['state']} {actor['seconds']:.1f} s)" for name, actor in actors.items() if actor["state"] not in RESTING]
    idle = [f"{name} (idle {actor['seconds']:.1f} s)" for name, actor in actors.items() if actor["state"] == "idle"]
    words = []
    if phase in ASKING and busy:
        words.append(f"learner ({phase} {seconds:.1f} s) waits for {', '.join(busy)}")
    elif idle and phase not in ASKING:
        words.append(f"{', '.join(idle)} {'waits' if len(idle) == 1 else 'wait'} for learner ({phase} {seconds:.1f} s)")
    elif actors:
        words.append(f"learner ({phase} {seconds:.1f} s) beside {', '.join(busy)}" if busy else f"learner ({phase} {seconds:.1f} s)")
    if batches:
        words.append(f"{batches['finished']} finished batches wait for the learner, {batches['begun']} begun")
    return "; ".join(words)
