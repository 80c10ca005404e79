"""Intervals for results that have two sources of chance: the training seed and the choice of problems.

Legend: S seeds, P problems. A table [S, P] holds, for each seed and problem, the share of correct answers, or the difference of two
arms there. Seeds and problems are crossed: every seed is judged on the same problems. Coverage: benchmarks/coverage.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, stdtr, stdtrit

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


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanSquares:
    """Mean squares and degrees of freedom of a two-way analysis of variance without replication, for a table [S, P]."""

    seed: float
    problem: float
    rest: float
    df_seed: int
    df_problem: int

    @property
    def df_rest(self) -> int:
        return self.df_seed * self.df_problem


def mean_squares(x: Table) -> MeanSquares:
    """Of a table [S, P] with at least two seeds and two problems."""
    num_seeds, num_problems = x.shape
    mean, by_seed, by_problem = x.mean(), x.mean(1), x.mean(0)
    rest = x - by_seed[:, None] - by_problem[None, :] + mean
    df_seed, df_problem = num_seeds - 1, num_problems - 1
    return MeanSquares(
        seed=num_problems * float(((by_seed - mean) ** 2).sum()) / df_seed,
        problem=num_seeds * float(((by_problem - mean) ** 2).sum()) / df_problem,
        rest=float((rest**2).sum()) / (df_seed * df_problem),
        df_seed=df_seed,
        df_problem=df_problem,
    )


def two_way_interval(table: Table, *, level: float = 0.95) -> Interval:
    """Interval of the mean of a crossed table [S, P] when both seeds and problems are drawn at random.

    Model: x[s, p] = mean + seed[s] + problem[p] + rest[s, p]. With the mean squares of the two-way analysis of variance,
    Var(mean) = (MS_seed + MS_problem - MS_rest) / (S P), where a mean square below MS_rest stands for a variance of zero; degrees of
    freedom by `satterthwaite`. With one seed only problems vary, and `scope` says so. Equal cells: `_without_spread`.
    Raises ValueError for a table that is empty, not two-dimensional or not finite.
    """
    x = _checked(table)
    mean = float(x.mean())
    if x.size > 1 and np.ptp(x) == 0:
        return _without_spread(mean, x.shape, level)
    if min(x.shape) == 1:
        return _one_way_interval(x, mean, level)
    ms = mean_squares(x)
    total = max(ms.seed, ms.rest) + max(ms.problem, ms.rest) - ms.rest
    df = satterthwaite((ms.seed, ms.df_seed), (ms.problem, ms.df_problem), (ms.rest, ms.df_rest))
    return _student_t(mean, math.sqrt(total / x.size), df, x.shape, "new seeds and new problems", level)


def share_interval(table: Table, *, level: float = 0.95) -> Interval:
    """two_way_interval for shares: standard error and degrees of freedom are carried to the logit scale (delta method) and the bounds back.

    So bounds stay within 0 and 1 and lean away from the nearer end, where a symmetric interval covers too little (benchmarks/coverage.py, shares).
    """
    plain = two_way_interval(table, level=level)
    if not math.isfinite(plain.stderr):
        return plain
    if not 0 < plain.mean < 1:
        return replace(plain, low=max(0.0, plain.low), high=min(1.0, plain.high))
    half = float(stdtrit(plain.df, 0.5 + level / 2)) * plain.stderr / (plain.mean * (1 - plain.mean))
    return replace(plain, low=float(expit(logit(plain.mean) - half)), high=float(expit(logit(plain.mean) + half)))


def satterthwaite(seed: tuple[float, int], problem: tuple[float, int], rest: tuple[float, int]) -> float:
    """Degrees of freedom of MS_seed + MS_problem - MS_rest, each given as (mean square, its degrees of freedom).

    Satterthwaite (Biometrics Bulletin 2, 1946) with two changes of ours. A mean square that comes out small by chance makes the plain formula
    promise too many degrees of freedom (3 seeds that make nine tenths of the variance: 92.2 % covered), so each enters times 1 + 8 / df^2. One
    below MS_rest, whose variance is taken as zero, has no spread where 4 or more degrees of freedom say so (identical arms: 98.4 % covered at
    10 seeds and 30 problems otherwise). By simulated mean squares over all shares of the variance, with 10 to 256 problems: 94.5 to 99.8 % are
    covered at 3 seeds, 94.6 to 98.3 % at 5, 94.8 to 98.1 % at 10. The variance itself stays as it is.
    """
    (ms_seed, df_seed), (ms_problem, df_problem), (ms_rest, df_rest) = ((square * (1 + 8 / df**2), df) for square, df in (seed, problem, rest))
    total = max(ms_seed, ms_rest) + max(ms_problem, ms_rest) - ms_rest
    spread = ms_rest**2 / df_rest
    for widened, (square, df) in ((ms_seed, seed), (ms_problem, problem)):
        spread += 0.0 if square <= rest[0] and df >= 4 else widened**2 / df
    return max(1.0, total**2 / spread) if spread > 0 else float(df_seed)


def _without_spread(mean: float, shape: tuple[int, int], level: float) -> Interval:
    """Where all cells are equal no variance can be estimated, and none is claimed to be zero.

    With P problems: Clopper and Pearson's bound (Biometrika 26, 1934; close to the rule of three, 3 / P): less than 1 - ((1 - level) / 2)^(1 / P)
    of all problems have another value, each at most 1 away, as far as these seeds go. With one problem there is no interval.
    """
    num_seeds, num_problems = shape
    if num_problems == 1:
        return Interval(mean=mean, low=-math.inf, high=math.inf, stderr=math.inf, df=0.0, p_value=1.0, seeds=num_seeds, problems=1, scope="none")
    half, df = 1 - (0.5 - level / 2) ** (1 / num_problems), num_problems - 1.0
    return Interval(
        mean=mean,
        low=mean - half,
        high=mean + half,
        stderr=half / float(stdtrit(df, 0.5 + level / 2)),
        df=df,
        p_value=min(1.0, 2 * (1 - min(1.0, abs(mean))) ** num_problems),
        seeds=num_seeds,
        problems=num_problems,
        scope="new problems, these seeds only",
    )


def _one_way_interval(x: Table, mean: float, level: float) -> Interval:
    values = x.ravel()
    if values.size == 1:
        return Interval(mean=mean, low=-math.inf, high=math.inf, stderr=math.inf, df=0.0, p_value=1.0, seeds=1, problems=1, scope="none")
    scope = "new problems, these seeds only" if x.shape[0] == 1 else "new seeds, these problems only"
    return _student_t(mean, float(values.std(ddof=1)) / math.sqrt(values.size), values.size - 1.0, x.shape, scope, level)


def _student_t(mean: float, stderr: float, df: float, shape: tuple[int, int], scope: str, level: float) -> Interval:
    half = float(stdtrit(df, 0.5 + level / 2)) * stderr
    p_value = 2 * float(stdtr(df, -abs(mean) / stderr))
    return Interval(
        mean=mean, low=mean - half, high=mean + half, stderr=stderr, df=df, p_value=p_value, seeds=shape[0], problems=shape[1], scope=scope
    )


def crossed_bootstrap(table: Table, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean: seeds and problems are resampled with replacement, independently of each other.

    Shown beside the two-way interval; with few seeds it is too narrow (S values cannot show more spread than they have).
    """
    x = _checked(table)
    seed_weights, problem_weights = _resampled(*x.shape, draws, seed)
    means = ((seed_weights @ x) * problem_weights).sum(1)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _resampled(num_seeds: int, num_problems: int, draws: int, seed: int) -> tuple[Table, Table]:
    """Shares of each seed [draws, S] and of each problem [draws, P] in a resampled table."""
    random = np.random.default_rng(seed)
    return tuple(random.multinomial(size, np.full(size, 1 / size), size=draws) / size for size in (num_seeds, num_problems))  # type: ignore[return-value]


