"""The numbers of a comparison, from runs to rows: what the report, the CSV and the terminal table all print."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean

from opd.comparison.config import Comparison
from opd.comparison.costs import COSTS, TOKENS, Cost, Matched, PerPoint, at_equal_cost, cost_per_point, costs_of
from opd.comparison.jobs import Tuned
from opd.comparison.ledgers import ArmLedger, arm_ledger
from opd.comparison.reach import Ratio, Reach, ratio_to_baseline, reach
from opd.comparison.results import GREEDY, PRIMARY, RunResult, best_decoding, difference, table
from opd.comparison.statistics import (
    Interval,
    Table,
    Verdict,
    crossed_bootstrap,
    detectable_difference,
    holm,
    holm_levels,
    seeds_to_resolve,
    share_interval,
    two_way_interval,
    verdict,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmSummary:
    """One arm over its finished seeds. tests: (decoding, metric) -> interval. gain: over the base at temperature 1, None without a base.

    reached, ratio, matched (dev accuracy at equal cost), per_point: by kind of cost. costs: means over seeds.
    collapsed: (seed, best, last dev accuracy) of runs that ended far below
    their best.
    """

    name: str
    label: str
    trained: bool
    runs: tuple[RunResult, ...]
    planned: int
    tests: Mapping[tuple[str, str], Interval]
    k: int
    gain: Interval | None
    reached: Mapping[str, Reach]
    ratio: Mapping[str, Ratio]
    costs: Mapping[str, float]
    matched: Mapping[str, Matched]
    per_point: Mapping[str, PerPoint]
    ledger: ArmLedger | None
    tuned: Tuned | None
    collapsed: tuple[tuple[int, float, float], ...]

    @property
    def finished(self) -> tuple[RunResult, ...]:
        return tuple(run for run in self.runs if run.finished)

    @property
    def failed(self) -> tuple[RunResult, ...]:
        return tuple(run for run in self.runs if not run.finished)

    @property
    def learned(self) -> bool | None:
        """Better than the base beyond the interval; None where there is nothing to compare with."""
        return None if self.gain is None else self.gain.low > 0

    @property
    def allowed(self) -> tuple[str, ...]:
        return tuple(sorted({name for run in self.runs for name in run.allowed}))

    def test(self, decoding: str = PRIMARY, metric: str = "avg@k") -> Interval | None:
        return self.tests.get((decoding, metric))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSummary:
    """left - right on the test split. family: how many differences Holm's correction was made over; verdict, holm_p, detectable (the smallest
    true difference to be seen) and seeds_needed hold after it. Two families a decoding: the arms against the baseline, and all other pairs.
    """

    left: str
    right: str
    decoding: str
    interval: Interval
    bootstrap: tuple[float, float]
    verdict: Verdict
    holm_p: float
    detectable: float
    seeds_needed: int | None
    family: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A whole comparison. costs: what a point of a curve has cost, by kind. base_at_best: (decoding chosen on dev, its test interval) of the
    untrained arm. against_best: trained arm -> the generated tokens that the best one needed for the target over those that this arm needed.
    """

    comparison: Comparison
    costs: Mapping[str, Cost]
    arms: tuple[ArmSummary, ...]
    pairs: tuple[PairSummary, ...]
    base_at_best: tuple[str, Interval] | None
    base_dev: float | None
    against_best: Mapping[str, Ratio]

    def arm(self, name: str) -> ArmSummary:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def ranked(self) -> list[ArmSummary]:
        """Trained arms with a test result, the highest accuracy at temperature 1 first."""
        return _ranked(self.arms)

    @property
    def matched_costs(self) -> list[str]:
        """Kinds of cost at which some arm can be read at equal cost."""
        return [cost for cost in self.costs if any(cost in arm.matched for arm in self.arms)]

    @property
    def reference(self) -> ArmSummary:
        return self.arm(self.comparison.reference)

    def seeds_vary(self, pair: PairSummary) -> bool:
        """Whether another seed would give another difference: not between two arms that nobody trains."""
        return self.arm(pair.left).trained or self.arm(pair.right).trained

    def pair(self, left: str, right: str, decoding: str = PRIMARY) -> PairSummary | None:
        return next((p for p in self.pairs if (p.left, p.right, p.decoding) == (left, right, decoding)), None)


