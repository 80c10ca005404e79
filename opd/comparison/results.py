"""What a run folder says about a run: learning curve, final evaluations problem by problem, costs. Reads files, knows no model."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opd.accuracy import majority_vote, pass_at
from opd.comparison.statistics import Table
from opd.run.folder import read_lines

PRIMARY = "temperature 1.0"
GREEDY = "greedy"
COUNTERS = ("tokens/student", "tokens/teacher", "tokens/learner", "seconds/total")
VITALS = ("length/mean", "entropy/student", "length/truncated")


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A dev evaluation and what training had cost by then."""

    step: int
    accuracy: float
    generated_tokens: float
    scored_tokens: float
    seconds: float
    teacher_tokens: float = 0.0
    devices: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """A test evaluation under one decoding: per-problem values by metric ("avg@k", "pass@k", "maj@k"), the line of eval.jsonl.

    domains, difficulties: of each problem, "" where its records name none.
    """

    row: Mapping[str, Any]
    by_problem: Mapping[str, Mapping[str, float]]
    domains: Mapping[str, str] = field(default_factory=dict)
    difficulties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One finished or unfinished run. costs: the counters of its last step. dev: decoding -> accuracy of the last dev evaluation.

    vitals: name -> (step, generated tokens, value) of every step that has it. alarms: the lines of guard.jsonl.
    ended: when its last status was written (UTC), "" where unknown. dev_answers: decoding -> answers a dev problem.
    """

    arm: str
    seed: int
    folder: Path
    state: str
    why: str = ""
    ended: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    finals: Mapping[str, Final] = field(default_factory=dict)
    dev: Mapping[str, float] = field(default_factory=dict)
    dev_answers: Mapping[str, int] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    vitals: Mapping[str, tuple[tuple[int, float, float], ...]] = field(default_factory=dict)
    alarms: tuple[Mapping[str, Any], ...] = ()

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def devices(self) -> int:
        """Devices that the run held, 1 where it did not record them."""
        return int(self.facts.get("devices", 1))

    @property
    def end(self) -> CurvePoint:
        """What the whole run cost, as a point without an accuracy."""
        return _point(0, math.nan, self.costs, self.devices)

    @property
    def allowed(self) -> tuple[str, ...]:
        """Known-biased forms that the recipe's terms allow."""
        return tuple(sorted({name for term in self.recipe.get("objective", ()) for name in term.get("allow", ())}))


def read_run(folder: Path, *, arm: str = "", seed: int | None = None) -> RunResult:
    """Everything a comparison needs of a run folder; a folder without files is a run that never started."""
    resolved = _read_json(folder / "resolved.json")
    status = _read_json(folder / "status.json")
    recipe = resolved.get("recipe", {})
    evaluations = list(read_lines(folder / "eval.jsonl"))
    metrics = list(read_lines(folder / "metrics.jsonl"))
    dev = [row for row in evaluations if row["split"] == "dev" and row["avg@k"] is not None]
    return RunResult(
        arm=arm or folder.name,
        seed=recipe.get("seed", 0) if seed is None else seed,
        folder=folder,
        state=status.get("state", "missing"),
        why=status.get("why", ""),
        ended=status.get("updated", "") if status.get("state") == "finished" else "",
        recipe=recipe,
        facts={key: value for key, value in resolved.items() if key != "recipe"},
        curve=learning_curve(dev, metrics, resolved.get("devices", 1)),
        finals={row["decoding"]: read_final(folder, row) for row in evaluations if row["split"] == "test"},
        dev={row["decoding"]: float(row["avg@k"]) for row in dev},
        dev_answers={row["decoding"]: int(row.get("k", 1)) for row in dev},
        costs={name: float(metrics[-1].get(name, 0.0)) for name in COUNTERS} if metrics else dict.fromkeys(COUNTERS, 0.0),
        vitals={name: _series(metrics, name) for name in VITALS},
        alarms=tuple(read_lines(folder / "guard.jsonl")),
    )


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[tuple[int, float, float], ...]:
    return tuple((row["step"], float(row.get("tokens/student", 0.0)), float(row[name])) for row in metrics if row.get(name) is not None)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def learning_curve(dev: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], devices: int = 1) -> tuple[CurvePoint, ...]:
    """Dev accuracy at temperature 1 (else the first decoding found) joined with the counters of its step; step 0 has cost nothing."""
    decodings = {row["decoding"] for row in dev}
    if not decodings:
        return ()
    decoding = PRIMARY if PRIMARY in decodings else dev[0]["decoding"]
    counters = {row["step"]: row for row in metrics}
    points = {}
    for row in dev:
        if row["decoding"] != decoding or (row["step"] and row["step"] not in counters):
            continue
        spent = counters.get(row["step"], {})
        points[row["step"]] = _point(row["step"], float(row["avg@k"]), spent, devices)
    return tuple(points[step] for step in sorted(points))


