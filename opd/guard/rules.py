"""Guard rails: rules that look at a run's numbers after every step and say when something goes wrong, and what is done then.

A rule is a pure function of the history with a documented threshold: it returns a sentence with the numbers, or "" while all is well. "Now" is
the mean over the last `window` steps, "at first" the mean over the first `window`; nothing is said before two whole windows have passed.
Thresholds were chosen on recorded runs of the embedded tasks (tests/guard): three collapses, and healthy runs of every shipped kind.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal, get_args

from opd.config.choices import Count, InnerShare, NonNegative, Positive, Share, nearest, resolve

Row = Mapping[str, Any]
Action = Literal["off", "warn", "pause", "roll_back"]
ACTIONS: tuple[str, ...] = get_args(Action)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """steps: lines of metrics.jsonl, evals: dev lines of eval.jsonl, both oldest first and without what was rolled back."""

    steps: Sequence[Row]
    evals: Sequence[Row] = ()

    def values(self, name: str) -> list[float]:
        """The metric at every step that has it."""
        return [row[name] for row in self.steps if isinstance(row.get(name), int | float) and math.isfinite(row[name])]


Rule = Callable[[History], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A rule that has just begun to hold."""

    step: int
    rule: str
    action: str
    message: str


def _first_and_now(history: History, name: str, window: int) -> tuple[float, float] | None:
    values = history.values(name)
    return (fmean(values[:window]), fmean(values[-window:])) if len(values) >= 2 * window else None


def entropy_collapse(history: History, *, window: Count = 10, share: InnerShare = 0.05, nats: NonNegative = 0.01) -> str:
    """The student's entropy is under `share` of what it was at first, and under `nats`: it has stopped to explore."""
    found = _first_and_now(history, "entropy/student", window)
    if found and found[1] < share * found[0] and found[1] < nats:
        return f"the student's entropy fell from {found[0]:.4f} to {found[1]:.4f} nats"
    return ""


def entropy_rise(history: History, *, window: Count = 10, ratio: Positive = 2.5, nats: NonNegative = 0.015) -> str:
    """The entropy is above `ratio` times its lowest window so far, and at least `nats` above it: what had been learned comes apart."""
    values = history.values("entropy/student")
    if len(values) < 2 * window:
        return ""
    now = fmean(values[-window:])
    lowest = min(fmean(values[start : start + window]) for start in range(len(values) - 2 * window + 1))
    return f"the student's entropy rose from {lowest:.4f} to {now:.4f} nats" if now > ratio * lowest and now > lowest + nats else ""


def length_drift(history: History, *, window: Count = 10, longer: Positive = 1.5, shorter: InnerShare = 0.5) -> str:
    """Answers are more than `longer` times as long as at first, or less than `shorter` times."""
    found = _first_and_now(history, "length/mean", window)
    if found and not shorter * found[0] <= found[1] <= longer * found[0]:
        return f"answers went from {found[0]:.1f} to {found[1]:.1f} tokens"
    return ""


def truncation_drift(history: History, *, window: Count = 10, rise: Share = 0.1) -> str:
    """The share of answers cut at the length limit is `rise` above what it was at first."""
    return _rose(history, "length/truncated", "of the answers are cut at sampling.max_tokens", window, rise)


def repetition(history: History, *, window: Count = 10, rise: Share = 0.06) -> str:
    """The share of 4-grams that an answer had before is `rise` above what it was at first."""
    return _rose(history, "text/repeated_4", "of an answer's 4-grams repeat earlier ones", window, rise)


def distinct_n(history: History, *, window: Count = 10, share: InnerShare = 0.6) -> str:
    """Distinct-2 of a step's answers is under `share` of what it was at first: answers grow alike."""
    found = _first_and_now(history, "text/distinct_2", window)
    return f"distinct-2 of a step's answers fell from {found[0]:.3f} to {found[1]:.3f}" if found and found[1] < share * found[0] else ""


