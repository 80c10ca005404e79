"""Numbers as text, and the report's sentences: every one is made from the numbers of the summary, none is written by hand."""

import math
import statistics
from collections.abc import Sequence

from opd.comparison.costs import PerPoint
from opd.comparison.reach import Ratio, Reach
from opd.comparison.results import GREEDY, PRIMARY
from opd.comparison.statistics import Interval
from opd.comparison.summary import ArmSummary, Summary

MINUS = "\N{MINUS SIGN}"
TOKENS = "generated tokens"


def percent(value: float) -> str:
    """0.8712 -> "87.1"."""
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of accuracies in percentage points, signed: 0.123 -> "+12.3"."""
    text = f"{100 * abs(value):.1f}"
    return text if float(text) == 0 else ("+" if value > 0 else MINUS) + text


def percent_interval(interval: Interval) -> str:
    """The bounds in percent, cut to what an accuracy can be; words where one cell leaves no spread to judge by."""
    if not math.isfinite(interval.low):
        return "no interval"
    return f"{percent(max(0.0, interval.low))} to {percent(min(1.0, interval.high))}"


def points_interval(low: float, high: float) -> str:
    return f"{points(low)} to {points(high)}" if math.isfinite(low) else "no interval"


def amount(value: float) -> str:
    """Tokens: 950 -> "950", 61234 -> "61.2 k", 1200000 -> "1.20 M"."""
    if value < 1_000:
        return f"{value:.0f}"
    if value < 999_500:
        return f"{value / 1_000:.1f} k" if value < 99_950 else f"{value / 1_000:.0f} k"
    return f"{value / 1_000_000:.2f} M"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6_000 else f"{seconds / 3_600:.1f} h"


def spent(cost: str, value: float) -> str:
    if cost.startswith("money, "):
        return f"{value:.3g} {cost.removeprefix('money, ')}" if value < 1000 else f"{value:,.0f} {cost.removeprefix('money, ')}"
    return duration(value) if cost.endswith("seconds") else amount(value)


def per_point_text(cost: str, found: PerPoint) -> str:
    """Cost of a point of gain with its interval, or why there is none."""
    if found.value is None:
        return found.why
    if found.low is None:
        return spent(cost, found.value)
    return f"{spent(cost, found.value)} ({spent(cost, found.low)} to {'any' if found.high is None else spent(cost, found.high)})"


def reach_text(found: Reach, cost: str) -> str:
    """Cost to the target with its interval, or "> budget"."""
    if found.typical is None:
        if not found.by_seed:
            return "no run"
        missed = len(found.by_seed) - found.reached
        if found.reached and missed == 0:
            return "nothing spent"
        largest = spent(cost, max(found.budgets))
        return f"> budget ({largest})" if not found.reached else f"> budget in {missed} of {len(found.by_seed)} seeds"
    if found.low is None or found.high is None:
        return spent(cost, found.typical)
    return f"{spent(cost, found.typical)} ({spent(cost, found.low)} to {spent(cost, found.high)})"


def ratio_text(ratio: Ratio | None) -> str:
    """The ratio with its interval, a lower bound, or why there is none."""
    if ratio is None or ratio.value is None:
        return ratio.why if ratio else ""
    if ratio.at_least:
        return f"> {_times(ratio.value)}"
    if ratio.low is None or ratio.high is None or ratio.low == ratio.high:
        return _times(ratio.value)
    return f"{_times(ratio.value)} ({_times(ratio.low)} to {_times(ratio.high)})"


def _times(value: float) -> str:
    return f"{value:.0f}\N{MULTIPLICATION SIGN}" if value >= 100 else f"{value:.3g}\N{MULTIPLICATION SIGN}"


def sentences(summary: Summary) -> list[str]:
    """What the numbers say, most important first."""
    return [text for _, text in answers(summary)] + notes(summary)


def answers(summary: Summary) -> list[tuple[str, str]]:
    """(question, answer) of what a reader wants to know first: which arm, by how much, at what cost, how sure."""
    ranked = sorted((arm for arm in summary.arms if arm.trained and arm.test() is not None), key=lambda arm: arm.test().mean, reverse=True)
    if not ranked:
        return [("Which arm did best?", "No trained arm has a test result yet.")]
    found = [
        ("Which arm did best?", _winner(summary, ranked[0])),
        ("By how much?", _baseline(summary, ranked)),
        ("At what cost?", _cost(summary, ranked)),
        ("How sure is that?", _sure(summary, ranked[0])),
    ]
    return [(question, answer) for question, answer in found if answer]


def notes(summary: Summary) -> list[str]:
    """What else must be known before quoting the answers; nothing where there is no answer yet."""
    if not any(arm.trained and arm.test() is not None for arm in summary.arms):
        return []
    parts = [_base(summary), _not_learned(summary), _collapsed(summary), _missing(summary), _edges(summary)]
    return [part for part in parts if part]


def _winner(summary: Summary, best: ArmSummary) -> str:
    pairs = [pair for pair in summary.pairs if pair.left == best.name and pair.decoding == PRIMARY and summary.arm(pair.right).trained]
    by_verdict = {word: [_with_accuracy(summary.arm(pair.right)) for pair in pairs if pair.verdict == word] for word in ("better", "unresolved")}
    test = best.test()
    assert test is not None
    text = f"{best.label} has the highest test accuracy at temperature 1: {percent(test.mean)} % (95 % interval {percent_interval(test)})."
    if by_verdict["unresolved"]:
        text += f" It shares the first place with {listed(by_verdict['unresolved'])}: its lead over them may be chance (unresolved)."
    if by_verdict["better"]:
        text += f" It is better than {listed(by_verdict['better'])}."
    return text


def _with_accuracy(arm: ArmSummary) -> str:
    test = arm.test()
    return f"{arm.label} ({percent(test.mean)} %)" if test else arm.label


def _baseline(summary: Summary, ranked: Sequence[ArmSummary]) -> str:
    reference = summary.reference
    found = [(arm, pair) for arm in ranked if (pair := summary.pair(arm.name, reference.name)) is not None]
    if not found:
        return ""
    first, pair = found[0]
    bounds = points_interval(pair.interval.low, pair.interval.high)
    text = f"{first.label} minus {reference.label}, the baseline, is {points(pair.interval.mean)} points ({bounds}): {pair.verdict}."
    groups = []
    for word in ("better", "unresolved", "worse"):
        members = [f"{arm.label} by {points(pair.interval.mean)}" for arm, pair in found[1:] if pair.verdict == word]
        if members:
            groups.append(f"{word}, {listed(members)}")
    return text + (f" The others against {reference.label}: {'; '.join(groups)}." if groups else "")


def _cost(summary: Summary, ranked: Sequence[ArmSummary]) -> str:
    reference, best = summary.reference, ranked[0]
    text = f"Every run may spend {summary.comparison.budget.spell(summary.comparison.prices.currency)}. A run of {best.label} spent {_whole(best)}"
    text += f"; one of {reference.label} {_whole(reference)}." if best.name != reference.name and reference.costs else "."
    return f"{text} {_to_target(summary, ranked)}"


def _whole(arm: ArmSummary) -> str:
    generated, scored = amount(arm.costs["generated tokens"]), amount(arm.costs["learner and teacher tokens"])
    return f"{generated} generated tokens, {scored} tokens in learner and teacher, and {duration(arm.costs['training seconds'])} of training"


def _to_target(summary: Summary, ranked: Sequence[ArmSummary]) -> str:
    """What the target cost the best arm, the cheapest one and the baseline."""
    reference, best, goal = summary.reference, ranked[0], f"{percent(summary.comparison.target)} % on the dev split"
    reached = [arm for arm in ranked if arm.reached[TOKENS].typical is not None]
    if not reached:
        return f"No arm reached {goal} with every seed inside its budget."
    cheapest = min(reached, key=lambda arm: arm.reached[TOKENS].typical or math.inf)
    shown = list({arm.name: arm for arm in (cheapest, best, reference)}.values())
    spelled = [f"{arm.label} {_spent_words(arm.reached[TOKENS])}" for arm in shown]
    text = f"Generated tokens to {goal}: {spelled[0]}, the fewest{''.join(f'; {words}' for words in spelled[1:])}."
    if cheapest.name == reference.name:
        return text
    ratios = [(cost, cheapest.ratio[cost]) for cost in cheapest.ratio if cheapest.ratio[cost].value is not None]
    if not ratios:
        return f"{text} No ratio is taken: {cheapest.ratio[TOKENS].why.removeprefix('no ratio: ')}."
    words = [f"{_ratio_words(ratio)} the {cost}" for cost, ratio in ratios]
    return f"{text} To get there {reference.label} needs {listed(words)} that {cheapest.label} needs."


def _spent_words(found: Reach) -> str:
    missed = len(found.by_seed) - found.reached
    if found.typical is not None or not missed:
        return reach_text(found, TOKENS)
    return f"missed it in {missed} of {len(found.by_seed)} seeds" if found.reached else "missed it in every seed"


def _ratio_words(ratio: Ratio) -> str:
    return ratio_text(ratio).replace("> ", "more than ", 1)


def _base(summary: Summary) -> str:
    base = next((arm for arm in summary.arms if not arm.trained), None)
    plain = base.test() if base else None
    if base is None or plain is None:
        return ""
    text = f"Untrained ({base.label}): {percent(plain.mean)} % at temperature 1"
    greedy = base.test(GREEDY)
    if greedy is not None:
        text += f", {percent(greedy.mean)} % greedy"
    if summary.base_at_best is not None:
        decoding, interval = summary.base_at_best
        text += f"; at its best decoding on dev ({decoding}) {percent(interval.mean)} % on test"
    return f"{text}."


def _not_learned(summary: Summary) -> str:
    labels = [f"{arm.label} ({_gain(arm)})" for arm in summary.arms if arm.learned is False]
    return f"Did not learn here, because the gain over the base is not above zero beyond its interval: {listed(labels)}." if labels else ""


def _gain(arm: ArmSummary) -> str:
    assert arm.gain is not None
    return f"{points(arm.gain.mean)} points, {points_interval(arm.gain.low, arm.gain.high)}"


def _collapsed(summary: Summary) -> str:
    texts = []
    for arm in summary.arms:
        if arm.collapsed:
            seed, best, last = min(arm.collapsed, key=lambda found: found[2])
            share = f"{len(arm.collapsed)} of {len(arm.finished)} seeds"
            texts.append(f"{arm.label} in {share} (seed {seed}: dev accuracy from {percent(best)} % at best to {percent(last)} % at the end)")
    return f"Collapsed during training: {listed(texts)}. Test numbers belong to the checkpoint that was best on dev." if texts else ""


def _missing(summary: Summary) -> str:
    texts = [f"{arm.label} {len(arm.finished)} of {arm.planned} seeds" for arm in summary.arms if len(arm.finished) < arm.planned]
    return f"Not all runs finished, and the numbers rest on those that did: {listed(texts)}." if texts else ""


def _sure(summary: Summary, best: ArmSummary) -> str:
    """How far chance explains the best arm's lead over the baseline, then what the whole comparison can see."""
    pair = summary.pair(best.name, summary.reference.name)
    text = ""
    if pair is not None and math.isfinite(pair.interval.low):
        p = "under 0.001" if pair.holm_p < 0.001 else f"{pair.holm_p:.3f}"
        one_seed = "these seeds only" in pair.interval.scope
        what = "the choice of problems" if one_seed else "chance"
        chance = f"is not explained by {what}" if pair.verdict != "unresolved" else f"may be {what}"
        text = f"The difference between {best.label} and {summary.reference.label} {chance} (Holm's p {p}). "
        text += "What another seed gives is not known. " if one_seed else ""
    return text + _resolution(summary)


