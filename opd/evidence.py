"""What several views of one answer say together: token credits and weights of privileged self-distillation.

Legend: T completion tokens, M views. Host side, pure; all tensors in and out are detached. Statistics over the batch go through `pool`.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from opd.config.choices import Count, InnerShare, NonNegative, Positive, Share, reads
from opd.credit import SequenceSignals
from opd.pooling import Pool


class _SignalNames:
    """Lists of at least `least` names."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __contains__(self, value: list) -> bool:
        return len(value) >= self.least and all(isinstance(name, str) and name for name in value)

    def __str__(self) -> str:
        return f"of at least {self.least} names of signals"


OneView = Annotated[list, _SignalNames(1)]
TwoViews = Annotated[list, _SignalNames(2)]
EPSILON = 1e-8
LARGEST_DISAGREEMENT = 10.0


@reads("behaviour_logp")
def evidence(sequence: SequenceSignals, *, signal: str = "main", reference: str | None = None, clip: InnerShare = 0.2) -> Tensor:
    """The advantage so far times clip(exp(sign(A) d), 1 - clip, 1 + clip), d = log signal - log reference of the sampled token [T].

    reference: a view of a wrong answer (CEPO, arXiv 2605.19436), or null for the student itself (RLSD, 2604.03128). Signs stay the verifier's.
    """
    below = sequence.student_logp if reference is None else sequence.scores[reference].sampled
    delta = (sequence.scores[signal].sampled - below).clamp(-20.0, 20.0)
    weight = (sequence.advantage.sign() * delta).exp().clamp(1.0 - clip, 1.0 + clip)
    return torch.where(sequence.loss_mask, sequence.advantage * weight, 0.0)


@reads("behaviour_logp")
def consensus(sequence: SequenceSignals, *, signals: OneView, residual: bool = True) -> Tensor:
    """The advantage so far + log q* - log p of the sampled token [T]: q* is the views' geometric mean, raised by a gated share of what the
    arithmetic mean adds (AVSD, arXiv 2605.20643).

    D = mean of log q_m - log p, J = log mean q - mean log q >= 0, gate = |D| / mean |D_m| x |D| / (|D| + J): D + gate J has D's sign.
    residual false: D alone.
    """
    views = torch.stack([sequence.scores[name].sampled for name in signals]).double()
    gap = consensus_gap(views, sequence.student_logp.double(), residual=residual)
    return torch.where(sequence.loss_mask, sequence.advantage + gap, 0.0).to(sequence.student_logp)


def consensus_gap(views: Tensor, student: Tensor, *, residual: bool = True) -> Tensor:
    """log q* - log student, elementwise, for views [M, ...] of log-probs and the student's [...]; q* as in `consensus`."""
    geometric = views.mean(0)
    gap = geometric - student
    if not residual:
        return gap
    spread = (views.logsumexp(0) - math.log(len(views)) - geometric).clamp_min(0.0)
    direction = gap.abs() / ((views - student).abs().mean(0) + EPSILON)
    return gap + direction * gap.abs() / (gap.abs() + spread + EPSILON) * spread


@reads("behaviour_logp")
def margin(sequence: SequenceSignals, *, signal: str = "main", reference: str = "negative", margin: NonNegative = 0.5) -> Tensor:
    """The advantage so far minus the slope of relu(margin + |log p - log signal| - |log p - log reference|) in log p [T] (UniSD, 2605.06597).

    With one update a batch and `policy: reinforce` the gradient is that of the margin itself: nearer to the signal than to the reference.
    """
    near = sequence.student_logp - sequence.scores[signal].sampled
    far = sequence.student_logp - sequence.scores[reference].sampled
    slope = torch.where(margin + near.abs() - far.abs() > 0, near.sign() - far.sign(), 0.0)
    return torch.where(sequence.loss_mask, sequence.advantage - slope, 0.0)


@reads("behaviour_logp", "batch")
def class_contrast(answers: Sequence[SequenceSignals], pool: Pool, *, signal: str = "main", beta: Positive = 0.1) -> list[Tensor]:
    """Minus the slope of BCO's loss in the answer's log-prob under the signal [T], for `advantage: [verdict_sign, class_contrast]` (VPD's
    E-step, arXiv 2605.15113), all tokens alike.

    With r = beta (log signal - log student) of the whole answer, d half the sum of r's means over right and wrong answers:
    -mean over the right of log sigmoid(r - d) - mean over the wrong of log sigmoid(d - r). Zero where the batch has one class only.
    Times the number of answers: for `reduce: {constant: {length: 1}}`, which divides by it.
    """
    kind = torch.stack([answer.advantage[answer.loss_mask].sum().sign() for answer in answers]).double() if answers else torch.zeros(0).double()
    sums = [torch.where(a.loss_mask, a.scores[signal].sampled - a.student_logp, 0.0).double().sum() for a in answers]
    reward = beta * (torch.stack(sums) if sums else torch.zeros(0).double())
    kinds, rewards = pool(kind), pool(reward)
    right, wrong = int((kinds > 0).sum()), int((kinds < 0).sum())
    if not right or not wrong:
        return [torch.zeros_like(answer.student_logp) for answer in answers]
    middle = 0.5 * (rewards[kinds > 0].mean() + rewards[kinds < 0].mean())
    slope = beta * kind * torch.sigmoid(kind * (middle - reward)) * len(kinds) / torch.where(kind > 0, float(right), float(wrong))
    return [torch.where(answer.loss_mask, value, 0.0).to(answer.student_logp) for answer, value in zip(answers, slope, strict=True)]