def accuracy_fall(history: History, *, window: Count = 12, fall: Share = 0.15, errors: NonNegative = 4.0) -> str:
    """Accuracy on the training answers is `fall` under its best window, and `errors` standard errors of the difference."""
    values = history.values("accuracy/train")
    if len(values) < 2 * window:
        return ""
    now = values[-window:]
    best = max((values[start : start + window] for start in range(len(values) - 2 * window + 1)), key=fmean)
    noise = math.sqrt((_variance(now) + _variance(best)) / window)
    lost = fmean(best) - fmean(now)
    return f"training accuracy fell from {fmean(best):.3f} to {fmean(now):.3f}" if lost > fall and lost > errors * noise else ""


def dev_fall(history: History, *, fall: Share = 0.08, errors: NonNegative = 3.0) -> str:
    """avg@k on dev is `fall` under its best, and `errors` standard errors of the difference."""
    evals = [row for row in history.evals if row.get("avg@k") is not None]
    if len(evals) < 2:
        return ""
    best, now = max(evals[:-1], key=lambda row: row["avg@k"]), evals[-1]
    lost = best["avg@k"] - now["avg@k"]
    noise = math.hypot(best.get("stderr", 0.0), now.get("stderr", 0.0))
    if lost > fall and lost > errors * noise:
        return f"dev accuracy fell from {best['avg@k']:.3f} (step {best['step']}) to {now['avg@k']:.3f}"
    return ""


def pass_at_k(history: History, *, fall: Share = 0.05, errors: NonNegative = 2.0) -> str:
    """pass@k on dev is `fall` under its best (and `errors` standard errors) while avg@k is above what it was then: sharper, not better."""
    evals = [row for row in history.evals if row.get("pass@k") is not None and row.get("k", 1) > 1]
    if len(evals) < 2:
        return ""
    best, now = max(evals[:-1], key=lambda row: row["pass@k"]), evals[-1]
    lost, noise = best["pass@k"] - now["pass@k"], math.hypot(best.get("pass@k_stderr", 0.0), now.get("pass@k_stderr", 0.0))
    if lost > fall and lost > errors * noise and now["avg@k"] > best["avg@k"]:
        return (
            f"pass@{now['k']} fell from {best['pass@k']:.3f} (step {best['step']}) to {now['pass@k']:.3f} while avg@{now['k']} rose from "
            f"{best['avg@k']:.3f} to {now['avg@k']:.3f}"
        )
    return ""


def leak(history: History, *, window: Count = 10, rise: Share = 0.2) -> str:
    """Answers that repeat a run of tokens from the teacher's view (and not from the prompt) are `rise` more frequent than at first.

    A view that shows the whole solution raises this by being imitated, as it should: read it beside the answers (opd inspect).
    """
    names = sorted({name for row in history.steps[-1:] for name in row if name.startswith("text/leak/")})
    what = "of the answers repeat what only the teacher was shown"
    said = [(name.rpartition("/")[2], _rose(history, name, what, window, rise)) for name in names]
    return "; ".join(f"{signal}: {one}" for signal, one in said if one)


def announced_answer(history: History, *, window: Count = 10, rise: Share = 0.2) -> str:
    """Answers that name the result in their first 15 % are `rise` more frequent than at first: the reasoning has become decoration."""
    return _rose(history, "text/announced", "of the answers name the result before they reason", window, rise)


def style_drift(history: History, *, window: Count = 10, change: Share = 0.12) -> str:
    """The share of markup or of filler words (opd.text.token_class) is `change` away from what it was at first."""
    said = []
    for name in ("text/style", "text/filler"):
        found = _first_and_now(history, name, window)
        if found and abs(found[1] - found[0]) > change:
            said.append(f"{name.removeprefix('text/')} went from {found[0]:.0%} to {found[1]:.0%} of the characters")
    return "; ".join(said)


def same_answer(history: History, *, window: Count = 10, rise: Share = 0.2) -> str:
    """Answers given word for word to different prompts are `rise` more frequent than at first: a sign of reward hacking."""
    return _rose(history, "text/duplicates", "of the answers are given to several prompts", window, rise)


def reward_without_accuracy(history: History, *, window: Count = 10, rise: NonNegative = 0.1, fall: Share = 0.08) -> str:
    """The reward is `rise` above what it was at first while fewer answers are correct, by `fall`: the reward is being gamed."""
    reward, right = _first_and_now(history, "reward/mean", window), _first_and_now(history, "accuracy/train", window)
    if reward and right and reward[1] > reward[0] + rise and right[1] < right[0] - fall:
        return f"the reward rose from {reward[0]:.3f} to {reward[1]:.3f} while accuracy fell from {right[0]:.3f} to {right[1]:.3f}"
    return ""


