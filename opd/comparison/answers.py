"""The report's sentences: every one is made from the numbers of the summary, the same ones that its tables show."""

import math
from itertools import combinations

from opd.comparison.about import examined, teacher_paths
from opd.comparison.costs import SCORED, SECONDS, TOKENS
from opd.comparison.reach import Ratio, Reach
from opd.comparison.results import GREEDY, PRIMARY
from opd.comparison.summary import ArmSummary, PairSummary, Summary
from opd.comparison.wording import MANY, listed, p_text, percent, percent_interval, points, points_interval, ratio_text, reach_text, shortened, spent

FEW_SEEDS = 5
CLOSE = 0.05  # arms further apart are not called tied, however little is known of their difference


def sentences(summary: Summary) -> list[str]:
    """What the numbers say, most important first."""
    return [text for _, text in answers(summary)] + notes(summary)


def answers(summary: Summary) -> list[tuple[str, str]]:
    """(question, answer of one or two sentences) of what a reader wants to know first: which arm, by how much, at what cost, how sure."""
    if not summary.ranked:
        return [("Which arm did best?", "No trained arm has a test result yet.")]
    found = [
        ("Which arm did best?", _winner(summary)),
        ("By how much?", _margin(summary)),
        ("At what cost?", _cost(summary)),
        ("How sure is that?", _sure(summary)),
    ]
    return [(question, answer) for question, answer in found if answer]


def notes(summary: Summary) -> list[str]:
    """What else must be known before quoting the answers; nothing where there is no answer yet."""
    if not summary.ranked:
        return []
    parts = [_base(summary), _unresolved(summary), _rates(summary), _not_learned(summary), _collapsed(summary), _missing(summary), _edges(summary)]
    return [part for part in parts if part]


def _winner(summary: Summary) -> str:
    best = summary.ranked[0]
    test = best.test()
    assert test is not None
    others = {arm.name for arm in summary.ranked[1:]}
    pairs = [pair for pair in summary.pairs if pair.left == best.name and pair.decoding == PRIMARY and pair.right in others]
    words = ("better", "unresolved", "worse")
    unresolved = {pair.right for pair in pairs if pair.verdict == "unresolved"}
    tied = [best, *(arm for arm in summary.ranked if arm.name in unresolved and _is_close(best, arm))]
    if len(tied) > 1 and not _resolved_among(summary, tied):
        return _tie(summary, tied)
    by_verdict = {word: [_with_accuracy(summary.arm(pair.right)) for pair in pairs if pair.verdict == word] for word in words}
    parts = [
        f"it is better than {shortened(by_verdict['better'])}" if by_verdict["better"] else "",
        f"its lead over {shortened(by_verdict['unresolved'])} is unresolved: it may be chance" if by_verdict["unresolved"] else "",
        f"over the seeds that both finished it is worse than {shortened(by_verdict['worse'])}" if by_verdict["worse"] else "",
    ]
    second = "; ".join(part for part in parts if part)
    text = f"{best.label} has the highest test accuracy at temperature 1: {percent(test.mean)} % (95 % interval {percent_interval(test)})."
    return f"{text} {second[0].upper()}{second[1:]}." if second else text


def _resolved_among(summary: Summary, arms: list[ArmSummary]) -> bool:
    found = [summary.pair(left.name, right.name) for left, right in combinations(arms, 2)]
    return any(pair is not None and pair.verdict != "unresolved" for pair in found)


