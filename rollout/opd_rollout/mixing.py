"""Tokens drawn from two models at once: the distribution [B, V] of each next token, given the student's and the teacher's.

Log-probabilities in and out, of the same tempered models at the same prefix. What comes out is what was sampled, so a completion's
log-probs stay true and importance weights on them are exact.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Mix = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partner:
    """A second model with the same token ids, and how the two make one distribution."""

    model: nn.Module
    mix: Mix


def mixture(student_logp: Tensor, teacher_logp: Tensor, *, share: float) -> Tensor:
    """log(share * teacher + (1 - share) * student) (MiniLLM's teacher-mixed sampling, arXiv 2306.08543)."""
    logp = torch.stack([student_logp, teacher_logp])
    weights = logp.new_tensor([1.0 - share, share]).log().view(2, 1, 1)
    return (logp + weights).logsumexp(0)


def interleave(student_logp: Tensor, teacher_logp: Tensor, *, k: int) -> Tensor:
    """A student's token stays if it is among the teacher's k likeliest, else the teacher draws another (SKD, arXiv 2410.11325).

    As one distribution: p on the teacher's top k, plus q everywhere times the mass that p has outside.
    """
    kept = torch.zeros_like(teacher_logp, dtype=torch.bool)
    kept.scatter_(-1, teacher_logp.topk(min(k, teacher_logp.shape[-1]), dim=-1).indices, True)
    accepted = torch.where(kept, student_logp, -torch.inf)
    rejected = torch.where(kept, -torch.inf, student_logp).logsumexp(-1, keepdim=True)
    return torch.logaddexp(accepted, teacher_logp + rejected)


def teacher_only(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """The teacher alone (sequence-level distillation, arXiv 1606.07947)."""
    return teacher_logp
