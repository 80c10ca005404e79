"""What the student is pulled towards on a support: the teacher, or something made of it. Constant; log-probs [N, K] on the same categories.

(student_logp, teacher_logp) -> [N, K]; a target with a parameter `reference`, the name of a second signal, gets that one's log-probs third; one
with a parameter `signals`, names of several, theirs in that order.
"""

from typing import Any

import torch
from torch import Tensor

from opd.config.choices import Positive, Share, parameters_of
from opd.evidence import OneView, consensus_gap

MINIMUM_STEP = 1e-3


def teacher(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """The teacher as it is."""
    return teacher_logp


def geometric(student_logp: Tensor, teacher_logp: Tensor, *, share: Share) -> Tensor:
    """softmax((1 - share) log student + share log teacher): a nearer target (trust region of SDPO, arXiv 2601.20802; TAID, 2501.16937)."""
    return ((1.0 - share) * student_logp + share * teacher_logp).log_softmax(-1)


def extrapolate(
    student_logp: Tensor, teacher_logp: Tensor, reference_logp: Tensor, *, reference: str = "reference", scale: Positive = 15.0
) -> Tensor:
    """softmax(log teacher + a (log teacher - log reference)), a = scale * sum of |teacher - reference| + 0.001 (AlignDistil, 2503.02832)."""
    distance = (teacher_logp.exp() - reference_logp.exp()).abs().sum(-1, keepdim=True)
    step = scale * distance + MINIMUM_STEP
    return (teacher_logp + step * (teacher_logp - reference_logp)).log_softmax(-1)


def log_ratio(student_logp: Tensor, teacher_logp: Tensor, reference_logp: Tensor, *, reference: str = "reference") -> Tensor:
    """log teacher - log reference: no distribution, but what `expected_advantage` takes in a teacher's place (ADPA, arXiv 2502.17927)."""
    return teacher_logp - reference_logp


def consensus(student_logp: Tensor, teacher_logp: Tensor, *others_logp: Tensor, signals: OneView) -> Tensor:
    """The teacher and the other `signals` as one: their geometric mean, raised at each candidate by a gated share of what the arithmetic mean adds.

    The gate is that of the advantage `consensus`, here at every candidate, and the result normalised (AVSD's dense form, arXiv 2605.20643).
    """
    gap = consensus_gap(torch.stack([teacher_logp, *others_logp]), student_logp)
    return (student_logp + gap).log_softmax(-1)


def other_signals(target: Any) -> tuple[str, ...]:
    """The signals beside the term's own that a target reads."""
    given = parameters_of(target)
    return (given["reference"],) if "reference" in given else tuple(given.get("signals", ()))


TARGETS = {"teacher": teacher, "consensus": consensus, "geometric": geometric, "extrapolate": extrapolate, "log_ratio": log_ratio}
