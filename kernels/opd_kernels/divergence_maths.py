"""Divergences as sums over the vocabulary of value(lp, lq), lp the student's log-probability and lq the teacher's.

With u = d value / d lp the gradient at the student's logits is u - p * sum(u), so u counts up to a multiple of p. Without a clip the
entries below also carry terms that sum to zero, p - q and the like: they turn sums of large terms of both signs into sums of small
terms of one sign, which keeps the digits when student and teacher are close.
"""

import math

import torch
from torch import Tensor

from opd_kernels.types import Divergence

_NEG_INF = float("-inf")


def entries(divergence: Divergence, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(value, slope) of each entry, p = exp(lp) and q = exp(lq); value sums to D, slope is d value / d lp up to a multiple of p."""
    if divergence.name == "elementwise":
        value, slope = divergence.value(lp, lq), divergence.slope(lp, lq)
    elif divergence.entry_clip is None:
        return _balanced(divergence, lp, lq, p, q)
    else:
        value, slope = _plain(divergence, lp, lq, p, q)
    if divergence.entry_clip is None:
        return value, slope
    keep = value <= divergence.entry_clip
    return value.clamp(max=divergence.entry_clip), torch.where(keep, slope, 0.0)


def log_mixture(divergence: Divergence, lp: Tensor, lq: Tensor) -> Tensor:
    """Log-probabilities of the divergence's mixture of student and teacher."""
    share_q = {"jsd": divergence.mix, "skew_forward_kl": divergence.alpha, "skew_reverse_kl": 1.0 - divergence.alpha}[divergence.name]
    return torch.logaddexp(lq + _log(share_q), lp + _log(1.0 - share_q))


def _plain(divergence: Divergence, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The entries as published, and their exact slopes."""
    alpha, mix = divergence.alpha, divergence.mix
    if divergence.name == "forward_kl":
        return q * (lq - lp), -q
    if divergence.name == "reverse_kl":
        return p * (lp - lq), p * (lp - lq + 1.0)
    lm = log_mixture(divergence, lp, lq)
    if divergence.name == "jsd":
        student = (1.0 - mix) * p * (lp - lm)
        return mix * q * (lq - lm) + student, student
    share = (lp - lm).exp()  # p / m
    if divergence.name == "skew_forward_kl":
        return q * (lq - lm), -(1.0 - alpha) * q * share
    return p * (lp - lm), p * (lp - lm + 1.0 - alpha * share)


def _balanced(divergence: Divergence, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    alpha = divergence.alpha
    gap = p - q
    if divergence.name == "forward_kl":
        return q * (lq - lp) + gap, gap
    if divergence.name == "reverse_kl":
        slope = p * (lp - lq)
        return slope - gap, slope
    if divergence.name == "jsd":
        return _plain(divergence, lp, lq, p, q)
    lm = log_mixture(divergence, lp, lq)
    share = (lp - lm).exp()
    if divergence.name == "skew_forward_kl":
        return q * (lq - lm) + (1.0 - alpha) * gap, (1.0 - alpha) ** 2 * gap * share
    student = p * (lp - lm)
    return student - (1.0 - alpha) * gap, student - alpha * (1.0 - alpha) * gap * share


def _log(share: float) -> float:
    return math.log(share) if share > 0.0 else _NEG_INF