def _tie(summary: Summary, tied: list[ArmSummary]) -> str:
    """The arms that no resolved difference separates, then which arms all of them beat, and which only some do."""
    shown = [f"{arm.label} {percent(test.mean)} % ({percent_interval(test)})" for arm in tied if (test := arm.test()) is not None]
    separated = "the difference between them is unresolved" if len(tied) == 2 else "no difference between them is resolved"
    text = f"{shortened(shown)} are tied for the highest test accuracy at temperature 1 (95 % intervals): {separated}."
    names, beaten, partly = {arm.name for arm in tied}, [], []
    for other in summary.ranked:
        if other.name in names:
            continue
        above = [arm.label for arm in tied if (pair := summary.pair(arm.name, other.name)) is not None and pair.verdict == "better"]
        if len(above) == len(tied):
            beaten.append(_with_accuracy(other))
        else:
            partly.append(f"{listed(above) or 'none of them'} {'is' if len(above) < 2 else 'are'} resolved to be better than {_with_accuracy(other)}")
    everyone = "both" if len(tied) == 2 else "all of them"
    parts = [f"{everyone} are better than {shortened(beaten)}"] if beaten else []
    if len(partly) > MANY:
        parts, partly = [*parts, f"{len(partly)} others are resolved to be worse than some of the tied arms only, or than none (see every pair)"], []
    second = "; ".join([*parts, *(f"only {part}" if not part.startswith("none") else part for part in partly)])
    return f"{text} {second[0].upper()}{second[1:]}." if second else text


def _is_close(best: ArmSummary, other: ArmSummary) -> bool:
    ours, theirs = best.test(), other.test()
    return ours is not None and theirs is not None and ours.mean - theirs.mean < CLOSE


def _with_accuracy(arm: ArmSummary) -> str:
    test = arm.test()
    return f"{arm.label} ({percent(test.mean)} %)" if test else arm.label


def leading_pair(summary: Summary) -> PairSummary | None:
    """The difference that the answers speak about: the best arm minus the baseline, or where the baseline is best, minus the next arm."""
    best, others = summary.ranked[0], [summary.reference, *summary.ranked[1:]]
    return next((pair for arm in others if (pair := summary.pair(best.name, arm.name)) is not None), None)


def _margin(summary: Summary) -> str:
    pair, reference = leading_pair(summary), summary.reference
    if pair is None:
        return _alone(summary)
    left, right = summary.arm(pair.left), summary.arm(pair.right)
    who = f"{right.label}, the baseline" if right.name == reference.name else f"{right.label}, the next one"
    bounds = points_interval(pair.interval.low, pair.interval.high)
    text = f"{left.label} minus {who}: {points(pair.interval.mean)} points of test accuracy (95 % interval {bounds}), {pair.verdict}."
    rest = [(arm, found) for arm in summary.ranked if arm.name not in (pair.left, pair.right) and (found := summary.pair(arm.name, reference.name))]
    others = [f"{arm.label} {points(found.interval.mean)} ({found.verdict})" for arm, found in rest]
    further = f" and {len(others) - MANY} more (see the differences)" if len(others) > MANY else ""
    return f"{text} The others minus {reference.label}: {', '.join(others[:MANY])}{further}." if others else text


def _alone(summary: Summary) -> str:
    best = summary.ranked[0]
    return f"There is no other trained arm; over the base, {best.label} gained {_gain(best)}." if best.gain else ""


def _cost(summary: Summary) -> str:
    return f"{_whole_run(summary)}. {_to_target(summary)}{_at_equal_cost(summary)}."


def _at_equal_cost(summary: Summary) -> str:
    """Kinds of cost at which, once equal, no arm differs from the baseline beyond chance."""
    kinds = []
    for cost in summary.matched_costs:
        found = [arm.matched[cost] for arm in summary.arms if cost in arm.matched and arm.matched[cost].verdict is not None]
        if found and all(matched.verdict == "unresolved" for matched in found):
            kinds.append(f"{cost} ({spent(cost, found[0].cost)})")
    return f"; at equal {listed(kinds)} no difference to {summary.reference.label} on dev is resolved" if kinds else ""


