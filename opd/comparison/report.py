"""report.html: one self-contained page that opens offline, with CSV, LaTeX, PNG and SVG files beside it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opd.comparison import answers, wording
from opd.comparison.about import about, examined, sizes, splits, task
from opd.comparison.arms import recipe_rows
from opd.comparison.breakdown import Breakdown, breakdowns
from opd.comparison.charts import Axes, Level, interval_bar, interval_scale, line_chart, percent_axes, plain_axes
from opd.comparison.costs import TOKENS
from opd.comparison.curves import VITAL_LABELS, band, drawn_arms, first_alarms, marks, passed_band, vital_band
from opd.comparison.exports import latex_table, write_breakdowns, write_curves, write_pairs, write_runs
from opd.comparison.figures import write_figures
from opd.comparison.jobs import Tuned
from opd.comparison.provenance import commits_row, data_row, wall_clock, warnings
from opd.comparison.results import GREEDY, PRIMARY, RunResult
from opd.comparison.summary import ArmSummary, PairSummary, Summary
from opd.comparison.table import write_csv
from opd.comparison.wording import listed

NUM_STYLES = 8


def write_report(folder: Path, summary: Summary) -> Path:
    """Write report.html and the files beside it (CSV, LaTeX, PNG, SVG) into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    found = breakdowns(summary)
    write_csv(folder / "results.csv", summary)
    write_pairs(folder / "pairs.csv", summary)
    write_curves(folder / "curves.csv", summary)
    write_runs(folder / "runs.csv", summary)
    write_breakdowns(folder / "breakdown.csv", found)
    (folder / "results.tex").write_text(latex_table(summary), encoding="utf-8")
    pictures = write_figures(folder, summary)
    page = folder / "report.html"
    scratch = page.with_name(".report.html.tmp")
    beside = ["results.csv", "pairs.csv", "curves.csv", "runs.csv", "breakdown.csv", "results.tex", *(path.name for path in pictures)]
    scratch.write_text(render(summary, folder, found, beside), encoding="utf-8")
    scratch.replace(page)
    return page


def render(summary: Summary, folder: Path, found: list[Breakdown], beside: list[str]) -> str:
    """The page as text; run folders are named relative to `folder`, `beside` are the files that lie there."""
    comparison = summary.comparison
    styles = {arm.name: f"s{n % NUM_STYLES}{' dashed' if n >= NUM_STYLES else ''}" for n, arm in enumerate(drawn_arms(summary))}
    styles |= {arm.name: "undrawn" for arm in _trained(summary) if arm.name not in styles}
    untrained = [arm.name for arm in summary.arms if not arm.trained]
    styles |= {name: "base" if n == 0 else "base other" for n, name in enumerate(untrained)}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            **_said(summary),
            summary=summary,
            comparison=comparison,
            arms=summary.arms,
            reference=summary.reference,
            styles=styles,
            drawn=drawn_arms(summary),
            left_out=len(_trained(summary)) - len(drawn_arms(summary)),
            charts=charts(summary, styles),
            vitals=vitals(summary, styles),
            passed=passed(summary, styles),
            breakdowns=found,
            groups="By " + (" and ".join(one.by.removeprefix("By ") for one in found) or "groups of problems"),
            alarms=alarms(summary),
            recipe_rows=recipe_rows(summary),
            beside=beside,
            style=Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8")),
            forest=forest(summary),
            scale=Markup(interval_scale(_forest_reach(summary))),
            pairs=[pair for pair in summary.pairs if _first(summary, pair)],
            matrix=[arm for arm in summary.arms if arm.test() is not None],
            primary=PRIMARY,
            greedy=GREEDY,
            k=max((arm.k for arm in summary.arms), default=0),
            costs=list(summary.costs),
            link=lambda run: _relative(run.folder, folder),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {
        name: getattr(wording, name)
        for name in (
            "percent",
            "points",
            "percent_interval",
            "points_interval",
            "amount",
            "duration",
            "spent",
            "reach_text",
            "ratio_text",
            "per_point_text",
            "detectable_text",
            "p_text",
            "seeds_text",
        )  # fmt: skip
    }
    environment.globals |= {"recipe_text": recipe_text, "tuned_text": tuned_text, "trial_rows": trial_rows, "max": max, "len": len, "about": about}
    return environment


