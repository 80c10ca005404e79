"""A discrete-event simulator of the pipeline, calibrated from a measured run: step time and idle shares before anybody rents a machine.

A step is four tasks: sync and learn on the learner, rollout on every actor, teacher on the learner or apart. Each role serves its tasks in
the order of the steps, and a task starts when its role is free and what it waits for has ended: the schedule of opd/loop.py and
opd/loop_async.py. All functions are pure; times in seconds.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd.config.choices import nearest
from opd.config.load import parse_overrides
from opd.run.folder import read_lines
from opd.run.named import find_run

LEARN = ("views", "prepare", "join", "learn")
WARM_UP = 3  # first steps of a run that are left out


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """One step's work, seconds. rollout_shared: that replicas share out; rollout_fixed: that each needs however many there are."""

    rollout_shared: float
    rollout_fixed: float = 0.0
    teacher: float = 0.0
    learn: float = 0.0
    sync: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """replicas: of the rollout engine. max_staleness: as in the recipe. teacher_apart: scores on machines of its own, asked by the step."""

    replicas: int = 1
    max_staleness: int = 0
    teacher_apart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`role` does `task` of `step` from `start` to `end`."""

    role: str
    task: str
    step: int
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """step: mean seconds a step. idle: share of the time that a role (actors, teacher, learner) does nothing. staleness: mean age, versions."""

    step: float
    idle: Mapping[str, float]
    staleness: float


def schedule(costs: Sequence[StepCosts], layout: Layout) -> list[Event]:
    """Every task of every step. Raises ValueError for a layout or a cost that cannot be."""
    check(costs, layout)
    free: dict[str, float] = {}
    ended: dict[tuple[str, int], float] = {}
    events: list[Event] = []

    def run(roles: Sequence[str], task: str, step: int, seconds: float, after: Sequence[tuple[str, int]]) -> None:
        waits = [ended.get(name, 0.0) for name in after]
        for role in roles:
            start = max([free.get(role, 0.0), *waits])
            free[role] = start + seconds
            ended[task, step] = max(ended.get((task, step), 0.0), free[role])
            events.append(Event(role=role, task=task, step=step, start=start, end=free[role]))

    actors = [f"actor-{index}" for index in range(layout.replicas)]
    begun = -1
    for step, cost in enumerate(costs):
        ahead = [("rollout", step)] if step <= begun else []  # the loop takes finished answers first
        run(["learner"], "sync", step, cost.sync, [("learn", step - 1), *ahead])
        for coming in range(begun + 1, min(step + layout.max_staleness, len(costs) - 1) + 1):
            c = costs[coming]
            seconds = c.rollout_fixed + c.rollout_shared / layout.replicas
            run(actors, "rollout", coming, seconds, [("sync", step), ("rollout", coming - 1)])
            begun = coming
        scorer = "teacher" if layout.teacher_apart else "learner"
        run([scorer], "teacher", step, cost.teacher, [("rollout", step), ("sync", step)])
        run(["learner"], "learn", step, cost.learn, [("teacher", step)])
    return events


def predict(costs: Sequence[StepCosts], layout: Layout) -> Prediction:
    """Mean step time, idle shares and staleness over all steps."""
    events = schedule(costs, layout)
    whole = max(event.end for event in events)
    actors = tuple(f"actor-{index}" for index in range(layout.replicas))
    roles = {"actors": actors, "learner": ("learner",), **({"teacher": ("teacher",)} if layout.teacher_apart else {})}
    idle = {}
    for name, members in roles.items():
        busy = sum(event.end - event.start for event in events if event.role in members)
        idle[name] = 1.0 - busy / (whole * len(members)) if whole else 0.0
    ages = [min(step, layout.max_staleness) for step in range(len(costs))]
    return Prediction(step=whole / len(costs), idle=idle, staleness=sum(ages) / len(ages))


def check(costs: Sequence[StepCosts], layout: Layout) -> None:
    if not costs:
        raise ValueError("there is no step to simulate")
    if layout.replicas < 1 or layout.max_staleness < 0:
        raise ValueError(f"replicas must be at least 1 and staleness at least 0, found {layout.replicas} and {layout.max_staleness}")
    for cost in costs:
        if min(cost.rollout_shared, cost.rollout_fixed, cost.teacher, cost.learn, cost.sync) < 0:
            raise ValueError(f"a cost is negative: {cost}")


def calibrate(rows: Sequence[Mapping[str, Any]], *, replicas: int = 1, fixed_share: float = 0.0) -> list[StepCosts]:
    """The costs of a run's steps from its metrics, the first WARM_UP left out where there are more.

    replicas: that the run had. fixed_share: of one replica's rollout time that more replicas do not shorten, see `fixed_share_of`.
    """
    if not 0 <= fixed_share <= 1:
        raise ValueError(f"fixed_share is {fixed_share}; it is a share, from 0 (replicas share everything) to 1 (they help nothing)")
    found = []
    for row in rows[WARM_UP:] or rows:
        waited = row.get("seconds/rollout/ahead") or row["seconds/rollout"]
        one = waited / (fixed_share + (1 - fixed_share) / replicas)  # what one replica alone would take
        learn = sum(row.get(f"seconds/{phase}", 0.0) for phase in LEARN)
        found.append(
            StepCosts(
                rollout_shared=(1 - fixed_share) * one,
                rollout_fixed=fixed_share * one,
                teacher=row.get("seconds/teacher", 0.0),
                learn=learn,
                sync=row.get("seconds/sync", 0.0),
            )
        )
    return found


def fixed_share_of(whole: Sequence[Mapping[str, Any]], smaller: Sequence[Mapping[str, Any]], share: float) -> float:
    """Which share of a rollout's time does not shrink with its prompts: from two runs, the second with `share` of the first one's prompts.

    time(n) = fixed + n x each is drawn through the two medians; held between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the smaller run must ask fewer prompts a step than the other, found {share:g} times as many")
    large, small = (statistics.median(row["seconds/rollout"] for row in rows[WARM_UP:] or rows) for rows in (whole, smaller))
    each = (large - small) / (1 - share)
    return min(max(1 - each / large, 0.0), 1.0)