def _whole_run(summary: Summary) -> str:
    best, reference = summary.ranked[0], summary.reference
    kinds = [cost for cost in summary.costs if cost in (TOKENS, SCORED, SECONDS) or cost.startswith("money")]
    words = [f"{spent(cost, best.costs[cost])}{_unit(cost)}" for cost in kinds]
    text = f"A run of {best.label} spent {listed(words)}"
    if best.name != reference.name and reference.costs:
        ratios = [_as_much(best.costs[cost], reference.costs[cost]) for cost in kinds]
        text += f": {listed(ratios)} what a run of {reference.label} spent"
    paths = teacher_paths(best)
    if paths:
        text += f"; what it took to train its teacher {listed([_teacher(summary, path) for path in paths])} is not counted"
    return text


def _as_much(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}\N{MULTIPLICATION SIGN}" if theirs else "not comparable to"


def _unit(cost: str) -> str:
    return " of training" if cost == SECONDS else "" if cost.startswith("money") else f" {cost}"


def _teacher(summary: Summary, path: str) -> str:
    """The path with the accuracy of the untrained arm that examines this model, where there is one."""
    tests = [test for arm in summary.arms if examined(arm) == path and (test := arm.test()) is not None]
    return f"{path} ({percent(tests[0].mean)} % on the same test)" if tests else f"{path} (its accuracy was not measured here)"


def _to_target(summary: Summary) -> str:
    """What the target cost the best arm, the baseline and, where it is another one, the arm that needed least."""
    best, reference, goal = summary.ranked[0], summary.reference, f"{percent(summary.comparison.target)} % on dev"
    reached = [arm for arm in summary.ranked if arm.reached[TOKENS].typical is not None]
    if not reached:
        return f"No arm reached {goal} with every seed inside its budget"
    own = best.reached[TOKENS]
    if own.typical is not None:
        text = f"To {goal} it needed {reach_text(own, TOKENS)} generated tokens"
    else:
        text = f"To {goal} it generated nothing" if _generates_nothing(own) else f"It {_missed(own)} ({goal})"
    if best.name != reference.name and reference.runs:
        text += f"; {reference.label} {_reference_to_target(best, reference)}"
    cheapest = min(reached, key=lambda arm: arm.reached[TOKENS].typical or math.inf)
    if cheapest.name == best.name:
        return f"{text}; no arm needed fewer"
    if cheapest.name == reference.name:
        return text
    ratio = summary.against_best.get(cheapest.name)
    fewest = "needed fewest of those that generate" if _generates_nothing(own) else "needed fewest"
    return f"{text}; {cheapest.label} {fewest}, {reach_text(cheapest.reached[TOKENS], TOKENS)}{_lead(ratio, best)}"


def _reference_to_target(best: ArmSummary, reference: ArmSummary) -> str:
    found, ratio = reference.reached[TOKENS], best.ratio[TOKENS]
    needed = reach_text(found, TOKENS) if found.typical is not None else _missed(found)
    if ratio.value is None:
        if _generates_nothing(best.reached[TOKENS]):
            return f"needed {needed}" if found.typical is not None else needed
        return f"{needed} ({ratio.why})"
    many = f"{_ratio_words(ratio)} as many as {best.label}"
    return f"{needed}, so it needs {many}" if ratio.at_least else f"{needed}, {many}"


def _lead(ratio: Ratio | None, best: ArmSummary) -> str:
    """Whether the arm that needed least needed less than the best one beyond chance."""
    if ratio is None or ratio.value is None:
        return ""
    if ratio.low is None:
        return f", a lead over {best.label} without an interval: {best.label} needed {_ratio_words(ratio)} as many"
    word = "beyond chance" if ratio.low > 1 else "that may be chance (unresolved)"
    return f", a lead over {best.label} {word}: {best.label} needed {_ratio_words(ratio)} as many"


def cheaper_text(summary: Summary) -> str:
    """Which arms needed fewer or more generated tokens for the target than the best arm, and which of these differences may be chance."""
    texts = []
    for arm in summary.ranked[1:]:
        ratio = summary.against_best.get(arm.name)
        if ratio is not None and ratio.value is not None and ratio.low is not None and ratio.high is not None:
            word = "fewer" if ratio.low > 1 else "more" if ratio.high < 1 else "unresolved"
            texts.append(f"{arm.label} {ratio_text(ratio)}, {word}")
    if not texts:
        return ""
    best = summary.ranked[0]
    text = f"Generated tokens to the target that {best.label}, the most accurate arm, needed over those of another arm"
    how = "above 1\N{MULTIPLICATION SIGN} the other arm needed fewer; paired by seed, not corrected for the number of arms"
    return f"{text} ({how}): {'; '.join(texts)}."


