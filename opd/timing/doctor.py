"""Where a run's seconds went, who waited for whom, and what the recorded numbers allow to say about changing that. Reads a run folder only.

What is predicted comes from this run's own measurements: bounds from the phases' times, the simulator's schedule of them under other layouts, and
straight lines of time against tokens where they fit.
Nothing is said about what the run did not vary.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from opd.run.folder import read_lines, write_json
from opd.run.named import find_run
from opd.run.spending import ROLE_PHASES
from opd.timing.simulate import Layout, StepCosts, calibrate, predict

STUDENT, AHEAD = "student (generates)", "seconds/rollout/ahead"
NAMES = {"student": STUDENT, "teacher": "teacher (scores)", "learner": "learner (updates)", "sync": "weights on their way"}
ROLES = {NAMES[role]: phases for role, phases in ROLE_PHASES.items()}
OTHER = "other phases"
WARM_UP = 2  # first steps, which compile and allocate, leave medians and lines
FITS = 0.5  # r^2 from which a line is believed
LITTLE = 1.15  # a bound on the speed-up under which asynchrony is not worth its staleness
SLOW_STEP = 3.0  # times the median


def examine(folder: Path) -> dict[str, Any]:
    """The figures of a run folder. Raises ValueError for a folder without timed steps."""
    rows = [row for row in read_lines(folder / "metrics.jsonl") if row.get("seconds/step")]
    if len(rows) < 2:
        raise ValueError(f"{folder} has {len(rows)} timed steps; the doctor needs at least 2 (is it a run folder?)")
    phases = {name: [row.get(f"seconds/{name}", 0.0) for row in rows] for name in phase_names(rows)}
    total = sum(row["seconds/step"] for row in rows)
    roles, ahead = role_seconds(phases), sum(row.get(AHEAD, 0.0) for row in rows)
    if ahead:  # generation ran beside the steps; the phase called rollout is what was waited for it
        roles = {**roles, STUDENT: ahead}
    return {
        "steps": len(rows),
        "seconds": total,
        "unaccounted": total - sum(map(sum, phases.values())),
        "phases": {name: sum(values) for name, values in phases.items()},
        "parts": {name: sum(row.get(f"seconds/{name}", 0.0) for row in rows) for name in part_names(rows)},
        "roles": {role: {"busy": busy, "waits_for": waits(role, roles, ahead, phases)} for role, busy in roles.items()},
        "outside": outside(folder, rows),
        "slow_steps": slow_steps(rows, phases),
        "drift": drift(phases),
        "ahead": ahead,
        "asynchrony": asynchrony(roles, total),
        "simulated": simulated(rows),
        "lines": {name: line for name, line in lines(rows, phases).items() if line},
        "answers": answer_lengths(folder),
        "varied": varied(folder, rows, phases),
    }


def steady(values: Sequence[Any]) -> Sequence[Any]:
    """Without the warm-up, where enough is left."""
    return values[WARM_UP:] if len(values) > 3 * WARM_UP else values


def phase_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Phases of the step, in the order recorded; parts of phases (learn/pack) and what lies beside the step (guard) are not among them."""
    beside = ("step", "total", "guard")
    return list(dict.fromkeys(n for row in rows for n in (key.removeprefix("seconds/") for key in row if key.startswith("seconds/"))
                              if "/" not in n and n not in beside))  # fmt: skip


def part_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key.removeprefix("seconds/") for row in rows for key in row if key.startswith("seconds/") and key.count("/") > 1))


