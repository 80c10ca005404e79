"""Weights that need more than their own token: made once a batch by `join`, before any update, from what is known at rollout weights.

A function gets the answers that its term learns from, and a pool for statistics over the batch and all ranks (see opd/pooling.py):
(answers, pool) -> one [T] an answer. Numbers are weights; truth values are a selection, and tokens that are not selected leave the term's
denominator, as those that a gate drops. They share the recipe key `weight`.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from opd_rollout.types import TokenScores
from torch import Tensor

from opd.config.choices import Count, NonNegative, Positive, Range, Share, reads
from opd.credit import SequenceSignals
from opd.objective.targets import MINIMUM_STEP
from opd.pooling import Pool

TopShare = Annotated[float, Range(0.0, 1.0)]


def largest(scores: Sequence[Tensor], masks: Sequence[Tensor], share: float, pool: Pool) -> list[Tensor]:
    """True at the `share` of all masked-in tokens whose score is largest (at least one token of the batch; ties with the last one are in)."""
    chosen = [score[mask].double() for score, mask in zip(scores, masks, strict=True)]
    every = pool(torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.float64))
    if not every.numel():
        return [torch.zeros_like(mask) for mask in masks]
    smallest = every.topk(max(1, int(share * every.numel()))).values[-1]
    return [mask & (score.double() >= smallest) for score, mask in zip(scores, masks, strict=True)]


@reads("entropy")
def top_entropy(answers: Sequence[SequenceSignals], pool: Pool, *, share: TopShare = 0.2) -> list[Tensor]:
    """Only the `share` of the batch's tokens at which the student is least sure (arXiv 2506.01939)."""
    return largest([_entropy(answer) for answer in answers], [answer.loss_mask for answer in answers], share, pool)


@reads("entropy")
def opener(answers: Sequence[SequenceSignals], pool: Pool, *, share: TopShare = 0.1) -> list[Tensor]:
    """Only an answer's first tokens, up to the one at which `share` of its summed student entropy is reached (TSD-KD, arXiv 2603.13260)."""
    return [_opens(answer, share) for answer in answers]


def _opens(answer: SequenceSignals, share: float) -> Tensor:
    entropy = torch.where(answer.loss_mask, _entropy(answer), 0.0).double()
    before = entropy.cumsum(0) - entropy
    return answer.loss_mask & (before < share * entropy.sum())


@reads("entropy", "shared_ids", "student_ids")
def soft_or(
    answers: Sequence[SequenceSignals], pool: Pool, *, share: TopShare = 0.5, signal: str = "main", outliers: TopShare = 0.02
) -> list[Tensor]:
    """Only the `share` of the batch's tokens with the largest h + d - h d (TIP, arXiv 2604.14084).

    h: the student's entropy, its top `outliers` cut off, d: KL(student || teacher) on the student's top-k and the rest; each is put on 0 to 1
    between its least and largest value in the batch.
    """
    masks = [answer.loss_mask for answer in answers]
    h = _unit([_entropy(answer) for answer in answers], masks, pool, outliers)
    d = _unit([_shared_reverse_kl(answer, signal) for answer in answers], masks, pool, 0.0)
    return largest([a + b - a * b for a, b in zip(h, d, strict=True)], masks, share, pool)


@reads("shared_ids", "student_ids")
def peak_divergence(
    answers: Sequence[SequenceSignals], pool: Pool, *, tokens: Count = 20, factor: Positive = 2.0, decay: Share = 1.0, signal: str = "main"
) -> list[Tensor]:
    """`factor` at each answer's `tokens` tokens with the largest KL(student || signal), else 1, times decay^n at its n-th token (CORD, 2601.16547).

    The divergence is taken on the student's top-k and the rest, at rollout weights; of equal ones the earlier token counts as larger.
    """
    return [_peaks(answer, signal, tokens, factor) * _decaying(answer, decay) for answer in answers]


def _peaks(answer: SequenceSignals, signal: str, tokens: int, factor: float) -> Tensor:
    gap = torch.where(answer.loss_mask, _shared_reverse_kl(answer, signal), -torch.inf)
    chosen = gap.argsort(descending=True, stable=True)[:tokens]
    return torch.ones_like(gap).index_fill(0, chosen, factor)


def _decaying(answer: SequenceSignals, decay: float) -> Tensor:
    return decay ** (answer.loss_mask.double().cumsum(0) - 1.0).clamp_min(0.0)


