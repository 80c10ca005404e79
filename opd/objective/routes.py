"""Which answers a term learns from, and how much: (RouteInput) -> factor, 0 leaves the answer out of the term and of its denominator."""

from dataclasses import dataclass

from opd.choices import NonNegative, reads
from opd.credit import GroupOutcome
from opd.types import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteInput:
    """One answer: its verdict, whether the term's signal has a view of it, and its place in its group."""

    verdict: Verdict
    has_view: bool
    group: GroupOutcome
    member: int


def everything(answer: RouteInput) -> float:
    return 1.0


def has_view(answer: RouteInput) -> float:
    return float(answer.has_view)


def correct(answer: RouteInput) -> float:
    return float(answer.verdict.status == "score" and answer.verdict.correct)


def wrong(answer: RouteInput) -> float:
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
}