def _said(summary: Summary) -> dict[str, Any]:
    """What the page says in words."""
    known = [arm for arm in _trained(summary) if any(run.recipe for run in arm.runs)]
    return {
        "answers": answers.answers(summary),
        "notes": answers.notes(summary),
        "warnings": warnings(summary),
        "tasks": [said for said in dict.fromkeys(task(run.recipe) for arm in summary.arms for run in arm.runs) if said],
        "begun": begun(summary),
        "wall_clock": wall_clock(summary),
        "cheaper": answers.cheaper_text(summary),
        "few": answers.FEW_SEEDS,
        "known_recipes": [arm.label for arm in known],
        "problems": next((pair.interval.problems for pair in summary.pairs), 0),
        "setup": setup(summary),
        "failures": failures(summary),
        "silent": [arm.label for arm in _trained(summary) if arm.finished and not arm.costs[TOKENS]],
    }


def _trained(summary: Summary) -> list[ArmSummary]:
    return [arm for arm in summary.arms if arm.trained]


def _first(summary: Summary, pair: PairSummary) -> bool:
    order = [arm.name for arm in summary.arms]
    return order.index(pair.left) < order.index(pair.right)


def failures(summary: Summary) -> list[tuple[str, list[int], str]]:
    """(arm, seeds, state and reason) of runs that did not finish; runs of an arm that ended alike share a line."""
    found: dict[tuple[str, str], list[int]] = {}
    for arm in summary.arms:
        for run in arm.failed:
            state = "not run yet" if run.state == "missing" else run.state
            found.setdefault((arm.label, f"{state}: {run.why}" if run.why else state), []).append(run.seed)
    return [(label, seeds, reason) for (label, reason), seeds in found.items()]


def begun(summary: Summary) -> str:
    """Why the line of the base may lie beside the beginnings of the curves: other answers of the same model. Empty where there is no such line."""
    base = next((run for arm in summary.arms if arm.name == summary.comparison.base for run in arm.finished), None)
    other = next((run for arm in _trained(summary) for run in arm.finished if PRIMARY in run.dev_answers), None)
    if summary.base_dev is None or base is None or other is None:
        return ""
    ours, theirs = (f"{count} answer{'s' if count > 1 else ''}" for count in (base.dev_answers[PRIMARY], other.dev_answers[PRIMARY]))
    return f"The dotted line is the base, {ours} a dev problem; a curve begins with {theirs} a problem, drawn anew, so it may begin beside that line."


def charts(summary: Summary, styles: Mapping[str, str]) -> list[tuple[str, Markup]]:
    """(title, SVG) of dev accuracy against each kind of cost."""
    drawn = []
    levels = [Level(value=summary.comparison.target, style="target", text=f"target {wording.percent(summary.comparison.target)} %")]
    if summary.base_dev is not None:
        levels.append(Level(value=summary.base_dev, style="base", text=f"base on dev {wording.percent(summary.base_dev)} %"))
    for cost, take in summary.costs.items():
        bands = [found for arm in drawn_arms(summary) if (found := band(arm, take, styles[arm.name])) is not None]
        if all(found.x[-1] <= 0 for found in bands):
            continue
        unit, name = wording.time_unit(max(found.x[-1] for found in bands)) if cost.endswith("seconds") else (1.0, "")
        label = f"{cost.removesuffix('-seconds').removesuffix(' seconds')} time, {name}" if name else cost
        number = partial(_in_unit, unit) if name else _tick
        axes = replace(percent_axes(bands, levels, x_label=label, x_number=number), x_unit=unit, x_name=f" {name}" if name else "")
        crosses = [mark for arm in drawn_arms(summary) for mark in marks(arm, take, styles[arm.name])]
        title = f"Accuracy against {label.removesuffix(f', {name}') if name else cost}"
        drawn.append((title, Markup(line_chart(bands, axes, levels=levels, marks=crosses))))
    return drawn