DEFAULTS = {"replicas": 1, "staleness": 0, "learner_speed": 1.0, "teacher_apart": False, "fixed_share": 0.0, "smaller": ""}


def simulate(run: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> dict[str, Any]:
    """What a run's steps would take under another layout; see `opd help`. Raises ValueError for a folder without metrics or an unknown key."""
    asked = {**DEFAULTS, **checked_keys(parse_overrides(overrides))}
    recipe, rows = run_rows(find_run(run))
    measured = Layout(replicas=recipe["engine"].get("replicas", 1), max_staleness=recipe.get("asynchrony", {}).get("max_staleness", 0))
    share = asked["fixed_share"]
    if asked["smaller"]:
        other, other_rows = run_rows(find_run(asked["smaller"]))
        share = fixed_share_of(rows, other_rows, other["rollout"]["prompts"] / recipe["rollout"]["prompts"])
    costs = calibrate(rows, replicas=measured.replicas, fixed_share=share)
    speed = asked["learner_speed"]
    costs_now = [replace(c, teacher=c.teacher / speed, learn=c.learn / speed) for c in costs]
    layout = Layout(replicas=asked["replicas"], max_staleness=asked["staleness"], teacher_apart=asked["teacher_apart"])
    taken = statistics.mean(row["seconds/step"] for row in rows[WARM_UP:] or rows)
    return {
        "measured_step": taken, "simulated_as_measured": predict(costs, measured), "layout": layout, "fixed_share": share,
        "predicted": predict(costs_now, layout),
    }  # fmt: skip


def checked_keys(asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises ValueError for keys that mean nothing here and values of the wrong kind."""
    for key, value in asked.items():
        if key not in DEFAULTS:
            raise ValueError(f"simulate knows no {key!r}{nearest(key, DEFAULTS)}; it takes {', '.join(DEFAULTS)}")
        kind = type(DEFAULTS[key])
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and float(value) == value if kind is float else type(value) is kind):
            raise ValueError(f"{key}={value!r}: write {'a path' if kind is str else 'true or false' if kind is bool else 'a number'}")
    if asked.get("learner_speed", 1.0) <= 0:
        raise ValueError(f"learner_speed={asked['learner_speed']}: how many times as fast the learner is; a number above 0")
    return asked


def run_rows(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(recipe, lines of metrics) of a run. Raises ValueError for a folder without them."""
    rows = list(read_lines(folder / "metrics.jsonl"))
    if not rows or not (folder / "resolved.json").is_file():
        raise ValueError(f"{folder} is no run with steps (resolved.json and metrics.jsonl); `opd show` lists the runs here")
    return json.loads((folder / "resolved.json").read_text(encoding="utf-8"))["recipe"], rows


def describe(found: Mapping[str, Any]) -> str:
    """What `simulate` found, as lines of text."""
    layout, then, now = found["layout"], found["simulated_as_measured"], found["predicted"]
    idle = ", ".join(f"{role} {100 * share:.0f} %" for role, share in now.idle.items())
    assumed = f"{100 * found['fixed_share']:.0f} % of a rollout not shared by replicas" if layout.replicas > 1 else "one replica"
    return "\n".join(
        [
            f"measured:  {found['measured_step']:.3f} s a step (simulated as it was: {then.step:.3f} s)",
            f"predicted: {now.step:.3f} s a step with replicas={layout.replicas} staleness={layout.max_staleness}"
            f"{' teacher_apart=true' if layout.teacher_apart else ''} ({assumed}), {found['measured_step'] / now.step:.2f} x as fast",
            f"idle:      {idle}",
        ]
    )