def _resolution(summary: Summary) -> str:
    trained = {arm.name for arm in summary.arms if arm.trained}
    pairs = [p for p in summary.pairs if p.decoding == PRIMARY and p.left < p.right and {p.left, p.right} <= trained]
    if not pairs:
        return ""
    unresolved = sum(pair.verdict == "unresolved" for pair in pairs)
    smallest = statistics.median(pair.detectable for pair in pairs)
    seeds = min(pair.interval.seeds for pair in pairs)
    most = max(pair.interval.seeds for pair in pairs)
    number, problems = f"{seeds}" if seeds == most else f"{seeds} to {most}", min(pair.interval.problems for pair in pairs)
    text = f"Measured with {number} seed{'s' if most > 1 else ''} x {problems} problems: intervals speak about {pairs[0].interval.scope}."
    text += f" {unresolved} of {len(pairs)} pairs of trained arms {'is' if unresolved == 1 else 'are'} unresolved." if len(pairs) > 1 else ""
    if math.isfinite(smallest):
        text += f" A true difference of {percent(smallest)} points would be seen in four of five such comparisons."
    return text + (" Fewer than five seeds show the machinery; claims need five or more." if seeds < 5 else "")


def _edges(summary: Summary) -> str:
    labels = [arm.label for arm in summary.arms if arm.tuned is not None and arm.tuned.at_edge]
    if not labels:
        return ""
    return f"The search chose a value at the edge of its grid for {listed(labels)}: a wider grid might do better there."


def listed(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return ", ".join(items[:-1]) + (" and " if len(items) > 1 else "") + items[-1] if items else ""
