"""What the report's curves show: means and extremes over seeds of accuracy, length, entropy, truncation and pass@k, and where runs went wrong."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from opd.comparison.results import PRIMARY, CurvePoint, RunResult
from opd.comparison.summary import ArmSummary, Summary

VITAL_LABELS = (  # name, label, factor
    ("length/mean", "answer length, tokens", 1.0),
    ("entropy/student", "student entropy, nats", 1.0),
    ("length/truncated", "answers cut at the limit, %", 100.0),
)
MOST_CURVES = 12
"""That one picture can show; beyond, nobody tells them apart."""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """One arm's curve over seeds on a common grid; low and high are the extremes over seeds."""

    label: str
    style: str
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A place on a curve where a guard rail spoke or a run had fallen."""

    x: float
    y: float
    style: str
    text: str


def drawn_arms(summary: Summary) -> list[ArmSummary]:
    """The trained arms whose curves are drawn, in the table's order: all, or of many the baseline and the most accurate on test."""
    trained = [arm for arm in summary.arms if arm.trained]
    best = sorted(trained, key=lambda arm: (arm.name != summary.reference.name, -_accuracy(arm)))[:MOST_CURVES]
    chosen = {arm.name for arm in best}
    return [arm for arm in trained if arm.name in chosen]


def _accuracy(arm: ArmSummary) -> float:
    found = arm.tests.get((PRIMARY, "avg@k"))
    return -1.0 if found is None or math.isnan(found.mean) else found.mean


def band(arm: ArmSummary, cost: Callable[[CurvePoint], float], style: str) -> Band | None:
    """Dev accuracy against a cost over the finished seeds; None without a curve."""
    return over_seeds([[(cost(point), point.accuracy) for point in run.curve] for run in arm.finished], arm.label, style)


def vital_band(arm: ArmSummary, name: str, style: str, *, bins: int = 40) -> Band | None:
    """A metric of every training step against generated tokens, means of `bins` equal stretches of each run; None where no seed has it."""
    return over_seeds([_binned([(x, y) for _, x, y in run.vitals.get(name, ())], bins) for run in arm.finished], arm.label, style)


def over_seeds(curves: Sequence[Points], label: str, style: str, *, points: int = 60) -> Band | None:
    """Mean and extremes, linear between points, from where all curves have begun to where the first ends; None without a curve of two points."""
    drawn = [curve for curve in curves if len(curve) > 1 and curve[-1][0] > 0]
    if not drawn:
        return None
    start, end = max(curve[0][0] for curve in drawn), min(curve[-1][0] for curve in drawn)
    if end <= start:
        return None
    grid = np.linspace(start, end, points)
    values = np.array([np.interp(grid, *zip(*curve, strict=True)) for curve in drawn])
    return Band(
        label=label,
        style=style,
        x=tuple(grid.tolist()),
        mean=tuple(values.mean(0).tolist()),
        low=tuple(values.min(0).tolist()),
        high=tuple(values.max(0).tolist()),
    )


def _binned(points: Points, bins: int) -> Points:
    if len(points) <= bins or points[-1][0] <= 0:
        return points
    held: dict[int, list[tuple[float, float]]] = {}
    for x, y in points:
        held.setdefault(min(bins - 1, int(bins * x / points[-1][0])), []).append((x, y))
    return [(statistics.fmean(x for x, _ in group), statistics.fmean(y for _, y in group)) for group in held.values()]


def passed_band(arm: ArmSummary, style: str) -> Band | None:
    """pass@j on test at temperature 1 for j = 1, 2, 4 ... k; None where no run has two of them."""
    rows = [run.finals[PRIMARY].row.get("pass_at", {}) for run in arm.finished if PRIMARY in run.finals]
    counts = sorted({int(j) for row in rows for j in row if all(j in other for other in rows)})
    if len(counts) < 2:
        return None
    values = [[float(row[str(j)]) for row in rows] for j in counts]
    return Band(
        label=arm.label,
        style=style,
        x=tuple(float(j) for j in counts),
        mean=tuple(statistics.fmean(of_seeds) for of_seeds in values),
        low=tuple(min(of_seeds) for of_seeds in values),
        high=tuple(max(of_seeds) for of_seeds in values),
    )


def marks(arm: ArmSummary, cost: Callable[[CurvePoint], float], style: str) -> list[Mark]:
    """Every first alarm of a rule in a run, and the end of every run that ended far below its best, on the dev curve of its own seed."""
    found = []
    for run in arm.finished:
        if len(run.curve) < 2:
            continue
        steps, costs, accuracies = zip(*((point.step, cost(point), point.accuracy) for point in run.curve), strict=True)
        for step, rule in first_alarms(run):
            x, y = float(np.interp(step, steps, costs)), float(np.interp(step, steps, accuracies))
            found.append(Mark(x=x, y=y, style=style, text=f"{arm.label}, seed {run.seed}, step {step}: {rule}"))
        if any(seed == run.seed for seed, _, _ in arm.collapsed):
            found.append(Mark(x=costs[-1], y=accuracies[-1], style=style, text=f"{arm.label}, seed {run.seed}: ended far below its best"))
    return found


def first_alarms(run: RunResult) -> list[tuple[int, str]]:
    """(step, rule) of the first alarm of every rule."""
    first: dict[str, int] = {}
    for line in run.alarms:
        if line.get("action") != "rolled_back":
            first.setdefault(str(line["rule"]), int(line["step"]))
    return [(step, rule) for rule, step in first.items()]
