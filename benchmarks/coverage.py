"""How often the intervals of a comparison hold the true difference: simulated comparisons with crossed seeds and problems.

python benchmarks/coverage.py                 # -> benchmarks/results/coverage.json, and a table; about 3 minutes on one core

A comparison: two arms, S seeds, P shared problems, k answers a problem, right with probability
sigmoid(arm + problem + arm x problem + arm x seed + arm x seed x problem), every effect normal. True difference: that of the arms'
expected accuracies over new seeds and new problems, by quadrature (the null: 0). `collapse` breaks the model on purpose: one seed in
five loses half of its accuracy.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opd.comparison.statistics import crossed_bootstrap, mean_squares, share_interval, two_way_interval, verdict

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (3, 5, 10)
LEVELS = (1.0, 4.0, 6.0, 8.0)  # logits of an arm whose own accuracy is measured: 0.68 to 0.999
GAIN = 0.5  # logits that the better arm is ahead of the other
TABLES = 100  # drawn at once
DRAWS = 500  # of a bootstrap

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Standard deviations in logits. problem: shared by the arms; own: of an arm on a problem; seed, rest: of an arm's seed, there on a problem.

    collapse: the share of seeds that lose half of their accuracy.
    """

    problem: float = 1.5
    own: float = 0.0
    seed: float = 0.0
    rest: float = 0.0
    problems: int = 256
    samples: int = 8
    collapse: float = 0.0


MIXES = {
    "chance of answers only": Mix(),
    "problems": Mix(own=0.8),
    "problems, some seeds": Mix(own=0.8, seed=0.06, rest=0.3),
    "problems and seeds alike": Mix(own=0.8, seed=0.12, rest=0.3),
    "mostly seeds": Mix(own=0.5, seed=0.15, rest=0.5),
    "nearly only seeds": Mix(own=0.3, seed=0.25, rest=0.3),
    "30 problems": Mix(own=0.8, seed=0.2, rest=0.5, problems=30),
    "30 problems, one answer": Mix(own=0.8, seed=0.4, rest=0.5, problems=30, samples=1),
    "collapse": Mix(own=0.5, seed=0.15, rest=0.3, collapse=0.2),
}
OUTSIDE = ("collapse",)  # seeds far from normal: reported, not promised