def _generates_nothing(found: Reach) -> bool:
    """Every seed got there, and there is no number of generated tokens that it took."""
    return found.typical is None and 0 < found.reached == len(found.by_seed)


def _missed(found: Reach) -> str:
    missed = len(found.by_seed) - found.reached
    return f"missed it in {missed} of {len(found.by_seed)} seeds" if found.reached else "missed it in every seed"


def _ratio_words(ratio: Ratio) -> str:
    return ratio_text(ratio).replace("> ", "more than ", 1)


def _sure(summary: Summary) -> str:
    """How far chance explains the leading difference, then what such a comparison can see of it."""
    pair = leading_pair(summary)
    if pair is None:
        return ""
    interval, left, right = pair.interval, summary.arm(pair.left).label, summary.arm(pair.right).label
    data = f"{interval.seeds} seed{'s' if interval.seeds > 1 else ''} × {interval.problems} problems"
    if not math.isfinite(interval.low):
        return f"Nothing can be said: {data} leave no spread to judge by."
    chance = "may be chance" if pair.verdict == "unresolved" else "is not explained by chance"
    one_seed = "these seeds only" in interval.scope
    family = f", corrected for {pair.family} differences" if pair.family > 1 else ""
    text = f"The difference between {left} and {right} {chance} (p {p_text(pair.holm_p)}{family})"
    text += f"; measured with {data}, it speaks about {interval.scope}"
    text += ", and what another seed gives is not known." if one_seed else "."
    seen = f" A true difference of {percent(pair.detectable)} points between these two would be resolved four times in five"
    few = f"; fewer than {FEW_SEEDS} seeds show the machinery, claims need {FEW_SEEDS} or more" if interval.seeds < FEW_SEEDS else ""
    return f"{text}{seen}{few}." if math.isfinite(pair.detectable) else text


def _unresolved(summary: Summary) -> str:
    names = {arm.name for arm in summary.ranked}
    pairs = [pair for pair in summary.pairs if pair.decoding == PRIMARY and pair.left < pair.right and {pair.left, pair.right} <= names]
    open_pairs = sum(pair.verdict == "unresolved" for pair in pairs)
    return f"{open_pairs} of {len(pairs)} pairs of trained arms {'is' if open_pairs == 1 else 'are'} unresolved." if len(pairs) > 1 else ""


def _rates(summary: Summary) -> str:
    """Learning rates that differ between arms: whether they were searched alike."""
    rates = {arm.label: rate for arm in summary.ranked if (rate := _rate(arm)) is not None}
    if len(set(rates.values())) < 2:
        return ""
    shown = listed([f"{label} {rate:g}" for label, rate in rates.items()])
    tune = summary.comparison.tune
    if tune is None or "optimizer.lr" not in tune.grid:
        return f"Learning rates differ between arms ({shown}) and were not searched here: a difference may be one of rates."
    grid = listed([f"{float(rate):g}" for rate in tune.grid["optimizer.lr"]])
    return f"Learning rates differ because each arm's was chosen on dev from one grid, the same for all ({grid}): {shown}."


def _rate(arm: ArmSummary) -> float | None:
    rates = [float(run.recipe["optimizer"]["lr"]) for run in arm.finished if run.recipe.get("optimizer", {}).get("lr")]
    return rates[0] if rates else None


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


def _edges(summary: Summary) -> str:
    labels = [arm.label for arm in summary.arms if arm.tuned is not None and arm.tuned.at_edge]
    if not labels:
        return ""
    return f"The search chose a value at the edge of its grid for {listed(labels)}: a wider grid might do better there."