def _point(step: int, accuracy: float, spent: Mapping[str, Any], devices: int) -> CurvePoint:
    return CurvePoint(
        step=step,
        accuracy=accuracy,
        generated_tokens=float(spent.get("tokens/student", 0.0)),
        scored_tokens=float(spent.get("tokens/teacher", 0.0)) + float(spent.get("tokens/learner", 0.0)),
        seconds=float(spent.get("seconds/total", 0.0)),
        teacher_tokens=float(spent.get("tokens/teacher", 0.0)),
        devices=devices,
    )


def read_final(folder: Path, row: Mapping[str, Any]) -> Final:
    """Per-problem results of one evaluation from its generations file; answers that no verifier judged are left out."""
    by_problem: dict[str, list[Mapping[str, Any]]] = {}
    for line in read_lines(folder / row["generations"]):
        if line.get("status", "score") == "score":
            by_problem.setdefault(str(line["problem"]), []).append(line)
    k = int(row["k"])
    average = {problem: statistics.fmean(line["correct"] for line in lines) for problem, lines in by_problem.items()}
    passed = {problem: pass_at(len(lines), sum(line["correct"] for line in lines), k) for problem, lines in by_problem.items() if len(lines) >= k}
    majority = {
        problem: majority_vote([str(line.get("answer") or "") for line in lines], [line["correct"] for line in lines])
        for problem, lines in by_problem.items()
    }
    labels = {key: {problem: str(lines[0].get(key) or "") for problem, lines in by_problem.items()} for key in ("domain", "difficulty")}
    by_metric = {"avg@k": average, "pass@k": passed, "maj@k": majority}
    return Final(row=row, by_problem=by_metric, domains=labels["domain"], difficulties=labels["difficulty"])


def table(runs: Sequence[RunResult], decoding: str, metric: str, problems: Sequence[str] | None = None) -> Table | None:
    """Values [S, P] of one arm's runs over the problems that all of them judged (or those given); None where a run lacks the decoding."""
    if not runs or any(decoding not in run.finals for run in runs):
        return None
    rows = [run.finals[decoding].by_problem[metric] for run in runs]
    shared = sorted(set.intersection(*(set(row) for row in rows))) if problems is None else problems
    return np.array([[row[problem] for problem in shared] for row in rows], dtype=np.float64) if shared else None


def difference(left: Sequence[RunResult], right: Sequence[RunResult], decoding: str, metric: str = "avg@k") -> Table | None:
    """left - right, cell by cell over shared seeds and problems [S, P]; an arm without training stands in for every seed.

    `left` and `right` hold finished runs of one arm each. None where nothing is shared.
    """
    if not left or not right:
        return None
    ours, theirs = ({run.seed: run for run in side if decoding in run.finals} for side in (left, right))
    if not ours or not theirs:
        return None
    if is_untrained(left):
        ours = dict.fromkeys(theirs, next(iter(ours.values())))
    if is_untrained(right):
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    held = [side[seed].finals[decoding].by_problem[metric] for side in (ours, theirs) for seed in seeds]
    problems = sorted(set.intersection(*(set(values) for values in held)))
    if not problems:
        return None
    first = table([ours[seed] for seed in seeds], decoding, metric, problems)
    second = table([theirs[seed] for seed in seeds], decoding, metric, problems)
    assert first is not None and second is not None
    return first - second


def is_untrained(runs: Sequence[RunResult]) -> bool:
    """Whether these runs only evaluated the starting model: one run without a training step."""
    return len(runs) == 1 and all(point.step == 0 for point in runs[0].curve) and not runs[0].costs.get("tokens/student")


def dev_score(run: RunResult, metric: str) -> float:
    """The number a search maximises: best or last dev accuracy after training, or the mean over generated tokens ("area").

    A run that did not finish scores minus infinity.
    """
    curve = run.curve
    if not run.finished or len(curve) < 2:
        return -math.inf
    if metric == "final":
        return curve[-1].accuracy
    if metric == "best":
        return max(point.accuracy for point in curve[1:])
    spans = [(b.generated_tokens - a.generated_tokens, (a.accuracy + b.accuracy) / 2) for a, b in zip(curve, curve[1:], strict=False)]
    width = sum(span for span, _ in spans)
    return sum(span * mean for span, mean in spans) / width if width else curve[-1].accuracy


def best_decoding(base: RunResult) -> str | None:
    """The decoding under which the untrained model did best on dev; its test result is then not chosen on test."""
    known = {decoding: accuracy for decoding, accuracy in base.dev.items() if decoding in base.finals}
    return max(known, key=known.__getitem__) if known else None
