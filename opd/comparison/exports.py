"""Files that a paper's author pastes from, beside the page: pairs and curves as CSV, the main table as LaTeX."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.comparison.breakdown import Breakdown
from opd.comparison.costs import TOKENS
from opd.comparison.results import GREEDY, PRIMARY
from opd.comparison.statistics import Interval
from opd.comparison.summary import Summary
from opd.comparison.wording import MINUS, percent, percent_interval, points, points_interval, reach_text

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", MINUS: r"$-$", "\N{MULTIPLICATION SIGN}": r"$\times$",
}  # fmt: skip

DECODINGS = {"test_temperature_1": PRIMARY, "test_greedy": GREEDY}
RUN_COLUMNS = (
    "arm", "seed", "state", *DECODINGS, "entropy_first", "entropy_last", "length_first", "length_last", "dev_first", "dev_best", "dev_last",
    "generated_tokens", "learner_and_teacher_tokens", "seconds",
)  # fmt: skip


def write_pairs(path: Path, summary: Summary) -> None:
    """A row a pair and decoding: left minus right as fractions, with interval, p and verdict."""
    rows = [
        {
            "left": pair.left, "right": pair.right, "decoding": pair.decoding, "difference": pair.interval.mean, "low": pair.interval.low,
            "high": pair.interval.high, "df": pair.interval.df, "p": pair.interval.p_value, "holm_p": pair.holm_p, "verdict": pair.verdict,
            "seeds": pair.interval.seeds, "problems": pair.interval.problems, "detectable": pair.detectable, "seeds_needed": pair.seeds_needed or "",
        }
        for pair in summary.pairs
    ]  # fmt: skip
    _write(path, rows, ("left", "right", "decoding", "difference", "low", "high", "verdict"))


def write_curves(path: Path, summary: Summary) -> None:
    """A row an evaluation on dev: arm, seed, step, what training had cost by then, accuracy as a fraction."""
    rows = [
        {
            "arm": arm.name, "seed": run.seed, "step": point.step, "generated_tokens": point.generated_tokens,
            "learner_and_teacher_tokens": point.scored_tokens, "training_seconds": point.seconds, "accuracy": point.accuracy,
        }
        for arm in summary.arms
        for run in arm.runs
        for point in run.curve
    ]  # fmt: skip
    _write(path, rows, ("arm", "seed", "step", "accuracy"))


def write_runs(path: Path, summary: Summary) -> None:
    """A row a run: accuracies on test, entropy (nats) and answer length (tokens) of its first and last step, dev before, at best and at the end."""
    rows = []
    for arm in summary.arms:
        for run in arm.runs:
            row: dict[str, Any] = {"arm": arm.name, "seed": run.seed, "state": run.state}
            finals = {name: run.finals[decoding].row["avg@k"] for name, decoding in DECODINGS.items() if decoding in run.finals}
            row |= {name: float(accuracy) for name, accuracy in finals.items() if accuracy is not None}
            for name, vital in (("entropy", "entropy/student"), ("length", "length/mean")):
                if series := run.vitals.get(vital):
                    row |= {f"{name}_first": series[0][2], f"{name}_last": series[-1][2]}
            if run.curve:
                accuracies = [point.accuracy for point in run.curve]
                row |= {"dev_first": accuracies[0], "dev_best": max(accuracies), "dev_last": accuracies[-1]}
            row |= {"generated_tokens": run.end.generated_tokens, "learner_and_teacher_tokens": run.end.scored_tokens, "seconds": run.end.seconds}
            rows.append({column: row.get(column, "") for column in RUN_COLUMNS})
    _write(path, rows, RUN_COLUMNS)


def write_breakdowns(path: Path, found: Sequence[Breakdown]) -> None:
    """A row a group of problems and arm: accuracy as a fraction with its interval."""
    rows = [
        {"by": b.by, "group": group.label, "problems": len(group.problems), "arm": arm, "accuracy": i.mean, "low": i.low, "high": i.high}
        for b in found
        for group in b.groups
        for arm, i in group.accuracy.items()
    ]
    _write(path, rows, ("by", "group", "problems", "arm", "accuracy", "low", "high"))


def _write(path: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else list(columns))
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)


def latex_table(summary: Summary) -> str:
    r"""The main table for \input in a paper that loads booktabs: accuracies in percent with intervals, difference, verdict, cost to the target."""
    reference, k = summary.reference, max((arm.k for arm in summary.arms), default=0)
    head = ["Arm", f"avg@{k}, $T{{=}}1$", "greedy", f"pass@{k}", f"minus {escaped(reference.label)}", "verdict", "tokens to target"]
    lines = [
        "% " + _caption(summary),
        r"\begin{tabular}{lrrrrlr}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
    ]
    for arm in summary.arms:
        pair = summary.pair(arm.name, reference.name)
        difference = f"{points(pair.interval.mean)} ({points_interval(pair.interval.low, pair.interval.high)})" if pair else ""
        cells = [
            arm.label,
            _cell(arm.test()),
            _cell(arm.test(GREEDY)),
            _cell(arm.test(PRIMARY, "pass@k")),
            difference,
            pair.verdict if pair and arm.trained else "",
            reach_text(arm.reached[TOKENS], TOKENS) if arm.trained else "",
        ]
        lines.append(" & ".join(escaped(cell) for cell in cells) + r" \\")
        if arm.name == summary.comparison.base and summary.base_at_best is not None:
            decoding, interval = summary.base_at_best
            lines.append(" & ".join([escaped(f"{arm.label} at its best, {decoding}"), _cell(interval), *[""] * (len(head) - 2)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _caption(summary: Summary) -> str:
    comparison = summary.comparison
    budget = comparison.budget.spell(comparison.prices.currency)
    what = f"{comparison.title or comparison.name}: {budget} a run, {len(comparison.seeds)} seeds, 95 % intervals in brackets"
    return " ".join(f"{what}; target {100 * comparison.target:g} % on dev.".split())


def _cell(interval: Interval | None) -> str:
    return f"{percent(interval.mean)} ({percent_interval(interval)})" if interval else "--"


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(LATEX.get(letter, letter) for letter in text)
