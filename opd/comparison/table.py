"""The comparison's table on the terminal and as CSV."""

import csv
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from opd.comparison.answers import sentences
from opd.comparison.costs import TOKENS
from opd.comparison.reach import Ratio
from opd.comparison.results import GREEDY, PRIMARY
from opd.comparison.statistics import Interval
from opd.comparison.summary import ArmSummary, Summary
from opd.comparison.wording import amount, percent, points, ratio_text, reach_text


def print_table(summary: Summary, report: Path, console: Console | None = None) -> None:
    """One row an arm, then the report's sentences and where it is."""
    console = console or Console()
    console.print(rich_table(summary))
    for sentence in sentences(summary):
        console.print(f"- {sentence}", markup=False, highlight=False, soft_wrap=not console.is_terminal)
    console.print(f"report: {report}", markup=False, highlight=False, soft_wrap=True)


def rich_table(summary: Summary) -> Table:
    """Accuracy on test, difference to the baseline and cost to the target, an arm a row; fits 80 columns (the report has the intervals)."""
    reference = summary.reference
    table = Table(
        title=summary.comparison.title or summary.comparison.name, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    k = max((arm.k for arm in summary.arms), default=0)
    headings = ("arm", f"avg@{k} T=1", "greedy", f"pass@{k}", f"vs {reference.label}", "verdict", "tokens to target", "ratio")
    for heading in headings:
        wraps, justify = heading in ("arm", "tokens to target"), "left" if heading in ("arm", "verdict") else "right"
        table.add_column(heading, justify=justify, no_wrap=not wraps, overflow="fold", min_width=len("> budget") if heading == headings[-2] else None)
    for arm in summary.arms:
        pair = summary.pair(arm.name, reference.name)
        ratio = arm.ratio.get(TOKENS)
        table.add_row(
            arm.label + (f" ({len(arm.finished)}/{arm.planned})" if len(arm.finished) < arm.planned else ""),
            _with_interval(arm.test()),
            _mean(arm.test(GREEDY)),
            _mean(arm.test(PRIMARY, "pass@k")),
            f"{points(pair.interval.mean)}{_half_width(pair.interval)}" if pair else "",
            ("did not learn" if arm.learned is False else pair.verdict if pair else "") if arm.trained else "",
            _to_target(arm),
            "" if ratio is None or ratio.value is None else ratio_text(Ratio(value=ratio.value, at_least=ratio.at_least)),
        )
        if arm.name == summary.comparison.base and summary.base_at_best is not None:
            decoding, interval = summary.base_at_best
            table.add_row(f"{arm.label} at its best, {short(decoding)}", _with_interval(interval), *[""] * 6)
    return table


def short(decoding: str) -> str:
    """temperature 0.2 -> T=0.2"""
    return decoding.replace("temperature ", "T=")


def _to_target(arm: ArmSummary) -> str:
    if not arm.trained:
        return ""
    typical = arm.reached[TOKENS].typical
    return amount(typical) if typical is not None else reach_text(arm.reached[TOKENS], TOKENS).split(" (")[0].split(" in ")[0]


def _mean(interval: Interval | None) -> str:
    return percent(interval.mean) if interval else "-"


def _with_interval(interval: Interval | None) -> str:
    return f"{percent(interval.mean)}{_half_width(interval)}" if interval else "-"


def _half_width(interval: Interval) -> str:
    return f" ±{percent(max(interval.high - interval.mean, interval.mean - interval.low))}" if math.isfinite(interval.high) else ""


def write_csv(path: Path, summary: Summary) -> None:
    """A row an arm; accuracies as fractions, tokens and seconds as numbers, empty where there is none."""
    rows = [_row(arm, summary) for arm in summary.arms]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _row(arm: ArmSummary, summary: Summary) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm.name, "label": arm.label, "seeds_finished": len(arm.finished), "seeds_planned": arm.planned, "k": arm.k}
    for name, decoding, metric in (
        ("avg_at_k_temperature_1", PRIMARY, "avg@k"),
        ("accuracy_greedy", GREEDY, "avg@k"),
        ("pass_at_k_temperature_1", PRIMARY, "pass@k"),
        ("maj_at_k_temperature_1", PRIMARY, "maj@k"),
    ):
        row |= _interval_cells(name, arm.test(decoding, metric))
    decoding, at_best = summary.base_at_best if summary.base_at_best and arm.name == summary.comparison.base else ("", None)
    row |= {"best_decoding": decoding, **_interval_cells("avg_at_k_best_decoding", at_best)}
    row["generalises_to"] = primary.scope if (primary := arm.test()) else ""
    pair = summary.pair(arm.name, summary.reference.name)
    row |= _interval_cells(f"minus_{summary.reference.name}", pair.interval if pair else None)
    row |= {"verdict": pair.verdict if pair else "", "holm_p": pair.holm_p if pair else "", "holm_over": pair.family if pair else ""}
    row |= {"detectable": _number(pair.detectable, 4) if pair else "", "seeds_needed": (pair.seeds_needed or "") if pair else ""}
    row |= _interval_cells("gain_over_base", arm.gain)
    row["learned"] = "" if arm.learned is None else arm.learned
    for cost in summary.costs:
        column = cost.replace(",", "").replace(" ", "_").replace("-", "_")
        reached, ratio = arm.reached[cost], arm.ratio.get(cost)
        digits = 6 if cost.startswith("money") else 1
        row[f"mean_{column}"] = _number(arm.costs.get(cost), digits)
        row[f"{column}_to_target"] = _number(reached.typical, digits) if arm.trained else ""
        row[f"{column}_to_target_text"] = reach_text(reached, cost) if arm.trained else ""
        row[f"{column}_ratio"] = ratio_text(ratio)
        point, matched = arm.per_point.get(cost), arm.matched.get(cost)
        for suffix in ("value", "low", "high"):
            row[f"{column}_per_point{'' if suffix == 'value' else '_' + suffix}"] = _number(getattr(point, suffix), 6) if point else ""
        row[f"equal_{column}"] = _number(matched.cost, 6) if matched else ""
        row |= _interval_cells(f"dev_at_equal_{column}", matched.accuracy if matched else None)
        row |= _interval_cells(f"dev_at_equal_{column}_minus_{summary.reference.name}", matched.difference if matched else None)
        row[f"verdict_at_equal_{column}"] = (matched.verdict or "") if matched else ""
    row["tuned"] = " ".join(f"{key}={value}" for key, value in arm.tuned.point.items()) if arm.tuned else ""
    row["tuning_generated_tokens"] = _number(arm.tuned.generated_tokens) if arm.tuned else ""
    row["tuning_seconds"] = _number(arm.tuned.seconds) if arm.tuned else ""
    row["allow"] = " ".join(arm.allowed)
    return row


def _interval_cells(name: str, interval: Interval | None) -> dict[str, Any]:
    values = (interval.mean, interval.low, interval.high) if interval else (None, None, None)
    return {f"{name}{suffix}": _number(value, 4) for suffix, value in zip(("", "_low", "_high"), values, strict=True)}


def _number(value: float | None, digits: int = 1) -> Any:
    return "" if value is None or not math.isfinite(value) else round(value, digits)