@reads("teacher_topk", "target_logp")
def curious_teacher(
    sequence: SequenceSignals,
    *,
    signal: str = "main",
    k: Count = 512,
    rise: NonNegative = 0.5,
    slope: Positive = 2.0,
    middle: NonNegative = 1.2,
    low: Positive = 1.1,
    high: Positive = 1.5,
) -> Tensor:
    """log of the signal's probability of each sampled token [T] at the temperature that raises its entropy H by rise sigmoid(slope (H - middle)).

    Temperatures are held in [low, high] and found by bisection on the signal's k likeliest ids and the sampled one, renormalised; tokens with
    H <= 0.03 take `low`. For `policy: squared_error` (CurioSFT, arXiv 2602.02244, as in the authors' code).
    """
    scores = sequence.scores[signal]
    logp_TK = torch.where(scores.ids >= 0, scores.logp, -torch.inf).double().log_softmax(-1)
    entropy = _entropy_at(logp_TK, torch.ones(len(logp_TK), dtype=torch.float64))
    wanted = entropy + rise * torch.sigmoid(slope * (entropy - middle))
    below, above = torch.full_like(entropy, low), torch.full_like(entropy, high)
    for _ in range(40):
        between = (below + above) / 2.0
        short = _entropy_at(logp_TK, between) < wanted
        below, above = torch.where(short, between, below), torch.where(short, above, between)
    temperature = torch.where(entropy <= 0.03, torch.full_like(entropy, low), (below + above) / 2.0)
    total = (logp_TK / temperature[:, None]).logsumexp(-1)
    share = torch.where(scores.ids >= 0, scores.logp, -torch.inf).double().logsumexp(-1)
    found = (scores.sampled.double() - share) / temperature - total
    return torch.where(sequence.loss_mask, found, 0.0).to(sequence.student_logp)


def _entropy_at(logp_TK: Tensor, temperature: Tensor) -> Tensor:
    """Entropy in nats [T] of each row at its own temperature."""
    warmer = (logp_TK / temperature[:, None]).log_softmax(-1)
    return -torch.where(warmer > -torch.inf, warmer.exp() * warmer, 0.0).sum(-1)


def agreement(
    answers: Sequence[SequenceSignals],
    pool: Pool,
    *,
    signals: TwoViews,
    gamma: NonNegative = 1.0,
    level: Literal["token", "answer"] = "token",
    floor: Share = 0.01,
) -> list[Tensor]:
    """Little where views of the same teacher disagree (UniSD, arXiv 2605.06597), divided by its mean over the term's tokens of the batch.

    token: 1 / (1 + gamma d), d the variance of the sampled token's log-probs over the views, in units of its 95 % quantile, at most 10.
    answer: exp(-gamma variance of the mean log-prob of the answer). Both at least `floor`.
    """
    views = [torch.stack([answer.scores[name].sampled for name in signals]).double() for answer in answers]
    if level == "token":
        spread = [view.var(0) for view in views]
        unit = _quantile([s[a.loss_mask] for s, a in zip(spread, answers, strict=True)], 0.95, pool)
        raw = [1.0 / (1.0 + gamma * (s / unit).clamp_max(LARGEST_DISAGREEMENT)) if unit > 0 else torch.ones_like(s) for s in spread]
    else:
        means = [view[:, answer.loss_mask].mean(1) for view, answer in zip(views, answers, strict=True)]
        raw = [(-gamma * m.var(correction=0)).exp().expand(view.shape[1]) for m, view in zip(means, views, strict=True)]
    raw = [weight.clamp_min(floor) for weight in raw]
    every = pool(_joined([weight[answer.loss_mask] for weight, answer in zip(raw, answers, strict=True)]))
    return [weight / every.mean() for weight in raw] if every.numel() else raw


def _quantile(values: Sequence[Tensor], share: float, pool: Pool) -> float:
    every = pool(_joined(values)).sort().values
    return float(every[min(int(share * len(every)), len(every) - 1)]) if every.numel() else 0.0


def _joined(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.double() for value in values]) if values else torch.zeros(0, dtype=torch.float64)


def position_ramp(answers: Sequence[SequenceSignals], pool: Pool, *, floor: Share = 0.25, middle: Share = 0.3, width: Positive = 0.1) -> list[Tensor]:
    """floor + (1 - floor) sigmoid((f - middle) / width), f = (n - 1/2) / T at the n-th of an answer's T loss tokens (PW-OPSD, arXiv 2605.21606)."""
    found = []
    for answer in answers:
        place = answer.loss_mask.double().cumsum(0) - 0.5
        share = place / answer.loss_mask.sum().clamp_min(1)
        found.append(floor + (1.0 - floor) * torch.sigmoid((share - middle) / width))
    return found


def marked(answers: Sequence[SequenceSignals], pool: Pool, *, name: str, inside: bool = True) -> list[Tensor]:
    """1 at the tokens that a writer pointed at (`writers:`), else 0; `inside` false the other way round (TRACE's spans, arXiv 2605.10194).

    A weight and not a selection: the denominator stays the whole answer's.
    """
    found = []
    for answer in answers:
        at = answer.marks.get(name)
        mask = torch.zeros_like(answer.loss_mask) if at is None else at
        found.append((mask if inside else ~mask).double())
    return found


VIEW_CREDITS = {
    "evidence": evidence,
    "consensus": consensus,
    "margin": margin,
    "class_contrast": class_contrast,
    "curious_teacher": curious_teacher,
}

VIEW_FIELDS = {"agreement": agreement, "position_ramp": position_ramp, "marked": marked}
