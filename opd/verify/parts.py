"""A reward of several parts: each judged by a verifier of its own, clipped, weighed and added; each gets a curve of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.config.choices import nearest
from opd.types import Verdict, Verifier
from opd.verify.adapt import Asked, Batched, as_verifier, judge_all

KEYS = ("clip", "verifier", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """clip: (low, high) of its reward before the weight, None to leave it."""

    verify: Verifier
    weight: float = 1.0
    clip: tuple[float, float] | None = None


def sum_verifier(parts: Mapping[str, Part], correct: str, clip: tuple[float, float] | None = None) -> Verifier:
    """reward = clip(sum of weight x clip(part)); `correct` names the part whose correctness is the whole's.

    Verdict.parts holds each part's clipped reward. An answer on which a part abstains or fails is abstained from or failed on as a whole: the
    sum of the others would be another reward.
    """

    def many(asked: Asked) -> list[Verdict]:
        of_parts = {name: judge_all(part.verify, asked) for name, part in parts.items()}
        return [_added(parts, {name: verdicts[n] for name, verdicts in of_parts.items()}, correct, clip) for n in range(len(asked))]

    return Batched(many)


def read_parts(of: Any, make: Any) -> dict[str, Part]:
    """Parts as a recipe writes them: {name: VERIFIER} or {name: {verifier: VERIFIER, weight: w, clip: [low, high]}}. Raises ValueError."""
    if not isinstance(of, Mapping) or not of:
        raise ValueError(f"data.verifier: sum.of is {of!r}; write {{answer: math, style: {{verifier: {{fn: my:style}}, weight: 0.2}}}}")
    found = {}
    for name, given in of.items():
        where = f"data.verifier: sum.of.{name}"
        options = dict(given) if isinstance(given, Mapping) and "verifier" in given else {"verifier": given}
        if unknown := sorted(set(options) - set(KEYS)):
            raise ValueError(f"{where}: unknown key {unknown[0]!r}{nearest(unknown[0], KEYS)}; valid: {', '.join(KEYS)}")
        weight = options.get("weight", 1.0)
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            raise ValueError(f"{where}.weight is {weight!r}; it must be a number")
        found[str(name)] = Part(verify=make(options["verifier"]), weight=float(weight), clip=read_clip(options.get("clip"), f"{where}.clip"))
    return found


def read_clip(given: Any, where: str) -> tuple[float, float] | None:
    """[low, high] or nothing. Raises ValueError."""
    if given is None:
        return None
    numbers = isinstance(given, Sequence) and len(given) == 2 and all(isinstance(n, int | float) and not isinstance(n, bool) for n in given)
    if not numbers or given[0] >= given[1]:
        raise ValueError(f"{where} is {given!r}; write [lowest, highest]")
    return float(given[0]), float(given[1])


def rubric_verifier(rubric: Any, seconds: float) -> Verifier:
    """A rubric of the library `verifiers` (reward functions and their weights) as a sum; the first function decides what is correct.

    Functions with weight 0 are only shown, as there. seconds: longest time for one verdict of one function.
    """
    functions = _attribute(rubric, "funcs", "reward_funcs")
    weights = _attribute(rubric, "weights", "reward_weights") or [1.0] * len(functions)
    parts = {f.__name__: Part(verify=as_verifier(f, seconds=seconds), weight=float(w)) for f, w in zip(functions, weights, strict=True)}
    if not parts:
        raise ValueError(f"the rubric {rubric!r} holds no reward function")
    return sum_verifier(parts, next(iter(parts)))


def is_rubric(thing: Any) -> bool:
    """Whether it holds reward functions and weights; it need not come from the library itself."""
    return _attribute(thing, "funcs", "reward_funcs") is not None and _attribute(thing, "weights", "reward_weights") is not None


def _attribute(thing: Any, *names: str) -> list[Any] | None:
    return next((list(found) for name in names if isinstance(found := getattr(thing, name, None), list | tuple)), None)


def _added(parts: Mapping[str, Part], verdicts: Mapping[str, Verdict], correct: str, clip: tuple[float, float] | None) -> Verdict:
    for status in ("error", "abstain"):
        for name, verdict in verdicts.items():
            if verdict.status == status:
                return Verdict(status=status, feedback=f"part {name}: {verdict.feedback}")
    rewards = {name: _clipped(verdict.reward, parts[name].clip) for name, verdict in verdicts.items()}
    feedback = " ".join(verdict.feedback for verdict in verdicts.values() if verdict.feedback)
    total = sum(parts[name].weight * reward for name, reward in rewards.items())
    return Verdict(reward=_clipped(total, clip), correct=verdicts[correct].correct, feedback=feedback, parts=rewards)


def _clipped(value: float, clip: tuple[float, float] | None) -> float:
    return value if clip is None else min(max(value, clip[0]), clip[1])
