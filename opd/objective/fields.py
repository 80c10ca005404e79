"""Weights that need more than their own token: made once a batch by `join`, before any update, from what is known at rollout weights.

A function gets the answers that its term learns from, and a pool for statistics over the batch and all ranks (see opd/pooling.py):
(answers, pool) -> one [T] an answer. Numbers are weights; truth values are a selection, and tokens that are not selected leave the term's
denominator, as those that a gate drops. They share the recipe key `weight`.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from opd.choices import Range, reads
from opd.credit import SequenceSignals
from opd.pooling import Pool

TopShare = Annotated[float, Range(0.0, 1.0)]


def per_answer(function: Callable[..., Tensor], answers: Sequence[SequenceSignals], **parameters: Any) -> list[Tensor]:
    """The function at each answer."""
    return [function(answer, **parameters) for answer in answers]


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


def _entropy(answer: SequenceSignals) -> Tensor:
    assert answer.entropy is not None, "the learner prepares the entropy when `needs.entropy` is set"
    return answer.entropy


FIELDS = {"top_entropy": top_entropy}
