"""Test accuracy by groups of problems: by domain, and by how hard they are for the model that nobody trained."""

from collections.abc import Mapping
from dataclasses import dataclass

from opd.comparison.results import PRIMARY, table
from opd.comparison.statistics import Interval, share_interval
from opd.comparison.summary import Summary

LEVELS = ("never right", "sometimes right", "always right")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Problems that share a label, and every arm's accuracy on them (arm name -> interval; an arm without results is left out)."""

    label: str
    problems: tuple[str, ...]
    accuracy: Mapping[str, Interval]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """One way to group the test problems. by: what the groups are; note: what a reader must know about them."""

    by: str
    note: str
    groups: tuple[Group, ...]


def breakdowns(summary: Summary) -> list[Breakdown]:
    """By domain and by difficulty where the records name more than one, else by what the untrained model (or all arms together) got right."""
    finals = [run.finals[PRIMARY] for arm in summary.arms for run in arm.finished if PRIMARY in run.finals]
    found = []
    for by in ("domain", "difficulty"):
        labels = {problem: label for final in finals for problem, label in (final.domains if by == "domain" else final.difficulties).items()}
        if len(set(labels.values())) > 1:
            found.append(_grouped(summary, f"By {by}", f"As the records of the problems name their {by}.", labels, sorted(set(labels.values()))))
    if not any(breakdown.by == "By difficulty" for breakdown in found):
        labels, note = _hardness(summary)
        if len(set(labels.values())) > 1:
            found.append(_grouped(summary, "By difficulty", note, labels, [level for level in LEVELS if level in labels.values()]))
    return found


def _hardness(summary: Summary) -> tuple[dict[str, str], str]:
    """Problem -> how often it was solved: by the untrained arm, or where there is none, by all arms."""
    base = [arm for arm in summary.arms if arm.name == summary.comparison.base and arm.finished and PRIMARY in arm.finished[0].finals]
    arms = base or [arm for arm in summary.arms if arm.finished]  # of several untrained arms only the base: a teacher is not what they start from
    rows = [run.finals[PRIMARY].by_problem["avg@k"] for arm in arms for run in arm.finished if PRIMARY in run.finals]
    if not rows:
        return {}, ""
    means = {problem: sum(row[problem] for row in rows) / len(rows) for problem in set.intersection(*map(set, rows))}
    labels = {problem: LEVELS[0] if mean == 0 else LEVELS[2] if mean == 1 else LEVELS[1] for problem, mean in means.items()}
    k = base[0].k if base else 0
    answers = f"{k} answer{'s' if k > 1 else ''}"
    who = f"{base[0].label} was right on them: never, sometimes or always in {answers}" if base else "all arms were right on them"
    chosen = base[0].label if base else "every arm"
    absent = [level for level in LEVELS if level not in labels.values()]
    none = f" No problem was {' or '.join(absent)}." if absent else ""
    made = f"The groups were made with the answers of {chosen}, whose own accuracy they therefore give away."
    return labels, f"Problems by how often {who}. {made}{none}"


def _grouped(summary: Summary, by: str, note: str, labels: Mapping[str, str], order: list[str]) -> Breakdown:
    groups = []
    for label in order:
        problems = sorted(problem for problem, own in labels.items() if own == label)
        accuracy = {}
        for arm in summary.arms:
            runs = [run for run in arm.finished if PRIMARY in run.finals]
            shared = [problem for problem in problems if all(problem in run.finals[PRIMARY].by_problem["avg@k"] for run in runs)]
            values = table(runs, PRIMARY, "avg@k", shared) if shared else None
            if values is not None:
                accuracy[arm.name] = share_interval(values)
        groups.append(Group(label=label or "none named", problems=tuple(problems), accuracy=accuracy))
    if by == "By difficulty" and set(order) - set(LEVELS):  # names have no order of their own: easiest first
        groups.sort(key=lambda group: -sum(interval.mean for interval in group.accuracy.values()))
    return Breakdown(by=by, note=note, groups=tuple(groups))