def summarise(comparison: Comparison, runs: Sequence[RunResult], tuned: Mapping[str, Tuned]) -> Summary:
    """Every number of the report from the reported runs; `tuned` is the search's outcome by arm, empty without one."""
    by_arm = {name: tuple(run for run in runs if run.arm == name) for name in comparison.arms}
    finished = {name: [run for run in mine if run.finished] for name, mine in by_arm.items()}
    base = comparison.base
    base_runs = finished.get(base, []) if base else []
    gains = {name: _gain(mine, base_runs) if comparison.arms[name].train else None for name, mine in finished.items()}
    learned = {name: gain is None or gain.low > 0 for name, gain in gains.items()}
    costs = costs_of(runs, comparison.rates, comparison.prices.devices)
    trained = {name: mine for name, mine in finished.items() if comparison.arms[name].train}
    matched = {cost: at_equal_cost(trained, take, comparison.reference) for cost, take in costs.items()}
    arms = tuple(
        replace(
            _arm(comparison, name, by_arm[name], gains[name], tuned.get(name), costs),
            ratio=_ratios(comparison, name, finished, learned, costs),
            matched={cost: found[name] for cost, found in matched.items() if name in found},
        )
        for name in comparison.arms
    )
    best = best_decoding(base_runs[0]) if base_runs else None
    at_best = table(base_runs, best, "avg@k") if best else None
    return Summary(
        comparison=comparison,
        costs=costs,
        arms=arms,
        pairs=tuple(pair for decoding in (PRIMARY, GREEDY) for pair in _pairs(comparison, finished, decoding)),
        base_at_best=(best, share_interval(at_best)) if best and at_best is not None else None,
        base_dev=base_runs[0].dev.get(PRIMARY) if base_runs else None,
        against_best=_against_best(comparison, arms, finished),
    )


def _ranked(arms: Sequence[ArmSummary]) -> list[ArmSummary]:
    found = [(interval.mean, arm) for arm in arms if arm.trained and (interval := arm.test()) is not None]
    return [arm for _, arm in sorted(found, key=lambda pair: -pair[0])]


def _against_best(comparison: Comparison, arms: Sequence[ArmSummary], finished: Mapping[str, Sequence[RunResult]]) -> dict[str, Ratio]:
    ranked = _ranked(arms)
    if not ranked:
        return {}
    best = ranked[0].name
    return {arm.name: _paired_ratio(comparison.target, finished[arm.name], finished[best], COSTS[TOKENS]) for arm in ranked[1:]}


def _gain(runs: Sequence[RunResult], base: Sequence[RunResult]) -> Interval | None:
    found = difference(runs, base, PRIMARY)
    return None if found is None else two_way_interval(found)


def _reach(runs: Sequence[RunResult], target: float, take: Cost) -> Reach:
    ordered = sorted(runs, key=lambda run: run.seed)
    return reach([[(take(point), point.accuracy) for point in run.curve] for run in ordered], target)


def _ratios(
    comparison: Comparison, name: str, finished: Mapping[str, Sequence[RunResult]], learned: Mapping[str, bool], costs: Mapping[str, Cost]
) -> dict[str, Ratio]:
    """The reference's cost over the arm's, by kind of cost, over the seeds that both finished."""
    reference = comparison.reference
    if not comparison.arms[name].train:
        return {}
    if name == reference:
        return dict.fromkeys(costs, Ratio(value=1.0) if learned[name] else Ratio(why="did not learn here"))
    known = {"arm_learned": learned[name], "baseline_learned": learned[reference]}
    return {cost: _paired_ratio(comparison.target, finished[name], finished[reference], take, **known) for cost, take in costs.items()}


def _paired_ratio(
    target: float, runs: Sequence[RunResult], others: Sequence[RunResult], take: Cost, *, arm_learned: bool = True, baseline_learned: bool = True
) -> Ratio:
    """What the target cost the others over what it cost these runs, over the seeds that finished in both."""
    seeds = {run.seed for run in runs} & {run.seed for run in others}
    if not seeds:
        return Ratio(why="no ratio: no seed finished in both arms")
    ours, theirs = (_reach([run for run in side if run.seed in seeds], target, take) for side in (runs, others))
    return ratio_to_baseline(ours, theirs, arm_learned=arm_learned, baseline_learned=baseline_learned)


