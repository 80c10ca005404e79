"""How much it costs to reach a target accuracy, and how many times more or less than a baseline needs.

Legend: one curve a seed, a point an evaluation: (cost so far, accuracy on the dev split).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Cost to the target by seed (None: not within its budget, which is in `budgets`).

    `typical` is the geometric mean over seeds with its interval, where all reached it at some cost; else None: "> budget", or no such cost.
    """

    by_seed: tuple[float | None, ...]
    budgets: tuple[float, ...]
    typical: float | None
    low: float | None
    high: float | None

    @property
    def reached(self) -> int:
        return sum(cost is not None for cost in self.by_seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """The baseline's cost over the arm's (above 1: the arm is cheaper). `at_least`: the baseline missed the target in some seed.

    `why` is set, and the numbers None, where no ratio may be taken.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    at_least: bool = False
    why: str = ""


def cost_to_reach(curve: Curve, target: float) -> float | None:
    """Cost at which a curve first reaches the target, linear between evaluations; None where it does not.

    A single lucky evaluation does not count: the evaluation that reaches the target and the one after it must average at least the
    target. The last evaluation stands alone.
    """
    for n, (cost, accuracy) in enumerate(curve):
        if accuracy < target:
            continue
        if n + 1 < len(curve) and (accuracy + curve[n + 1][1]) / 2 < target:
            continue
        if n == 0:
            return cost
        cost_before, accuracy_before = curve[n - 1]
        if accuracy_before >= target:
            return cost
        return cost_before + (cost - cost_before) * (target - accuracy_before) / (accuracy - accuracy_before)
    return None


def reach(curves: Sequence[Curve], target: float, *, level: float = 0.95) -> Reach:
    """Cost to the target over seeds; the interval is Student's t of the logarithm (none with one seed)."""
    by_seed = tuple(cost_to_reach(curve, target) for curve in curves)
    budgets = tuple(curve[-1][0] if curve else 0.0 for curve in curves)
    costs = [cost for cost in by_seed if cost is not None]
    if not costs or len(costs) < len(by_seed) or min(costs) <= 0:
        return Reach(by_seed=by_seed, budgets=budgets, typical=None, low=None, high=None)
    mean, half = _log_interval(costs, level)
    low, high = (None, None) if half is None else (math.exp(mean - half), math.exp(mean + half))
    return Reach(by_seed=by_seed, budgets=budgets, typical=math.exp(mean), low=low, high=high)


def ratio_to_baseline(arm: Reach, baseline: Reach, *, arm_learned: bool, baseline_learned: bool, level: float = 0.95) -> Ratio:
    """The baseline's cost over the arm's, paired by seed (geometric mean, t interval of the logarithm).

    No ratio from an arm that did not learn here, nor for an arm that missed the target in some seed. Where only the baseline missed
    it, its budget stands in and the result is a lower bound without an interval.
    """
    if not arm_learned:
        return Ratio(why="did not learn here")
    if not baseline_learned:
        return Ratio(why="no ratio: the baseline did not learn here")
    if arm.typical is None and arm.reached == len(arm.by_seed):
        return Ratio(why="no ratio: nothing of this kind was spent")
    if arm.typical is None:
        return Ratio(why="> budget" if arm.reached == 0 else f"> budget in {len(arm.by_seed) - arm.reached} of {len(arm.by_seed)} seeds")
    if len(arm.by_seed) != len(baseline.by_seed):
        return Ratio(why="no ratio: the arms do not share their seeds")
    expected = [budget if cost is None else cost for cost, budget in zip(baseline.by_seed, baseline.budgets, strict=True)]
    if min(expected, default=0.0) <= 0:
        return Ratio(why="no ratio: the baseline starts at the target")
    ratios = [theirs / ours for theirs, ours in zip(expected, arm.by_seed, strict=True) if ours]
    mean, half = _log_interval(ratios, level)
    if baseline.reached < len(baseline.by_seed):
        return Ratio(value=math.exp(mean), at_least=True)
    if half is None:
        return Ratio(value=math.exp(mean))
    return Ratio(value=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half))


def _log_interval(values: Sequence[float], level: float) -> tuple[float, float | None]:
    logs = [math.log(value) for value in values]
    mean = math.fsum(logs) / len(logs)
    if len(logs) < 2:
        return mean, None
    deviation = math.sqrt(math.fsum((log - mean) ** 2 for log in logs) / (len(logs) - 1))
    return mean, float(stdtrit(len(logs) - 1, 0.5 + level / 2)) * deviation / math.sqrt(len(logs))
