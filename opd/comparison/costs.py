"""What accuracy is compared against: kinds of cost, the accuracy that every arm had at an equal one, and what a point of gain cost."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from opd.comparison.results import CurvePoint, RunResult
from opd.comparison.statistics import (
    Interval,
    Table,
    Verdict,
    detectable_difference,
    holm,
    holm_levels,
    paired_seeds_to_resolve,
    share_interval,
    two_way_interval,
    verdict,
)
from opd.run.spending import Rates, money

Cost = Callable[[CurvePoint], float]
TOKENS, SCORED, SECONDS = "generated tokens", "learner and teacher tokens", "training seconds"
COSTS: Mapping[str, Cost] = {
    TOKENS: lambda point: point.generated_tokens,
    SCORED: lambda point: point.scored_tokens,
    SECONDS: lambda point: point.seconds,
}
DEVICE_SECONDS = "device-seconds"


def costs_of(runs: Sequence[RunResult], rates: Rates, devices: int) -> dict[str, Cost]:
    """Kinds of cost by name: the three that every run has, device-seconds where a run holds several devices, money where it is priced.

    devices: what every run holds; 0 takes what each recorded.
    """
    held = [devices or run.devices for run in runs]
    found = dict(COSTS)
    if max(held, default=1) > 1:
        found[DEVICE_SECONDS] = lambda point: point.seconds * (devices or point.devices)
    if rates.priced:
        found[f"money, {rates.currency}"] = lambda point: money(point.seconds * (devices or point.devices), point.teacher_tokens, rates)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """An arm's dev accuracy at a cost that all arms reached, linear between evaluations; intervals over seeds, the dev problems being these.

    difference: minus the baseline's, paired by seed; holm_p, verdict: after Holm over the arms. detectable: the smallest true difference that such an
    interval would show with a probability of 80 %; seeds_needed: how many would resolve this one, None for more than 100. All None for the
    baseline and without shared seeds.
    """

    cost: float
    accuracy: Interval
    difference: Interval | None
    verdict: Verdict | None
    holm_p: float | None = None
    detectable: float | None = None
    seeds_needed: int | None = None


def at_equal_cost(arms: Mapping[str, Sequence[RunResult]], take: Cost, baseline: str) -> dict[str, Matched]:
    """Arm -> its accuracy at the largest cost that every seed of every arm reached; arms without a curve, or that spend none of this, are left out.

    arms: finished runs by arm.
    """
    curves = {name: {run.seed: [(take(point), point.accuracy) for point in run.curve] for run in runs} for name, runs in arms.items()}
    curves = {name: mine for name, mine in curves.items() if mine and all(len(curve) > 1 and curve[-1][0] > 0 for curve in mine.values())}
    if not curves:
        return {}
    cost = min(curve[-1][0] for mine in curves.values() for curve in mine.values())
    values = {name: {seed: float(np.interp(cost, *zip(*curve, strict=True))) for seed, curve in mine.items()} for name, mine in curves.items()}
    theirs = values.get(baseline, {})
    pairs = {name: [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))] for name, ours in values.items() if name != baseline}
    differences = {name: two_way_interval(_column(found)) for name, found in pairs.items() if found}
    p_values = [found.p_value for found in differences.values()]
    held = dict(zip(differences, zip(holm(p_values), holm_levels(p_values), strict=True), strict=True))
    accuracies = {name: share_interval(_column(ours.values())) for name, ours in values.items()}
    matched = {name: Matched(cost=cost, accuracy=accuracy, difference=None, verdict=None) for name, accuracy in accuracies.items()}
    for name, (p_value, level) in held.items():
        matched[name] = replace(
            matched[name],
            difference=differences[name],
            verdict=verdict(differences[name], p_value=p_value),
            holm_p=p_value,
            detectable=detectable_difference(differences[name], level=level),
            seeds_needed=paired_seeds_to_resolve(pairs[name], level=level),
        )
    return matched


def _column(values: Iterable[float]) -> Table:
    return np.array(list(values))[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PerPoint:
    """Cost of a percentage point gained over the base on test, with its interval. high is None where the gain may be nothing: no upper bound.

    `why` is set, and the numbers None, where there is no such cost.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    why: str = ""


def cost_per_point(costs: Sequence[float], gain: Interval | None, *, level: float = 0.95) -> PerPoint:
    """Mean cost of the seeds over the gain, with Fieller's interval (Journal of the Royal Statistical Society B 16, 1954).

    gain: accuracy over the base, with its standard error; cost and gain are taken as independent, for runs end at an equal cost.
    """
    if gain is None:
        return PerPoint(why="no base to compare")
    mean = math.fsum(costs) / len(costs) if costs else 0.0
    if mean <= 0:
        return PerPoint(why="nothing of this kind was spent")
    if gain.mean <= 0:
        return PerPoint(why="no gain")
    points, stderr = 100 * gain.mean, 100 * gain.stderr
    if not math.isfinite(stderr):
        return PerPoint(value=mean / points)
    num = len(costs)
    variance = math.fsum((cost - mean) ** 2 for cost in costs) / (num - 1) / num if num > 1 else 0.0
    df = min(gain.df, num - 1.0) if variance > 0 else gain.df
    squared = float(stdtrit(df, 0.5 + level / 2)) ** 2
    # the interval holds every r with (mean - r points)^2 <= t^2 (variance + r^2 stderr^2): a r^2 - 2 b r + c <= 0
    a, b, c = points**2 - squared * stderr**2, mean * points, mean**2 - squared * variance
    root = b**2 - a * c
    if a <= 0:
        return PerPoint(value=mean / points, low=max(0.0, c / (b + math.sqrt(root))) if root >= 0 else 0.0)
    return PerPoint(value=mean / points, low=max(0.0, (b - math.sqrt(root)) / a), high=(b + math.sqrt(root)) / a)