def _arm(
    comparison: Comparison,
    name: str,
    runs: tuple[RunResult, ...],
    gain: Interval | None,
    tuned: Tuned | None,
    costs: Mapping[str, Cost],
) -> ArmSummary:
    settings = comparison.arms[name]
    finished = [run for run in runs if run.finished]
    tests, ends = {}, {cost: [take(run.end) for run in finished] for cost, take in costs.items()}
    for decoding in dict.fromkeys(decoding for run in finished for decoding in run.finals):
        for metric in ("avg@k", "pass@k", "maj@k"):
            values = table(finished, decoding, metric)
            if values is not None:
                tests[decoding, metric] = share_interval(values)
    return ArmSummary(
        name=name,
        label=settings.label or name,
        trained=settings.train,
        runs=runs,
        planned=len(comparison.seeds) if settings.train else 1,
        tests=tests,
        k=max((int(run.finals[PRIMARY].row["k"]) for run in finished if PRIMARY in run.finals), default=0),
        gain=gain,
        reached={cost: _reach(finished, comparison.target, take) for cost, take in costs.items()},
        ratio={},
        costs={cost: fmean(values) for cost, values in ends.items() if values},
        matched={},
        ledger=arm_ledger(finished, comparison.rates, comparison.prices.devices),
        per_point={cost: cost_per_point(values, gain) for cost, values in ends.items()} if settings.train else {},
        tuned=tuned,
        collapsed=tuple(found for run in finished if (found := _collapse(run)) is not None),
    )


def _collapse(run: RunResult) -> tuple[int, float, float] | None:
    """(seed, best, last) where the last dev accuracy is below half of the best one, or below the start by a tenth."""
    if len(run.curve) < 3:
        return None
    best, last, first = max(point.accuracy for point in run.curve), run.curve[-1].accuracy, run.curve[0].accuracy
    return (run.seed, best, last) if last < best / 2 or last < first - 0.1 else None


def _pairs(comparison: Comparison, finished: Mapping[str, Sequence[RunResult]], decoding: str) -> list[PairSummary]:
    tables = {}
    for left, right in combinations(comparison.arms, 2):
        values = difference(finished[left], finished[right], decoding)
        if values is not None:
            tables[left, right] = values
    found: dict[tuple[str, str], PairSummary] = {}
    for family in ([pair for pair in tables if (comparison.reference in pair) is against] for against in (True, False)):
        intervals = [two_way_interval(tables[pair]) for pair in family]
        p_values = [interval.p_value for interval in intervals]
        for pair, interval, holm_p, level in zip(family, intervals, holm(p_values), holm_levels(p_values), strict=True):
            found[pair] = _pair(pair, decoding, tables[pair], interval, holm_p=holm_p, level=level, family=len(family))
    return [one for pair in tables for one in (found[pair], _mirrored(found[pair]))]


def _pair(arms: tuple[str, str], decoding: str, values: Table, interval: Interval, *, holm_p: float, level: float, family: int) -> PairSummary:
    return PairSummary(
        left=arms[0],
        right=arms[1],
        decoding=decoding,
        interval=interval,
        bootstrap=crossed_bootstrap(values),
        verdict=verdict(interval, p_value=holm_p),
        holm_p=holm_p,
        detectable=detectable_difference(interval, level=level),
        seeds_needed=seeds_to_resolve(values, level=level),
        family=family,
    )


def _mirrored(pair: PairSummary) -> PairSummary:
    interval = replace(pair.interval, mean=-pair.interval.mean, low=-pair.interval.high, high=-pair.interval.low)
    opposite: Mapping[Verdict, Verdict] = {"better": "worse", "worse": "better", "unresolved": "unresolved"}
    bootstrap = (-pair.bootstrap[1], -pair.bootstrap[0])
    return replace(pair, left=pair.right, right=pair.left, interval=interval, bootstrap=bootstrap, verdict=opposite[pair.verdict])
