"""Numbers that a group of answers, or a teacher, gives to each answer or token: what policy terms use as advantages.

Legend: G answers of one prompt, T completion tokens. Host side, pure; all tensors in and out are detached.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from opd_rollout.types import TokenScores
from torch import Tensor

from opd.choices import NonNegative, Positive, Share, reads


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOutcome:
    """How the G answers to one prompt fared. Where `valid` is false the verifier gave no verdict and the rest means nothing.

    reward [G] float64, correct, valid, truncated [G] bool, length [G] tokens.
    """

    reward: Tensor
    correct: Tensor
    valid: Tensor
    length: Tensor
    truncated: Tensor

    @property
    def pass_rate(self) -> float:
        """Share of correct answers among the judged ones; 0 where none was judged."""
        judged = int(self.valid.sum())
        return float((self.correct & self.valid).sum()) / judged if judged else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSignals:
    """What is known of one answer's tokens. student_logp [T] nats at rollout weights; scores: signal -> TokenScores; loss_mask [T] bool."""

    student_logp: Tensor
    scores: Mapping[str, TokenScores]
    group_credit: float
    loss_mask: Tensor


@reads("group")
def group_centered(group: GroupOutcome, *, std: bool = False, eps: Positive = 1e-6) -> Tensor:
    """r - mean [G]; with `std` divided by the unbiased standard deviation plus eps (GRPO, arXiv 2402.03300; without: 2503.20783)."""
    reward, count = _judged(group)
    if count < 2 or reward.min() == reward.max():  # rounding noise of the mean must not be divided by eps
        return torch.zeros_like(group.reward)
    centered = torch.where(group.valid, group.reward - reward.mean(), 0.0)
    return centered / (reward.std() + eps) if std else centered


@reads("group")
def leave_one_out(group: GroupOutcome) -> Tensor:
    """r minus the mean of the other answers' [G]: an unbiased baseline (RLOO, arXiv 2402.14740)."""
    _, count = _judged(group)
    return group_centered(group) * (count / (count - 1) if count > 1 else 0.0)


@reads("group")
def max_rl(group: GroupOutcome) -> Tensor:
    """(r - mean) / mean [G], 0 where the mean is 0 (MaxRL)."""
    reward, count = _judged(group)
    mean = float(reward.mean()) if count else 0.0
    return group_centered(group) / mean if mean else torch.zeros_like(group.reward)


def raw_reward(group: GroupOutcome) -> Tensor:
    """r itself [G]: REINFORCE without a baseline."""
    return torch.where(group.valid, group.reward, 0.0)


def _judged(group: GroupOutcome) -> tuple[Tensor, int]:
    reward = group.reward[group.valid]
    return reward, reward.numel()


@reads("behaviour_logp")
def teacher_logratio(
    sequence: SequenceSignals, *, signal: str = "main", discount: Share = 0.0, clip: Positive | None = None, scale: NonNegative = 1.0
) -> Tensor:
    """scale * (log teacher - log student) of the sampled tokens [T], each clamped to +-clip nats, 0 where masked.

    With `discount` each token also gets the discounted sum of those after it. A single-sample estimate of the negative reverse KL's
    gradient (Thinking Machines, On-Policy Distillation, 2025).
    """
    ratio = sequence.scores[signal].sampled - sequence.student_logp
    if clip is not None:
        ratio = ratio.clamp(-clip, clip)
    ratio = torch.where(sequence.loss_mask, ratio, 0.0) * scale
    if discount == 0.0:
        return ratio
    total, out = ratio.new_zeros(()), []
    for value in reversed(ratio.unbind()):
        total = value + discount * total
        out.append(total)
    return torch.where(sequence.loss_mask, torch.stack(out[::-1]), 0.0) if out else ratio


CREDITS = {
    "group_centered": group_centered,
    "leave_one_out": leave_one_out,
    "max_rl": max_rl,
    "raw_reward": raw_reward,
}

TOKEN_CREDITS = {"teacher_logratio": teacher_logratio}