def train_without_dev(history: History, *, window: Count = 10, rise: Share = 0.08, errors: NonNegative = 3.0) -> str:
    """Training accuracy is `rise` above what it was at first while dev accuracy is `errors` standard errors under its first value."""
    right = _first_and_now(history, "accuracy/train", window)
    evals = [row for row in history.evals if row.get("avg@k") is not None]
    if not right or len(evals) < 2 or right[1] < right[0] + rise:
        return ""
    before, now = evals[0], evals[-1]
    if before["avg@k"] - now["avg@k"] > errors * math.hypot(before.get("stderr", 0.0), now.get("stderr", 0.0)):
        return f"training accuracy rose to {right[1]:.3f} while dev accuracy fell from {before['avg@k']:.3f} to {now['avg@k']:.3f}"
    return ""


def _rose(history: History, name: str, what: str, window: int, rise: float) -> str:
    found = _first_and_now(history, name, window)
    return f"{found[1]:.1%} {what}, {found[0]:.1%} at first" if found and found[1] > found[0] + rise else ""


def _variance(values: Sequence[float]) -> float:
    return stdev(values) ** 2 if len(values) > 1 else 0.0


RULES: dict[str, Callable[..., str]] = {
    "entropy_collapse": entropy_collapse,
    "entropy_rise": entropy_rise,
    "length_drift": length_drift,
    "truncation_drift": truncation_drift,
    "repetition": repetition,
    "distinct_n": distinct_n,
    "accuracy_fall": accuracy_fall,
    "dev_fall": dev_fall,
    "pass_at_k": pass_at_k,
    "leak": leak,
    "announced_answer": announced_answer,
    "style_drift": style_drift,
    "same_answer": same_answer,
    "reward_without_accuracy": reward_without_accuracy,
    "train_without_dev": train_without_dev,
}


def parse_rules(action: str, chosen: Mapping[str, Any]) -> dict[str, tuple[str, Rule]]:
    """Rule -> (action, function); `action` holds for rules that `chosen` does not name, as a word or {action: word, parameter: value}.

    Raises ValueError for unknown rules, actions and parameters.
    """
    for name in chosen:
        if name not in RULES:
            raise ValueError(f"guard.rules: unknown rule {name!r}{nearest(name, RULES)}; valid: {', '.join(sorted(RULES))}")
    rules = {}
    for name in RULES:
        given = chosen.get(name, {})
        given = {"action": given} if isinstance(given, str | bool) else dict(given or {})
        own = given.pop("action", action)
        own = "off" if own is False else own  # YAML reads off as false
        if own not in ACTIONS:
            raise ValueError(f"guard.rules.{name}: action {own!r}{nearest(str(own), ACTIONS)}; valid: {', '.join(ACTIONS)}")
        rule = resolve({name: given}, RULES, "guard.rules")
        if own != "off":
            rules[name] = (own, rule)
    return rules


@dataclass(slots=True)
class Watch:
    """The rules of a run and what they remember: the history, and which of them hold at present (so that each speaks once)."""

    rules: Mapping[str, tuple[str, Rule]]
    steps: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    holding: dict[str, int] = field(default_factory=dict)  # rule -> last step at which it held
    calm: int = 10  # steps without it, after which a rule speaks again

    def look(self, step: int) -> list[Alarm]:
        """The rules that hold now and did not before; most severe action first."""
        history, alarms = History(steps=self.steps, evals=self.evals), []
        for name, (action, rule) in self.rules.items():
            if message := rule(history):
                if step - self.holding.get(name, -self.calm - 1) > self.calm:
                    alarms.append(Alarm(step=step, rule=name, action=action, message=message))
                self.holding[name] = step
        return sorted(alarms, key=lambda alarm: -ACTIONS.index(alarm.action))

    def forget(self, after: int) -> None:
        """Leave out what came after that step (it was rolled back)."""
        self.steps = [row for row in self.steps if row["step"] <= after]
        self.evals = [row for row in self.evals if row["step"] <= after]
        self.holding.clear()
