"""Detached factors of a term's token losses: (TokenStatistics) -> [N]; several are multiplied.

Gates, (position [N]) -> bool [N], share the recipe key `weight`; the tokens they drop leave the term's denominator too.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd.config.choices import Count, NonNegative, Positive, reads
from opd.objective.surrogates import ratio
from opd.types import SignalRows, TokenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """What a weight may read, all detached. student_logp, old_logp [N] of the sampled tokens; entropy [N] of the student or None.

    old_logp is student_logp itself where no update has happened since the rollout.
    """

    student_logp: Tensor
    old_logp: Tensor
    entropy: Tensor | None
    rows: TokenRows
    signal: SignalRows | None


def ones(now: TokenStatistics) -> Tensor:
    """No weight."""
    return torch.ones_like(now.student_logp)


@reads("old_logp")
def staleness_ratio(now: TokenStatistics, *, cap: Positive = 2.0) -> Tensor:
    """min(p / p_old, cap): corrects for updates since the rollout (SDPO, arXiv 2601.20802)."""
    return ratio(now.student_logp, now.old_logp).clamp_max(cap)


@reads("old_logp", "behaviour_logp")
def engine_ratio(now: TokenStatistics, *, low: NonNegative = 0.0, high: Positive = 2.0, outside: Literal["truncate", "mask"] = "truncate") -> Tensor:
    """p_old / p_engine, outside [low, high] truncated (TIS) or set to 0 (IcePop): corrects for the engine's arithmetic."""
    r = ratio(now.old_logp, now.rows.behaviour_logp.to(now.old_logp))
    if outside == "truncate":
        return r.clamp(low, high)
    return torch.where((r >= low) & (r <= high), r, 0.0)


@reads("behaviour_logp")
def sampler_ratio(now: TokenStatistics, *, cap: Positive | None = None) -> Tensor:
    """p / p_engine, capped: both corrections at once (Thinking Machines, On-Policy Distillation, 2025)."""
    r = ratio(now.student_logp, now.rows.behaviour_logp.to(now.student_logp))
    return r if cap is None else r.clamp_max(cap)


@reads("signal", "signal_entropy")
def teacher_confidence(now: TokenStatistics, *, beta: NonNegative = 1.0) -> Tensor:
    """exp(-beta H) of the teacher's entropy H in nats, not normalised over the batch (after SRPO, arXiv 2604.02288)."""
    assert now.signal is not None, "legality admits this weight only on terms with a signal"
    return (-beta * now.signal.entropy.to(now.student_logp)).exp()


@reads("signal", "signal_entropy")
def teacher_entropy_above(now: TokenStatistics, *, threshold: NonNegative = 0.8) -> Tensor:
    """1 where the teacher's entropy in nats exceeds the threshold, else 0 (Entropy-Aware OPD, arXiv 2603.07079)."""
    assert now.signal is not None, "legality admits this weight only on terms with a signal"
    return (now.signal.entropy.to(now.student_logp) > threshold).to(now.student_logp)


@reads("signal", "signal_entropy", "entropy")
def confidence_gap(now: TokenStatistics, *, scale: Positive = 1.0) -> Tensor:
    """sigmoid((H_student - H_teacher) / scale): more where the teacher is surer than the student (TSD-KD, arXiv 2603.13260)."""
    assert now.signal is not None and now.entropy is not None, "declared with reads"
    return ((now.entropy - now.signal.entropy.to(now.entropy)) / scale).sigmoid()


@reads("entropy")
def student_confidence(now: TokenStatistics, *, beta: NonNegative = 1.0) -> Tensor:
    """exp(-beta H) of the student's entropy H in nats."""
    assert now.entropy is not None, "the learner asks the kernel for the entropy when `needs.entropy` is set"
    return (-beta * now.entropy).exp()


def skip_first(position: Tensor, *, tokens: Count) -> Tensor:
    """False for the first tokens of a completion (SDFT, arXiv 2601.19897)."""
    return position >= tokens


def prefix(position: Tensor, *, tokens: Count) -> Tensor:
    """False beyond the first tokens of a completion."""
    return position < tokens


WEIGHTS = {
    "ones": ones,
    "staleness_ratio": staleness_ratio,
    "engine_ratio": engine_ratio,
    "sampler_ratio": sampler_ratio,
    "teacher_confidence": teacher_confidence,
    "student_confidence": student_confidence,
    "teacher_entropy_above": teacher_entropy_above,
    "confidence_gap": confidence_gap,
}

GATES = {"skip_first": skip_first, "prefix": prefix}