def _unit(values: Sequence[Tensor], masks: Sequence[Tensor], pool: Pool, outliers: float) -> list[Tensor]:
    """(value - least) / (largest - least) over the batch, the top `outliers` of the values held at what then is the largest."""
    every = pool(torch.cat([v[m].double() for v, m in zip(values, masks, strict=True)]) if values else torch.zeros(0, dtype=torch.float64))
    if not every.numel():
        return [torch.zeros_like(value).double() for value in values]
    low, high = float(every.min()), float(every.sort().values[int((1.0 - outliers) * (every.numel() - 1))])
    return [((value.double() - low) / max(high - low, 1e-12)).clamp(0.0, 1.0) for value in values]


def _shared_reverse_kl(answer: SequenceSignals, signal: str) -> Tensor:
    """KL(student || signal) [T] on the ids at which both were scored and one category for the rest."""
    scores = answer.scores[signal]
    assert answer.topk_logp is not None and answer.topk_logp.shape == scores.logp.shape, "legality asks for support student_topk"
    lp, lq = answer.topk_logp.double(), scores.logp.double()
    inside = torch.where(scores.ids >= 0, lp.exp() * (lp - lq), 0.0).sum(-1)
    tail = torch.log1p(-lp.exp().sum(-1).clamp_max(1.0 - 1e-12))
    return inside + tail.exp() * (tail - scores.tail_logp.double())


@reads("signal_entropy")
def batch_confidence(answers: Sequence[SequenceSignals], pool: Pool, *, signal: str = "main", beta: NonNegative = 1.0) -> list[Tensor]:
    """exp(-beta H) of the signal's entropy H in nats, divided by its mean over the term's tokens of the batch (SRPO, arXiv 2604.02288)."""
    raw = [(-beta * answer.scores[signal].entropy.double()).exp() for answer in answers]
    every = pool(torch.cat([r[answer.loss_mask] for r, answer in zip(raw, answers, strict=True)]) if raw else torch.zeros(0, dtype=torch.float64))
    return [r / every.mean() for r in raw] if every.numel() else raw


@reads("shared_ids")
def extrapolation_budget(
    answers: Sequence[SequenceSignals],
    pool: Pool,
    *,
    signal: str = "main",
    reference: str = "reference",
    scale: Positive = 15.0,
    beta: Positive = 0.1,
) -> list[Tensor]:
    """beta / a, a as in the target `extrapolate`: what is extrapolated far weighs little (AlignDistil, arXiv 2503.02832).

    Both signals must be scored at the same ids; the distance is taken there and on one category for the rest.
    """
    return [beta / _step_size(answer.scores[signal], answer.scores[reference], scale) for answer in answers]


def _step_size(one: TokenScores, other: TokenScores, scale: float) -> Tensor:
    assert torch.equal(one.ids, other.ids), "legality asks for support student_topk or union on both"
    inside = torch.where(one.ids >= 0, (one.logp.double().exp() - other.logp.double().exp()).abs(), 0.0).sum(-1)
    return scale * (inside + (one.tail_logp.double().exp() - other.tail_logp.double().exp()).abs()) + MINIMUM_STEP


@reads("old_logp", "behaviour_logp")
def span_ratio(answers: Sequence[SequenceSignals], pool: Pool, *, low: NonNegative = 0.0, high: Positive = 2.0) -> list[Tensor]:
    """Truncated importance sampling by span: every token of a span that one weight version drew gets the same factor.

    The factor is exp of the mean of log p_old - log p_engine over the span's loss tokens, held in [low, high]. engine_ratio is the same token by
    token; over a span the geometric mean (as in GSPO, arXiv 2507.18071) varies less and a long answer keeps one factor for each of its versions.
    """
    return [_span_factors(answer).clamp(low, high) for answer in answers]


def _span_factors(answer: SequenceSignals) -> Tensor:
    assert answer.behaviour_logp is not None, "join fills it in"
    difference = answer.student_logp.double() - answer.behaviour_logp.double()
    factors = torch.ones_like(difference)
    for _version, start, end in answer.versions:
        inside = answer.loss_mask[start:end]
        if inside.any():
            factors[start:end] = difference[start:end][inside].mean().exp()
    return factors


def _entropy(answer: SequenceSignals) -> Tensor:
    assert answer.entropy is not None, "the learner prepares the entropy when `needs.entropy` is set"
    return answer.entropy


FIELDS = {
    "top_entropy": top_entropy,
    "opener": opener,
    "soft_or": soft_or,
    "peak_divergence": peak_divergence,
    "batch_confidence": batch_confidence,
    "extrapolation_budget": extrapolation_budget,
    "span_ratio": span_ratio,
}
