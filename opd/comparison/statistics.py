"""Intervals for results that have two sources of chance: the training seed and the choice of problems.

Legend: S seeds, P problems. A table [S, P] holds, for each seed and problem, the share of correct answers, or the difference of two
arms there. Seeds and problems are crossed: every seed is judged on the same problems.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

Table = NDArray[np.float64]
Verdict = Literal["better", "worse", "unresolved"]
MAX_PLANNED_SEEDS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its confidence interval; `df` are Satterthwaite's degrees of freedom. `scope`: what the interval generalises to."""

    mean: float
    low: float
    high: float
    stderr: float
    df: float
    p_value: float
    seeds: int
    problems: int
    scope: Literal["new seeds and new problems", "new problems, these seeds only", "new seeds, these problems only", "none"]

    def excludes(self, value: float) -> bool:
        return self.high < value or self.low > value


def two_way_interval(table: Table, *, level: float = 0.95) -> Interval:
    """Interval of the mean of a crossed table [S, P] when both seeds and problems are drawn at random.

    Model: x[s, p] = mean + seed[s] + problem[p] + rest[s, p]. With the mean squares of the two-way analysis of variance,
    Var(mean) = (MS_seed + MS_problem - MS_rest) / (S P), where a mean square below MS_rest stands for a variance of zero; degrees of
    freedom by Satterthwaite (Biometrics Bulletin 2, 1946). With one seed only problems vary, and `scope` says so.
    Raises ValueError for a table that is empty, not two-dimensional or not finite.
    """
    x = _checked(table)
    num_seeds, num_problems = x.shape
    mean = float(x.mean())
    if min(x.shape) == 1:
        return _one_way_interval(x, mean, level)
    by_seed, by_problem = x.mean(1), x.mean(0)
    rest = x - by_seed[:, None] - by_problem[None, :] + mean
    df_seed, df_problem = num_seeds - 1, num_problems - 1
    ms_seed = num_problems * float(((by_seed - mean) ** 2).sum()) / df_seed
    ms_problem = num_seeds * float(((by_problem - mean) ** 2).sum()) / df_problem
    ms_rest = float((rest**2).sum()) / (df_seed * df_problem)
    total = max(ms_seed, ms_rest) + max(ms_problem, ms_rest) - ms_rest
    spread = ms_seed**2 / df_seed + ms_problem**2 / df_problem + ms_rest**2 / (df_seed * df_problem)
    df = max(1.0, total**2 / spread) if spread > 0 else float(df_seed)
    return _student_t(mean, math.sqrt(total / x.size), df, x.shape, "new seeds and new problems", level)


def _one_way_interval(x: Table, mean: float, level: float) -> Interval:
    values = x.ravel()
    if values.size == 1:
        return Interval(mean=mean, low=-math.inf, high=math.inf, stderr=math.inf, df=0.0, p_value=1.0, seeds=1, problems=1, scope="none")
    scope = "new problems, these seeds only" if x.shape[0] == 1 else "new seeds, these problems only"
    return _student_t(mean, float(values.std(ddof=1)) / math.sqrt(values.size), values.size - 1.0, x.shape, scope, level)


def _student_t(mean: float, stderr: float, df: float, shape: tuple[int, int], scope: str, level: float) -> Interval:
    half = float(stdtrit(df, 0.5 + level / 2)) * stderr
    if stderr > 0:
        p_value = 2 * float(stdtr(df, -abs(mean) / stderr))
    else:
        p_value = 1.0 if mean == 0 else 0.0
    return Interval(
        mean=mean, low=mean - half, high=mean + half, stderr=stderr, df=df, p_value=p_value, seeds=shape[0], problems=shape[1], scope=scope
    )


def crossed_bootstrap(table: Table, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean: seeds and problems are resampled with replacement, independently of each other.

    Shown beside the two-way interval; with few seeds it is too narrow (S values cannot show more spread than they have).
    """
    x = _checked(table)
    random = np.random.default_rng(seed)
    num_seeds, num_problems = x.shape
    seed_weights = random.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=draws) / num_seeds
    problem_weights = random.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=draws) / num_problems
    means = np.einsum("ds,sp,dp->d", seed_weights, x, problem_weights, optimize=True)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def verdict(interval: Interval) -> Verdict:
    """Whether the first of two arms is better: "unresolved" where the interval of the difference holds zero."""
    if not interval.excludes(0.0):
        return "unresolved"
    return "better" if interval.mean > 0 else "worse"


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm, Scandinavian Journal of Statistics 6, 1979): the family-wise error is kept."""
    order = sorted(range(len(p_values)), key=lambda n: p_values[n])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, n in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[n]))
        adjusted[n] = running
    return adjusted


def detectable_difference(interval: Interval, *, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest true difference that such an interval would exclude zero for with the given probability."""
    if not math.isfinite(interval.stderr) or interval.df <= 0:
        return math.inf
    quantiles = stdtrit(interval.df, np.array([0.5 + level / 2, power]))
    return float(quantiles.sum()) * interval.stderr


def seeds_to_resolve(table: Table, *, level: float = 0.95, power: float = 0.8) -> int | None:
    """How many seeds would resolve the observed mean of a table [S, P] with the given probability, its spread being the true one.

    None where more than 100 would be needed or more seeds would not help (then more problems might).
    """
    x = _checked(table)
    num_seeds, num_problems = x.shape
    if num_seeds < 2 or num_problems < 2 or x.mean() == 0:
        return None
    rest = x - x.mean(1, keepdims=True) - x.mean(0, keepdims=True) + x.mean()
    var_rest = float((rest**2).sum()) / ((num_seeds - 1) * (num_problems - 1))
    var_seed = max(0.0, float(x.mean(1).var(ddof=1)) - var_rest / num_problems)
    var_problem = max(0.0, float(x.mean(0).var(ddof=1)) - var_rest / num_seeds)
    for planned in range(2, MAX_PLANNED_SEEDS + 1):
        from_seeds = var_seed / planned + var_rest / (planned * num_problems)
        total = from_seeds + var_problem / num_problems
        df = total**2 / (from_seeds**2 / (planned - 1) + (var_problem / num_problems) ** 2 / (num_problems - 1)) if total > 0 else planned - 1
        if abs(float(x.mean())) >= float(stdtrit(df, np.array([0.5 + level / 2, power])).sum()) * math.sqrt(total):
            return planned
    return None


def _checked(table: Table) -> Table:
    x = np.asarray(table, dtype=np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"expected results of at least one seed and one problem as a table [seeds, problems], found shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("results hold a value that is not finite: leave out problems that some seed could not judge")
    return x