def expected_accuracy(mean: float, mix: Mix) -> float:
    """An arm's accuracy over new seeds and problems: E[sigmoid(mean + normal)] by Gauss-Hermite, less what collapses take."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    spread = math.sqrt(mix.problem**2 + mix.own**2 + mix.seed**2 + mix.rest**2)
    whole = float((weights / (1 + np.exp(-(mean + spread * nodes)))).sum() / weights.sum())
    return whole * (1 - mix.collapse / 2)


def differences(random: np.random.Generator, mix: Mix, gain: float, seeds: int, simulations: int) -> Iterator[Array]:
    """Tables [S, P] of differences of avg@k between an arm that is `gain` logits ahead and the other, `simulations` of them."""
    for start in range(0, simulations, TABLES):
        num = min(TABLES, simulations - start)
        problem = random.normal(0, mix.problem, (num, 1, mix.problems))
        yield from _arm(random, mix, gain, problem, seeds) - _arm(random, mix, 0.0, problem, seeds)


def _arm(random: np.random.Generator, mix: Mix, mean: float, problem: Array, seeds: int) -> Array:
    num, _, problems = problem.shape
    logits = mean + problem + random.normal(0, mix.own, (num, 1, problems)) + random.normal(0, mix.seed, (num, seeds, 1))
    right = 1 / (1 + np.exp(-(logits + random.normal(0, mix.rest, (num, seeds, problems)))))
    right = right * np.where(random.random((num, seeds, 1)) < mix.collapse, 0.5, 1.0)
    return random.binomial(mix.samples, right) / mix.samples


def measure(mix: Mix, gain: float, seeds: int, *, simulations: int, bootstraps: int, seed: int) -> dict[str, float]:
    """Shares of simulated comparisons, 0 to 1; `from_seeds`: the share of the variance of the difference that seeds make."""
    random = np.random.default_rng((seed, seeds, round(1000 * gain)))
    true = expected_accuracy(gain, mix) - expected_accuracy(0.0, mix)
    covered, resampled, verdicts, widths, parts = [], [], [], [], []
    for table in differences(random, mix, gain, seeds, simulations):
        interval = two_way_interval(table)
        covered.append(interval.low <= true <= interval.high)
        widths.append(interval.high - interval.low)
        verdicts.append(verdict(interval))
        if len(resampled) < bootstraps:
            low, high = crossed_bootstrap(table, draws=DRAWS)
            resampled.append(low <= true <= high)
        ms = mean_squares(table)
        parts.append((ms.seed - ms.rest, ms.seed + ms.problem - ms.rest))
    from_seeds, whole = np.mean(parts, axis=0)
    return {
        "true_difference": true,
        "from_seeds": max(0.0, float(from_seeds / whole)),
        "covered": float(np.mean(covered)),
        "covered_bootstrap": float(np.mean(resampled)) if bootstraps else math.nan,
        "width": float(np.mean(widths)),
        "better": verdicts.count("better") / simulations,
        "worse": verdicts.count("worse") / simulations,
        "unresolved": verdicts.count("unresolved") / simulations,
    }


def measure_share(mix: Mix, level: float, seeds: int, *, simulations: int, seed: int) -> dict[str, float]:
    """How often intervals hold one arm's accuracy, of `level` logits: the one on the logit scale that accuracies have, and the symmetric one."""
    random = np.random.default_rng((seed, seeds, round(1000 * level)))
    true = expected_accuracy(level, mix)
    covered, symmetric = [], []
    for start in range(0, simulations, TABLES):
        num = min(TABLES, simulations - start)
        for table in _arm(random, mix, level, random.normal(0, mix.problem, (num, 1, mix.problems)), seeds):
            for held, interval in ((covered, share_interval(table)), (symmetric, two_way_interval(table))):
                held.append(interval.low <= true <= interval.high)
    return {"true_accuracy": true, "covered": float(np.mean(covered)), "covered_symmetric": float(np.mean(symmetric))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--bootstraps", type=int, default=500, help="simulations that are bootstrapped too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/coverage.json")
    options = parser.parse_args()
    started, rows = time.perf_counter(), []
    print(f"{'mix':26}{'gain':>6}{'seeds':>7}{'from seeds':>12}{'interval':>10}{'bootstrap':>11}{'better':>9}{'unresolved':>12}{'worse':>8}   %")
    for name, mix in MIXES.items():
        for gain in (0.0, GAIN):
            for seeds in SEEDS:
                found = measure(mix, gain, seeds, simulations=options.simulations, bootstraps=options.bootstraps, seed=options.seed)
                rows.append({"mix": name, "gain_logits": gain, "seeds": seeds, **found})
                shares = [f"{100 * found[key]:.1f}" for key in ("from_seeds", "covered", "covered_bootstrap", "better", "unresolved", "worse")]
                columns = "".join(f"{share:>{n}}" for share, n in zip(shares, (12, 10, 11, 9, 12, 8), strict=True))
                print(f"{name:26}{gain:6g}{seeds:7}{columns}", flush=True)
    shares = []
    print(f"\naccuracies of one arm\n{'mix':26}{'accuracy':>10}{'seeds':>7}{'interval':>10}{'symmetric':>11}   %")
    for name, mix in MIXES.items():
        for level in LEVELS:
            for seeds in SEEDS:
                held = measure_share(mix, level, seeds, simulations=options.simulations, seed=options.seed)
                shares.append({"mix": name, "level_logits": level, "seeds": seeds, **held})
                columns = "".join(f"{100 * held[key]:>{n}.1f}" for key, n in (("covered", 10), ("covered_symmetric", 11)))
                print(f"{name:26}{100 * held['true_accuracy']:10.1f}{seeds:7}{columns}", flush=True)
    promised = [row["covered"] for row in rows if row["mix"] not in OUTSIDE]
    at_most = max(row["covered"] for row in rows if row["seeds"] == max(SEEDS) and row["mix"] not in OUTSIDE)
    print(f"coverage without {', '.join(OUTSIDE)}: at least {100 * min(promised):.1f} %; at {max(SEEDS)} seeds at most {100 * at_most:.1f} %")
    settings = {"simulations": options.simulations, "bootstraps": options.bootstraps, "bootstrap_draws": DRAWS, "seed": options.seed}
    settings["seconds"] = round(time.perf_counter() - started)
    machine = {"processor": platform.machine(), "numpy": np.__version__}
    mixes = {name: asdict(mix) for name, mix in MIXES.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**settings, **machine, "mixes": mixes, "rows": rows, "shares": shares}, indent=1) + "\n")


if __name__ == "__main__":
    main()