def vitals(summary: Summary, styles: Mapping[str, str]) -> list[tuple[str, Markup]]:
    """(title, SVG) of answer length, entropy and truncation during training; what no run recorded is left out."""
    drawn = []
    for name, label, factor in VITAL_LABELS:
        bands = [found for arm in drawn_arms(summary) if (found := vital_band(arm, name, styles[arm.name])) is not None]
        if bands:
            axes = plain_axes(bands, x_label="generated tokens", y_label=label, x_number=_tick, y_number=partial(_plain_times, factor))
            drawn.append((label[0].upper() + label[1:], Markup(line_chart(bands, axes))))
    return drawn


def passed(summary: Summary, styles: Mapping[str, str]) -> Markup | None:
    """SVG of pass@k against k on test; None where every evaluation took one answer a problem."""
    shown = {arm.name for arm in drawn_arms(summary)}
    chosen = [arm for arm in summary.arms if arm.name in shown or not arm.trained]
    bands = [found for arm in chosen if (found := passed_band(arm, styles.get(arm.name, "base"))) is not None]
    if not bands:
        return None
    axes: Axes = percent_axes(bands, [], x_label="k, answers a problem", x_number=_plain, doubling=True)
    return Markup(line_chart(bands, axes))


def alarms(summary: Summary) -> list[tuple[ArmSummary, int, int, str, str]]:
    """(arm, seed, step, rule, message) of every first alarm of a guard rail, and of every collapse that no rule saw."""
    rows = []
    for arm in _trained(summary):
        for run in arm.runs:
            messages = {(line["step"], line["rule"]): line.get("message", "") for line in run.alarms}
            rows += [(arm, run.seed, step, rule, str(messages.get((step, rule), ""))) for step, rule in first_alarms(run)]
        for seed, best, last in arm.collapsed:
            step = next(run.curve[-1].step for run in arm.finished if run.seed == seed)
            said = f"dev accuracy ended at {wording.percent(last)} %, its best was {wording.percent(best)} %"
            rows.append((arm, seed, step, "fell by the end", said))
    return rows


def _plain_times(factor: float, value: float) -> str:
    return f"{factor * value:.3g}"


def _in_unit(unit: float, value: float) -> str:
    return f"{value / unit:.3g}"


def _tick(value: float) -> str:
    text = wording.amount(value)
    return text.replace(".0 k", " k").replace(".00 M", " M")


def forest(summary: Summary) -> list[tuple[ArmSummary, PairSummary, Markup]]:
    """Every arm's difference to the baseline with its interval drawn on one common axis."""
    reach = _forest_reach(summary)
    pairs = [(arm, pair) for arm in summary.arms if (pair := summary.pair(arm.name, summary.reference.name)) is not None]
    return [(arm, pair, Markup(interval_bar(pair, reach))) for arm, pair in pairs]


def _forest_reach(summary: Summary) -> float:
    pairs = [pair for arm in summary.arms if (pair := summary.pair(arm.name, summary.reference.name)) is not None]
    ends = [abs(bound) for pair in pairs for bound in (pair.interval.low, pair.interval.mean, pair.interval.high) if abs(bound) < 2]
    return max([*ends, 0.01]) * 1.05


