"""Answers of earlier steps, given out again while they are fresh enough.

A group of answers to one prompt stays together, with its verdicts, its behaviour log-probs and the versions of the weights that drew it, so
credit within groups and importance ratios mean the same as when it was new.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from opd.config.choices import resolve
from opd.objective.schedules import SCHEDULES
from opd.objective.terms import Schedule, scheduled_value
from opd.replaying.bundle import pack, unpack
from opd.types import Judged, Meter

DATASET, VIEW, REPLAY = "dataset", "view", "replay"
"""Who wrote an answer (Completion.source), where it is not the student in this step under its own prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """size: groups that are kept, the oldest leave first. max_age: rollout steps after which a group is not given out any more.

    fresh: probability that an answer of the student is written anew; schedule gives it at every step. least: groups that must be there before
    any is given out.
    """

    size: int
    max_age: int
    fresh: float = 0.5
    schedule: Schedule | None = None
    least: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    made: int
    group: tuple[Judged, ...]
    plain: Mapping[str, Any] | None = None


class ReplayBuffer:
    """First in, first out. Nothing depends on wall-clock time: what a step gets follows from seed, step, rank and what was put in."""

    def __init__(self, settings: ReplaySettings, *, seed: int, rank: int = 0) -> None:
        self.settings, self._seed, self._rank = settings, seed, rank
        self._kept: list[_Kept] = []
        self._meters: dict[str, Meter] = {}

    def draw(self, step: int, slots: int, student_share: float, metrics: Mapping[str, float]) -> tuple[list[list[Judged]], float]:
        """(groups for some of a step's `slots`, the share of the student among the prompts of the other slots).

        Each slot is the buffer's with probability student_share x (1 - fresh), while there are groups of an age between 1 and `max_age` steps,
        none twice in a step. With the returned share the student writes student_share x fresh of all slots anew.
        """
        settings, found = self.settings, dict[str, float]()
        fresh = settings.fresh
        if settings.schedule is not None:
            fresh = min(max(scheduled_value(settings.schedule, "rollout.replay", step, metrics, found), 0.0), 1.0)
        usable = [kept for kept in self._kept if 1 <= step - kept.made <= settings.max_age]
        ready = len(usable) > 0 and len(self._kept) >= settings.least
        chance = student_share * (1.0 - fresh) if ready else 0.0
        wanted = sum(_coin(f"replay/{self._seed}/{step}/{self._rank}/{slot}") < chance for slot in range(slots))
        chosen = Random(f"replay/{self._seed}/{step}/{self._rank}").sample(usable, min(wanted, len(usable)))
        ages = [float(step - kept.made) for kept in chosen]
        self._meters = {name: Meter(sum=value, count=1.0) for name, value in found.items()}
        self._meters["replay/share"] = Meter(sum=float(len(chosen)), count=float(slots))
        self._meters["replay/kept_groups"] = Meter(sum=float(len(self._kept)), count=1.0)
        if ages:
            self._meters["replay/age_steps"] = Meter(sum=sum(ages), count=float(len(ages)))
        share = student_share if chance == 0.0 else 1.0 if chance == 1.0 else min(1.0, student_share * fresh / (1.0 - chance))
        return [[_again(answer) for answer in kept.group] for kept in chosen], share

    def add(self, step: int, groups: Sequence[Sequence[Judged]]) -> None:
        """Keep those of a step's new groups of which the student wrote something under its own prompt."""
        for members in groups:
            if any(one.completion.source not in (DATASET, VIEW) for one in members):
                self._kept.append(_Kept(made=step, group=tuple(members)))
        self._kept = [kept for kept in self._kept if 0 <= step - kept.made < self.settings.max_age][-self.settings.size :]

    def meters(self) -> Mapping[str, Meter]:
        """Of the last draw: share of slots that got kept groups, their mean age in steps, groups in the buffer."""
        return self._meters

    def state(self) -> list[Any]:
        """Plain values from which `load_state` continues bit for bit."""
        self._kept = [kept if kept.plain is not None else replace(kept, plain=pack(kept.group)) for kept in self._kept]
        return [[kept.made, kept.plain] for kept in self._kept]

    def load_state(self, state: Sequence[Any]) -> None:
        """Continue where `state` was taken."""
        self._kept = [_Kept(made=made, group=unpack(plain), plain=plain) for made, plain in state]


def _again(answer: Judged) -> Judged:
    if answer.completion.source == DATASET:  # the last member of a paired group
        return answer
    return replace(answer, completion=replace(answer.completion, source=REPLAY))


def _coin(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") * 2.0**-64


def parse_replay(*, size: int, max_age: int, fresh: Any, least: int) -> ReplaySettings:
    """The settings that a recipe gives; `fresh` is a number between 0 and 1 or a schedule. Raises ValueError for anything else."""
    if isinstance(fresh, Mapping):
        schedule = resolve(fresh, SCHEDULES, "rollout.replay.fresh")
        return ReplaySettings(size=size, max_age=max_age, schedule=schedule, least=least)
    if not isinstance(fresh, int | float) or isinstance(fresh, bool) or not 0 < fresh < 1:
        raise ValueError(
            f"rollout.replay.fresh is {fresh!r}; write a number between 0 and 1, the share of the student's answers that are written anew (for 1 "
            "leave out rollout.replay), or a schedule such as {linear: {start: 1.0, end: 0.2, steps: 100}}"
        )
    return ReplaySettings(size=size, max_age=max_age, fresh=float(fresh), least=least)


def check_replay(settings: ReplaySettings, *, student: bool) -> None:
    """Raises ValueError for settings under which nothing would be given out. student: whether the student answers prompts as they are."""
    if not student:
        raise ValueError(
            "rollout.replay gives out the student's own answers again, and rollout.source lets it write none; use rollout.source=student, "
            "{mixed: {student: SHARE, dataset: HINT}} or {paired: {dataset: HINT}}, or leave out rollout.replay"
        )
    if settings.least > settings.size:
        raise ValueError(f"rollout.replay.least is {settings.least}, and no more than rollout.replay.size={settings.size} groups are ever kept")