def verdict(interval: Interval, *, p_value: float | None = None, level: float = 0.95) -> Verdict:
    """Whether the first of two arms is better: "unresolved" where the interval of the difference holds zero.

    p_value: the one corrected for the number of differences (`holm`); above 1 - level the verdict is "unresolved" too.
    """
    if not interval.excludes(0.0) or (p_value is not None and p_value > 1 - level):
        return "unresolved"
    return "better" if interval.mean > 0 else "worse"


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm, Scandinavian Journal of Statistics 6, 1979): the family-wise error is kept."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, n in enumerate(_by_size(p_values)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[n]))
        adjusted[n] = running
    return adjusted


def holm_levels(p_values: Sequence[float], *, level: float = 0.95) -> list[float]:
    """The confidence level that Holm's procedure holds each of the p-values to: 1 - (1 - level) / (number - rank)."""
    ranks = {n: rank for rank, n in enumerate(_by_size(p_values))}
    return [1 - (1 - level) / (len(p_values) - ranks[n]) for n in range(len(p_values))]


def _by_size(p_values: Sequence[float]) -> list[int]:
    return sorted(range(len(p_values)), key=lambda n: p_values[n])


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
    ms = mean_squares(x)
    var_seed = max(0.0, (ms.seed - ms.rest) / num_problems)
    from_problems = max(0.0, (ms.problem - ms.rest) / num_seeds) / num_problems  # no seed takes that away
    for planned in range(2, MAX_PLANNED_SEEDS + 1):
        seed, problem = ms.rest + num_problems * var_seed, ms.rest + planned * num_problems * from_problems
        total = (seed + problem - ms.rest) / (planned * num_problems)
        df = satterthwaite((seed, planned - 1), (problem, num_problems - 1), (ms.rest, (planned - 1) * (num_problems - 1)))
        if abs(float(x.mean())) >= float(stdtrit(df, np.array([0.5 + level / 2, power])).sum()) * math.sqrt(total):
            return planned
    return None


def paired_seeds_to_resolve(differences: Sequence[float], *, level: float = 0.95, power: float = 0.8) -> int | None:
    """As seeds_to_resolve for one difference a seed, without problems: a paired t interval. None where more than 100 would be needed."""
    x = np.asarray(differences, dtype=np.float64)
    if len(x) < 2 or x.mean() == 0:
        return None
    for planned in range(2, MAX_PLANNED_SEEDS + 1):
        quantiles = float(stdtrit(planned - 1, np.array([0.5 + level / 2, power])).sum())
        if abs(float(x.mean())) >= quantiles * float(x.std(ddof=1)) / math.sqrt(planned):
            return planned
    return None


def _checked(table: Table) -> Table:
    x = np.asarray(table, dtype=np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"expected results of at least one seed and one problem as a table [seeds, problems], found shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("results hold a value that is not finite: leave out problems that some seed could not judge")
    return x