def setup(summary: Summary) -> list[tuple[str, str]]:
    """(name, value) of what all arms share."""
    comparison = summary.comparison
    runs = [run for arm in summary.arms for run in arm.runs if run.facts]
    finals = [final for arm in summary.arms for run in arm.finished for final in run.finals.values()]
    rows = [("Budget of a run", comparison.budget.spell(comparison.prices.currency)), ("Seeds", ", ".join(map(str, comparison.seeds)))]
    if finals:
        alike = len({frozenset(final.by_problem["avg@k"]) for final in finals}) == 1
        shared = "the same for every run" if alike else "not the same in every run: a difference is over those that both arms answered"
        rows.append(("Problems", f"{finals[0].row['n_problems']} test problems of {finals[0].row['suite']}, {shared}"))
    rows += [("Dev and test", said) for said in dict.fromkeys(splits(run.recipe) for run in runs) if said]
    if comparison.tune is not None:
        grid = "; ".join(f"{key} in {', '.join(map(_plain, values))}" for key, values in comparison.tune.grid.items())
        how = f"by dev accuracy ({comparison.tune.metric}), seeds {_joined(comparison.tune.seeds)}; of equal ones the first of the grid"
        rows.append(("Search", f"{grid}, for every trained arm; {how}"))
    else:
        rows.append(("Search", "none: every arm as its recipe says"))
    if runs:
        facts = runs[-1].facts
        hardware = facts.get("hardware", {})
        rows.append(("Starting model", _starting_model(summary)))
        others = [f"{path} ({arm.label}): no arm starts from it" for arm in summary.arms if arm.name != comparison.base and (path := examined(arm))]
        rows += [("Examined only", said) for said in others]
        rows.append(("Machine", f"{hardware.get('cpu', '')}, {hardware.get('cpus', '?')} CPUs, {comparison.workers} workers of one thread"))
        rows += [(name, said) for name, said in (("Wall clock", wall_clock(summary)), ("Data", data_row(summary))) if said]
        rows.append(("Last run started", str(max(run.facts.get("created", "") for run in runs))))
        commits = commits_row(summary)
        rows.append(("Commits" if "," in commits else "Commit", commits))
    return rows


def _starting_model(summary: Summary) -> str:
    """What the trained arms start from, with its size; arm by arm where they do not start from the same model."""
    unnamed = "not recorded" if any(arm.runs for arm in summary.comparison.arms.values()) else "random weights"
    held: dict[str, list[str]] = {}
    for arm in summary.arms:
        if arm.trained or arm.name == summary.comparison.base:
            path = next((found for run in arm.runs if (found := run.recipe.get("model", {}).get("path"))), unnamed)
            held.setdefault(", ".join(part for part in (path, sizes(arm)) if part), []).append(arm.label)
    if len(held) == 1:
        return f"{next(iter(held))}: every trained arm starts from it"
    return "; ".join(f"{model}: {listed(labels)}" for model, labels in held.items())


def _joined(values: list[Any]) -> str:
    return ", ".join(map(str, values))


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def recipe_text(run: RunResult) -> str:
    """The resolved recipe as YAML, then what else the run folder knows about it."""
    said = splits(run.recipe)
    parts = [(f"# {said}\n" if said else "") + yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True, width=110)]
    if run.facts:
        parts.append("# environment\n" + yaml.safe_dump(dict(run.facts), sort_keys=False, allow_unicode=True, width=110))
    return "\n".join(parts) if run.recipe else "(no resolved.json in this folder)"


def tuned_text(tuned: Tuned | None) -> str:
    """The chosen point, e.g. "lr 0.0003"."""
    if tuned is None:
        return "not searched"
    if not tuned.point:
        return "every run of the search failed"
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {_plain(value)}" for key, value in tuned.point.items())


def trial_rows(tuned: Tuned) -> list[tuple[str, str, bool]]:
    """(point, dev score, chosen) of every trial."""
    rows = []
    for trial in tuned.trials:
        point = ", ".join(f"{key.rsplit('.', 1)[-1]} {_plain(value)}" for key, value in trial.point.items())
        score = "failed" if trial.score == float("-inf") else f"{wording.percent(trial.score)} %"
        rows.append((point, score, trial.point == tuned.point))
    return rows


def _relative(path: Path, start: Path) -> str:
    try:
        return path.resolve().relative_to(start.resolve()).as_posix()
    except ValueError:
        return path.as_posix()