def role_seconds(phases: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Busy seconds by role; roles without time are left out."""
    known = {phase: role for role, names in ROLES.items() for phase in names}
    found: dict[str, float] = {}
    for name, values in phases.items():
        role = known.get(name, OTHER)
        found[role] = found.get(role, 0.0) + sum(values)
    return {role: busy for role, busy in found.items() if busy > 0}


def waits(role: str, roles: Mapping[str, float], ahead: float, phases: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """In a loop of one step after the other a role is idle exactly while the others work.

    ahead: seconds of generation beside the steps, 0 in such a loop; the others then wait for the student only in the phase called rollout, and the
    student for whoever had not finished: the steps' time without its own.
    """
    if not ahead:
        return {other: busy for other, busy in roles.items() if other != role}
    if role == STUDENT:
        return {"the steps": max(0.0, sum(map(sum, phases.values())) - ahead)}
    return {STUDENT: sum(phases.get("rollout", ())), **{other: busy for other, busy in roles.items() if other not in (role, STUDENT)}}


LAYOUTS: tuple[tuple[str, Layout, float], ...] = (
    ("staleness 1, generation on hardware of its own", Layout(max_staleness=1), 1.0),
    ("staleness 2, generation on hardware of its own", Layout(max_staleness=2), 1.0),
    ("a second place to generate, staleness 0", Layout(replicas=2), 1.0),
    ("a second place to generate, staleness 1", Layout(replicas=2, max_staleness=1), 1.0),
    ("the teacher on hardware of its own, staleness 1", Layout(max_staleness=1, teacher_apart=True), 1.0),
    ("a learner (and teacher) twice as fast, staleness 0", Layout(), 2.0),
)


def simulated(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What opd.timing.simulate makes of this run's steps under other layouts: {"layout", "step" seconds, "times" as fast, "idle" shares by role}.

    Assumed: every place is as fast as this one, and two places share a rollout fully (opd simulate has smaller=RUN2 to measure that).
    """
    if any("seconds/rollout" not in row for row in rows):
        return []
    costs = calibrate(rows)
    now = predict(costs, Layout()).step
    found = []
    layouts = [one for one in LAYOUTS if sum(c.teacher for c in costs) > 0.01 * sum(c.learn for c in costs) or not one[1].teacher_apart]
    for name, layout, speed in layouts:
        faster = [StepCosts(rollout_shared=c.rollout_shared, teacher=c.teacher / speed, learn=c.learn / speed, sync=c.sync) for c in costs]
        guess = predict(faster, layout)
        found.append({"layout": name, "step": guess.step, "times": now / guess.step, "idle": dict(guess.idle)})
    return found


def outside(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds beside the steps that were recorded: evaluations, and the guard rails' numbers."""
    evaluation = sum(row.get("seconds", 0.0) for row in read_lines(folder / "eval.jsonl"))
    return {"evaluation": evaluation, "guard": sum(row.get("seconds/guard", 0.0) for row in rows)}


def slow_steps(rows: Sequence[Mapping[str, Any]], phases: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Steps that took more than three times the median, the seconds above it, and the phase that grew most."""
    usual = median(row["seconds/step"] for row in steady(rows))
    slow = [n for n, row in enumerate(rows) if row["seconds/step"] > SLOW_STEP * usual]
    grown = {name: sum(values[n] - median(values) for n in slow) for name, values in phases.items()}
    return {
        "usual": usual,
        "steps": [rows[n]["step"] for n in slow],
        "seconds_above": sum(rows[n]["seconds/step"] - usual for n in slow),
        "phase": max(grown, key=lambda name: grown[name]) if slow else "",
    }


def drift(phases: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median of a phase's last quarter over that of its first (after the warm-up); phases that take nothing are left out."""
    found = {}
    for name, values in phases.items():
        usual = steady(values)
        quarter = max(1, len(usual) // 4)
        first, last = median(usual[:quarter]), median(usual[-quarter:])
        if len(usual) >= 8 and first > 0 and fmean(usual) > 0.01 * fmean([sum(column) for column in zip(*phases.values(), strict=True)]):
            found[name] = last / first
    return found


def asynchrony(roles: Mapping[str, float], total: float) -> dict[str, Any]:
    """Bounds on what overlapping the roles could gain, if each had hardware of its own as fast as this: total over the longest role.

    generation apart: two places, generation and everything else. all apart: one place a role. The hand-over of weights overlaps with nothing.
    Real pipelines stay below: they also wait for the slowest answer. On the same hardware the bound is 1.
    """
    generation = roles.get("student (generates)", 0.0)
    sync = roles.get("weights on their way", 0.0)
    rest = sum(roles.values()) - generation - sync
    two = (generation + rest + sync) / (max(generation, rest) + sync) if generation + rest else 1.0
    working = [busy for role, busy in roles.items() if role != "weights on their way"]
    apart = (sum(working) + sync) / (max(working) + sync) if working else 1.0
    longest = max(roles, key=lambda role: roles[role])
    return {"generation_apart": two, "all_apart": apart, "longest": longest, "longest_share": roles[longest] / total, "helps": two > LITTLE}


def lines(rows: Sequence[Mapping[str, Any]], phases: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float] | None]:
    """Seconds of a phase against what it worked on, over the steps: {"fixed": s a step, "per_token": s, "r2", "tokens": mean}; None where unknown."""
    differences = {name: _differences([row.get(name) for row in rows]) for name in ("tokens/student", "tokens/teacher", "tokens/learner")}
    return {
        "rollout": _line(differences["tokens/student"], phases.get("rollout")),
        "teacher": _line(differences["tokens/teacher"], phases.get("teacher")),
        "learn": _line(differences["tokens/learner"], phases.get("learn")),
    }


def _differences(values: Sequence[float | None]) -> list[float]:
    known = [value or 0.0 for value in values]
    return [b - a for a, b in zip([0.0, *known], known, strict=False)]


def _line(tokens: Sequence[float], seconds: Sequence[float] | None) -> dict[str, float] | None:
    """A line through the steps; the tenth that lies farthest above it (a busy machine) is left out and the line drawn again."""
    if seconds is None:
        return None
    x, y = np.array([pair for pair in zip(steady(tokens), steady(seconds), strict=True) if pair[0] > 0]).reshape(-1, 2).T
    if len(x) < 8 or len(set(x.tolist())) < 3:
        return None
    slope, fixed = np.polyfit(x, y, 1)
    kept = np.argsort(y - slope * x - fixed, kind="stable")[: math.ceil(0.9 * len(x))]
    x, y = x[kept], y[kept]
    slope, fixed = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1.0 - float(((y - slope * x - fixed) ** 2).sum()) / spread if spread else 0.0
    return {"fixed": float(fixed), "per_token": float(slope), "r2": r2, "tokens": float(x.mean())}


def answer_lengths(folder: Path) -> dict[str, float]:
    """Mean and longest answer of the recorded steps, mean over steps, in tokens: a batch that waits for its longest wastes 1 - mean / longest."""
    steps = []
    for path in sorted((folder / "samples").glob("step-*.jsonl"))[-20:]:
        lengths = [len(row["tokens"]) for row in read_lines(path)]
        if len(lengths) > 1:
            steps.append((fmean(lengths), max(lengths)))
    return {"mean": fmean(a for a, _ in steps), "longest": fmean(b for _, b in steps)} if steps else {}


def varied(folder: Path, rows: Sequence[Mapping[str, Any]], phases: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What packing and another K would change, predicted: padding (share), learn_now and learn_packed (seconds a step), k, bytes a step.

    Without pads the learner computes that share fewer tokens; where its time follows its tokens only that part shrinks, else all of it does at
    most. K changes none of the products with the head: it is 8 bytes a token, id and log-prob, from every teacher to the learner.
    """
    padded = [row["padding/learner"] for row in steady(rows) if row.get("padding/learner") is not None]
    found: dict[str, float] = {}
    if padded and phases.get("learn"):
        line, share, now = lines(rows, phases)["learn"], fmean(padded), fmean(steady(phases["learn"]))
        follows = line is not None and line["r2"] >= FITS
        found |= {"padding": share, "learn_now": now, "learn_packed": now - share * (line["per_token"] * line["tokens"] if follows and line else now)}
    recipe = json.loads((folder / "resolved.json").read_text(encoding="utf-8")) if (folder / "resolved.json").is_file() else {}
    supports = [one for term in recipe.get("objective", []) if isinstance(term.get("support"), dict) for one in term["support"].values()]
    if sizes := [one.get("k", one.get("draws", 0)) for one in supports]:
        tokens = steady(_differences([row.get("tokens/student") for row in rows]))
        found |= {"k": float(max(sizes)), "bytes": 8.0 * max(sizes) * fmean(tokens)}
    return found


def _on_packing_and_k(v: Mapping[str, float]) -> list[str]:
    said = []
    if "padding" in v:
        said.append(
            f"Packing: {v['padding']:.0%} of what the learner computes is padding; with learner.packed=true it is predicted to take "
            f"{v['learn_packed']:.3f} s a step in the place of {v['learn_now']:.3f} s. To measure it: opd bundle RUN step=N, then opd replay BUNDLE "
            "learner.packed=true."
        )
    if "k" in v:
        said.append(
            f"K = {v['k']:.0f}: {8 * v['k']:.0f} bytes a token from a teacher to the learner, {v['bytes'] / 1e6:.2f} MB a step; twice K doubles that "
            "and leaves the products with the head as they are."
        )
    return said


def advice(found: Mapping[str, Any]) -> list[str]:
    """What follows, a sentence each, most important first."""
    said = [_on_asynchrony(found["asynchrony"])]
    said += [_on_line(name, line) for name, line in found["lines"].items()]
    answers, slow = found["answers"], found["slow_steps"]
    if answers and answers["longest"] > 2 * answers["mean"]:
        said.append(
            f"Recorded answers: the longest of a step is {answers['longest'] / answers['mean']:.1f} times the mean. A batch that waits for "
            f"its longest answer leaves {1 - answers['mean'] / answers['longest']:.0%} of its rows idle: generate more rows than fit at once, or "
            "lower sampling.max_tokens. In the learner, learner.packed=true removes the padding that such lengths bring."
        )
    if slow["seconds_above"] > 0.05 * found["seconds"]:
        said.append(
            f"{len(slow['steps'])} steps took more than {SLOW_STEP:.0f} times the usual {slow['usual']:.2f} s, {slow['seconds_above']:.1f} s "
            f"in all, most of it in {slow['phase']} (first at step {slow['steps'][0]}): look for what else the machine did then."
        )
    if grown := {name: ratio for name, ratio in found["drift"].items() if ratio > 1.5}:
        told = ", ".join(f"{name} {ratio:.1f} times" for name, ratio in grown.items())
        said.append(f"Slower towards the end than at first: {told} (longer answers, memory, or a busier machine).")
    said += _on_packing_and_k(found["varied"])
    return said


def _on_asynchrony(a: Mapping[str, Any]) -> str:
    if a["helps"]:
        return (
            f"Asynchrony can help, if generation gets hardware of its own as fast as this: at most {a['generation_apart']:.2f} times the speed "
            f"(with every role apart {a['all_apart']:.2f}); at least one step of staleness comes with it. Try "
            "engine.kind=process asynchrony.max_staleness=1 where a core or device is free (terms on sampled tokens then need weight: engine_ratio); "
            "where student and learner share what they run on, it cannot help."
        )
    return (
        f"Asynchrony will not help: {a['longest']} takes {a['longest_share']:.0%} of the time, so generating beside the rest gains at most "
        f"{a['generation_apart']:.2f} times the speed, whatever the staleness. Make {a['longest']} faster first."
    )


def _on_line(name: str, line: Mapping[str, float]) -> str:
    if line["r2"] < FITS:
        return f"{name}: its time does not follow its tokens in this run (r² {line['r2']:.2f}); nothing is predicted."
    usual = line["fixed"] + line["per_token"] * line["tokens"]
    share, gain = max(0.0, line["fixed"]) / usual, 2 * usual / (line["fixed"] + 2 * line["per_token"] * line["tokens"])
    if share > 0.3:
        return (
            f"{name}: {share:.0%} of its time does not depend on its tokens ({1000 * line['fixed']:.0f} ms a step, r² {line['r2']:.2f}): twice as "
            f"many answers a step would make a token {gain:.2f} times as quick."
        )
    return f"{name}: its time grows with its tokens (r² {line['r2']:.2f}): twice as many answers a step gain at most {max(1.0, gain):.2f} times."


def describe(name: str, found: Mapping[str, Any]) -> str:
    """The figures and the advice as text."""
    total = found["seconds"]
    lines_ = [f"{name}: {found['steps']} steps, {total:.1f} s, {total / found['steps']:.3f} s a step", "", "who worked, and whom they waited for"]
    for role, one in found["roles"].items():
        if one["busy"] < 0.001 * total:
            continue
        waited = sorted(one["waits_for"].items(), key=lambda item: -item[1])
        told = ", ".join(f"{busy / total:.0%} for {other}" for other, busy in waited if busy / total >= 0.005)
        lines_.append(f"  {role:<22}{one['busy']:>9.1f} s {one['busy'] / total:>5.0%} {_bar(one['busy'] / total):<20}  waited {told or 'for nobody'}")
    lines_ += ["", "phases"]
    for phase, seconds in {**found["phases"], **found["parts"]}.items():
        indent = "    " if "/" in phase else "  "
        lines_.append(f"{indent + phase:<24}{seconds:>9.1f} s {seconds / total:>5.0%} {_bar(seconds / total)}")
    lines_.append(f"  {'unaccounted':<22}{found['unaccounted']:>9.1f} s {found['unaccounted'] / total:>5.0%}")
    lines_ += [f"  {'beside: ' + what:<22}{seconds:>9.1f} s" for what, seconds in found["outside"].items()]
    if found["simulated"]:
        lines_ += ["", "simulated (opd simulate), if every place were as fast as this one"]
    for one in found["simulated"]:
        idle = ", ".join(f"{role} {share:.0%}" for role, share in one["idle"].items())
        lines_.append(f"  {one['layout']:<52}{one['step']:>8.3f} s a step, {one['times']:.2f} x; idle {idle}")
    return "\n".join([*lines_, "", "what follows", *(f"  - {sentence}" for sentence in advice(found))])


def _bar(share: float) -> str:
    return "█" * math.ceil(20 * share) if share > 0.005 else ""


def doctor(run: str, options: Mapping[str, Any]) -> str:
    """`opd doctor RUN`: the text; the figures go to RUN/doctor.json. Raises ValueError with the fix."""
    if options:
        raise ValueError(f"opd doctor RUN takes no options (found {sorted(options)[0]!r})")
    folder = find_run(run)
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} has no metrics.jsonl: opd doctor reads a run folder; `opd show` lists those here")
    found = examine(folder)
    write_json(folder / "doctor.json", {**found, "advice": advice(found)})
    return describe(folder.name, json.loads(json.dumps(found)))
