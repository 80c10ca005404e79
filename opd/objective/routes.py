"""Which answers a term learns from, and how much: (RouteInput) -> factor, 0 leaves the answer out of the term and of its denominator."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from opd.config.choices import NonNegative, Positive, reads
from opd.credit import GroupOutcome
from opd.text.confidence import stated_confidence
from opd.types import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteInput:
    """One answer: its verdict, whether the term's `signal` has a view of it, who wrote it, its prompt's domain, and its place in its group.

    notes: what writers wrote about it (opd.types.Judged).
    student_logp, signal_logp [G]: mean log-prob a token of the group's answers under the student and under the term's signal (NaN where it
    has no view), for routes that read "likelihood", else empty.
    """

    verdict: Verdict
    has_view: bool
    group: GroupOutcome
    member: int
    source: str = "student"
    domain: str = ""
    signal: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    student_logp: Tensor = field(default_factory=lambda: torch.zeros(0))
    signal_logp: Tensor = field(default_factory=lambda: torch.zeros(0))


def everything(answer: RouteInput) -> float:
    """Every answer."""
    return 1.0


def has_view(answer: RouteInput) -> float:
    """Answers for which the term's signal had something to show."""
    return float(answer.has_view)


def correct(answer: RouteInput) -> float:
    """Answers that the verifier scored as correct."""
    return float(answer.verdict.status == "score" and answer.verdict.correct)


def wrong(answer: RouteInput) -> float:
    """Answers that the verifier scored as wrong; abstentions and errors are neither."""
    return float(answer.verdict.status == "score" and not answer.verdict.correct)


def wrong_with_view(answer: RouteInput) -> float:
    """Wrong answers that the signal can see through (SRPO's distillation branch, arXiv 2604.02288)."""
    return wrong(answer) * has_view(answer)


def not_wrong_with_view(answer: RouteInput) -> float:
    """The complement of wrong_with_view (SRPO's reinforcement branch)."""
    return 1.0 - wrong_with_view(answer)


@reads("group")
def mixed_groups(answer: RouteInput) -> float:
    """Groups whose rewards are not all equal: the others have no advantage (DAPO's dynamic sampling, arXiv 2503.14476)."""
    reward = answer.group.reward[answer.group.valid]
    return float(reward.numel() > 0 and bool((reward != reward[0]).any()))


@reads("group")
def all_failed(answer: RouteInput) -> float:
    """Groups without a correct answer, where reinforcement has nothing to learn from."""
    return float(bool(answer.group.valid.any()) and answer.group.pass_rate == 0.0)


@reads("group")
def pass_rate_bump(answer: RouteInput, *, a: NonNegative = 1.0, b: NonNegative = 1.0) -> float:
    """rate^a (1 - rate)^b of the group's pass rate: problems at the edge of ability (PACED, arXiv 2603.11178)."""
    rate = answer.group.pass_rate
    return rate**a * (1.0 - rate) ** b


def from_student(answer: RouteInput) -> float:
    """Answers that the student sampled."""
    return float(answer.source != "dataset")


def from_dataset(answer: RouteInput) -> float:
    """Answers that came with the data."""
    return float(answer.source == "dataset")


@reads("group", "likelihood", "behaviour_logp")
def correct_by_student_perplexity(answer: RouteInput, *, tau: Positive = 1.0, favour: Literal["high", "low"] = "high") -> float:
    """Right answers, those that the student finds unlikely first (SCOPE eq. 4, arXiv 2604.10688): perplexity^(1 / tau), mean 1 in the group.

    favour "low" is the sign of the authors' released code.
    """
    if not correct(answer):
        return 0.0
    sign = -1.0 if favour == "high" else 1.0
    return _share(sign * answer.student_logp / tau, answer.group.valid & answer.group.correct, answer.member)


@reads("group", "likelihood", "behaviour_logp")
def wrong_by_teacher_perplexity(answer: RouteInput, *, tau: Positive = 1.0) -> float:
    """Wrong answers, those that the teacher finds likely first (SCOPE eq. 5): teacher perplexity^(-1 / tau), mean 1 in the group."""
    if not wrong(answer) or not has_view(answer):
        return 0.0
    chosen = answer.group.valid & ~answer.group.correct & ~answer.signal_logp.isnan()
    return _share(answer.signal_logp / tau, chosen, answer.member)


def confidence_share(answer: RouteInput, *, writer: str, tau: Positive = 1.0) -> float:
    """The term's teacher's share in softmax(c / 100 / tau), c from 0 to 100 what each speaker of the debate `writer` says last (MAD-OPD eq. 7).

    c is the last tag <<CONFIDENCE=N>> of a speaker's last turn (arXiv 2605.01347); where one of them gives none, all have the same share.
    """
    last = {name.removeprefix(f"{writer}/"): turn for name, turn in answer.notes.items() if name.startswith(f"{writer}/")}
    if answer.signal not in last:
        return 0.0
    stated = {speaker: stated_confidence(turn) for speaker, turn in last.items()}
    weights = {speaker: math.exp(c / 100 / tau) for speaker, c in stated.items() if c is not None}
    return weights[answer.signal] / sum(weights.values()) if len(weights) == len(last) else 1 / len(last)


def _share(score: Tensor, chosen: Tensor, member: int) -> float:
    """Softmax of the scores over the chosen members, times their number."""
    chosen = chosen & ~score.isnan()  # of an answer without a loss token nothing is known
    if not chosen[member]:
        return 0.0
    weights = torch.where(chosen, score.double(), -torch.inf).softmax(0) * chosen.sum()
    return float(weights[member])


ROUTES = {
    "all": everything,
    "has_view": has_view,
    "correct": correct,
    "wrong": wrong,
    "wrong_with_view": wrong_with_view,
    "not_wrong_with_view": not_wrong_with_view,
    "mixed_groups": mixed_groups,
    "all_failed": all_failed,
    "pass_rate_bump": pass_rate_bump,
    "from_student": from_student,
    "from_dataset": from_dataset,
    "correct_by_student_perplexity": correct_by_student_perplexity,
    "wrong_by_teacher_perplexity": wrong_by_teacher_perplexity,
    "confidence_share": confidence_share,
}
