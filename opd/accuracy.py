"""From judged answers to avg@k, pass@k and maj@k, with standard errors clustered by problem. Plain Python: no model, no tensor.

Legend: P problems, k answers a problem.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from scipy.special import stdtrit

from opd.run.folder import append_line


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """`row` is a line of eval.jsonl, `generations` the lines of its file under generations/ (row["generations"])."""

    row: Mapping[str, Any]
    generations: tuple[Mapping[str, Any], ...]


def decoding_name(temperature: float, top_p: float = 1.0, top_k: int = 0) -> str:
    """ "greedy", "temperature 0.7" or "temperature 0.6 top-p 0.95 top-k 20": how eval.jsonl names a decoding."""
    if temperature <= 0:
        return "greedy"
    return f"temperature {float(temperature)}" + f" top-p {top_p:g}" * (top_p < 1) + f" top-k {top_k}" * (top_k > 0)


def summarise(generations: Sequence[Mapping[str, Any]], k: int) -> dict[str, Any]:
    """The numbers of one evaluation from its generations, every problem with equal weight.

    A problem counts where at least one answer was judged; in pass@j where at least j were. A metric for which no problem counts is None:
    not known, and not 0. `stderr` belongs to avg@k: the standard deviation of the problems' means over sqrt(P), so answers to one problem
    are not mistaken for independent ones.
    """
    by_problem: dict[str, list[Mapping[str, Any]]] = {}
    for line in generations:
        judged = by_problem.setdefault(line["problem"], [])
        if line["status"] == "score":
            judged.append(line)
    problems = [lines for lines in by_problem.values() if lines]
    average = [statistics.fmean(line["correct"] for line in lines) for lines in problems]
    majority = [majority_vote([line["answer"] for line in lines], [line["correct"] for line in lines]) for lines in problems]
    passed = {j: [pass_at(len(lines), sum(line["correct"] for line in lines), j) for lines in problems if len(lines) >= j] for j in powers(k)}
    return {
        "n_problems": len(problems),
        "k": k,
        "avg@k": _known(_mean, average),
        "pass@k": _known(_mean, passed[k]),
        "maj@k": _known(_mean, majority),
        "stderr": _known(clustered_stderr, average),
        "pass@k_stderr": _known(clustered_stderr, passed[k]),
        "maj@k_stderr": _known(clustered_stderr, majority),
        "interval": interval(average),
        "pass@k_interval": interval(passed[k]),
        "maj@k_interval": interval(majority),
        "resolves": smallest_difference([[line["correct"] for line in lines] for lines in problems]),
        "pass_at": {str(j): _known(_mean, values) for j, values in passed.items()},
        "length": _mean([line["length"] for line in generations]),
        "truncated": _mean([line["finish"] == "length" for line in generations]),
        "unjudged": sum(line["status"] != "score" for line in generations),
    }


def powers(k: int) -> list[int]:
    """1, 2, 4 ... and k itself: where pass@j is reported."""
    return sorted({1 << n for n in range(k.bit_length()) if 1 << n <= k} | {k})


def pass_at(n: int, correct: int, k: int) -> float:
    """Unbiased probability that k of n answers, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    arXiv:2107.03374, equation 1. Raises ValueError where n < k.
    """
    if n < k:
        raise ValueError(f"pass@{k} needs at least {k} answers a problem, got {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_vote(answers: Sequence[str], correct: Sequence[bool]) -> float:
    """Expected correctness of the most frequent answer; ties are split evenly and empty answers do not vote.

    Where a verifier judged the same answer differently (wrong steps, say), the answer counts with its mean.
    """
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer:
            votes.setdefault(answer, []).append(right)
    most = max((len(held) for held in votes.values()), default=0)
    return _mean([statistics.fmean(held) for held in votes.values() if len(held) == most]) if most else 0.0


def clustered_stderr(values: Sequence[float]) -> float:
    """Standard error of the mean over problems; 0 with fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def interval(values: Sequence[float], level: float = 0.95) -> list[float]:
    """[low, high] around the mean of the problems' values, each in [0, 1]; [0, 1] without a problem.

    Wilson's interval (1927) with Student's quantile and as many problems as would give, at this mean, the variance that the values have: it
    stays in [0, 1], and thirty problems that all fail leave room for some that would not.
    """
    count, mean = len(values), _mean(values)
    if count < 2:
        return [0.0, 1.0]
    stderr = clustered_stderr(values)
    effective = mean * (1 - mean) / stderr**2 if stderr > 0 else count
    z = float(stdtrit(count - 1, 0.5 + level / 2))
    shrunk, spread = 1 + z * z / effective, z * math.sqrt(mean * (1 - mean) / effective + (z / (2 * effective)) ** 2)
    middle = mean + z * z / (2 * effective)
    return [max(0.0, (middle - spread) / shrunk), min(1.0, (middle + spread) / shrunk)]


def smallest_difference(correct: Sequence[Sequence[bool]], *, level: float = 0.95, power: float = 0.8) -> list[float]:
    """[at best, at worst] difference between two models' avg@k that these problems and answers would show, with this power, as not zero.

    At best: both models find the same problems hard, and the comparison is paired by problem, so that only the noise of the k answers is
    left (with one answer a problem it cannot be told apart from the problems, and is taken to be everything; where every problem is always or
    never solved, what one answer more of each kind would give). At worst: nothing in common.
    arXiv:2411.00640, section 5, where the variance of the conditional differences is 0 and twice the problems' own.
    """
    if len(correct) < 2:
        return [1.0, 1.0]
    means = [statistics.fmean(answers) for answers in correct]
    few = (sum(means) + 1) / (len(means) + 2)
    total = statistics.variance(means) or few * (1 - few)  # where all agree, what one problem more of each kind would give
    noise = [m * (1 - m) / (len(answers) - 1) if len(answers) > 1 else total for m, answers in zip(means, correct, strict=True)]
    noise = noise if any(noise) else [_least_noise([len(answers) for answers in correct])]
    quantiles = NormalDist().inv_cdf(0.5 + level / 2) + NormalDist().inv_cdf(power)
    return [min(1.0, quantiles * math.sqrt(2 * variance / len(correct))) for variance in (min(_mean(noise), total), total)]


def _least_noise(answers: Sequence[int]) -> float:
    """Variance of a problem's mean where no problem disagrees with itself."""
    rare = 1 / (sum(answers) + 2)
    return rare * (1 - rare) / _mean(answers)


def _known(statistic: Callable[[Sequence[float]], float], values: Sequence[float]) -> float | None:
    return statistic(values) if values else None


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def final_results(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """"test/<decoding>/avg@k" and the like from the lines of eval.jsonl, where they are known: what a table of runs shows."""
    names = ("avg@k", "pass@k", "maj@k", "stderr")
    return {f"test/{row['decoding']}/{name}": row[name] for row in rows if row["split"] == "test" for name in names if row.get(name) is not None}


def write_evaluation(folder: Path, result: EvalResult) -> None:
    """Add the row to eval.jsonl and write its generations; the row comes last, so it never names a missing file."""
    path = folder / result.row["generations"]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in result.generations), encoding="utf-8")
    scratch.replace(path)
    append_line(folder / "eval.jsonl", result.row)
