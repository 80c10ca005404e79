"""Numbers that a group of answers, or a teacher, gives to each answer or token: what policy terms use as advantages.

A policy term's advantage is a chain: a group credit (GroupOutcome) -> [G] first, if any, then token credits (SequenceSignals) -> [T], each
of which reads what came before as `advantage`. A token credit that reads "batch" gets all answers at once, and a `pool` (see pooling.py).

Legend: G answers of one prompt, T completion tokens, K support size. Host side, pure; all tensors in and out are detached.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from opd_rollout.types import TokenScores
from torch import Tensor

from opd.config.choices import Count, InnerShare, NonNegative, Positive, Share, reads
from opd.pooling import Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOutcome:
    """How the G answers to one prompt fared. Where `valid` is false the verifier gave no verdict and the rest means nothing.

    reward [G] float64 (shaped, where the term shapes it), correct, valid, truncated [G] bool, length [G] tokens. logratio [G]: summed
    log student - log reference of each answer, for credits that compare pairs (they read "own_logp"), else zeros.
    """

    reward: Tensor
    correct: Tensor
    valid: Tensor
    length: Tensor
    truncated: Tensor
    logratio: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def pass_rate(self) -> float:
        """Share of correct answers among the judged ones; 0 where none was judged."""
        judged = int(self.valid.sum())
        return float((self.correct & self.valid).sum()) / judged if judged else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSignals:
    """What is known of one answer's tokens, all at rollout weights.

    student_logp [T] nats; entropy [T] nats, topk_logp [T, K]: of the student, None unless a term asked; scores: signal -> TokenScores;
    behaviour_logp [T] nats: of what drew the tokens; versions: (weight version, first token, one past the last) spans, as in Completion.
    advantage [T]: what the chain gave so far; loss_mask [T] bool; marks: tokens that a writer pointed at [T] bool, by name.
    """

    student_logp: Tensor
    scores: Mapping[str, TokenScores]
    advantage: Tensor
    loss_mask: Tensor
    entropy: Tensor | None = None
    topk_logp: Tensor | None = None
    behaviour_logp: Tensor | None = None
    versions: tuple[tuple[int, int, int], ...] = ()
    marks: Mapping[str, Tensor] = field(default_factory=dict)


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
    """(r - mean) / mean [G], 0 where the mean is 0: for rewards 0 and 1 the gradient of a truncated log-likelihood (MaxRL, arXiv 2602.02710)."""
    reward, count = _judged(group)
    mean = float(reward.mean()) if count else 0.0
    return group_centered(group) / mean if mean else torch.zeros_like(group.reward)


def verdict_sign(group: GroupOutcome) -> Tensor:
    """1 for a correct answer, -1 for a wrong one [G], 0 without a verdict: the class, for credits that contrast the two."""
    return torch.where(group.valid, torch.where(group.correct, 1.0, -1.0), 0.0).double()


@reads("pair", "own_logp")
def pair_preference(group: GroupOutcome, *, beta: Positive = 0.1, reference: str = "reference") -> Tensor:
    """beta x the mean over pairs of a right and a wrong answer of sigmoid(-beta (ratio right - ratio wrong)), plus for right, minus for wrong [G].

    With these advantages REINFORCE on whole answers has the gradient of -log sigmoid(...) at rollout weights: DPO (arXiv 2305.18290), with
    the data's answer as the right one SPIN (2401.01335).
    """
    known = group.valid & ~group.logratio.isnan()
    right, wrong = known & group.correct, known & ~group.correct
    if not right.any() or not wrong.any():
        return torch.zeros_like(group.reward)
    pull = torch.sigmoid(-beta * (group.logratio[:, None] - group.logratio[None, :]))
    pull = torch.where(right[:, None] & wrong[None, :], pull, 0.0) * (beta / float(right.sum() * wrong.sum()))
    return pull.sum(1) - pull.sum(0)


def raw_reward(group: GroupOutcome) -> Tensor:
    """r itself [G]: REINFORCE without a baseline."""
    return torch.where(group.valid, group.reward, 0.0)


def _judged(group: GroupOutcome) -> tuple[Tensor, int]:
    reward = group.reward[group.valid]
    return reward, reward.numel()


@reads("behaviour_logp")
def teacher_logratio(
    sequence: SequenceSignals,
    *,
    signal: str = "main",
    discount: Share = 0.0,
    clip: Positive | None = None,
    mixture: InnerShare | None = None,
    scale: NonNegative = 1.0,
) -> Tensor:
    """The advantage so far + scale * (log teacher - log student) of the sampled tokens [T], each clamped to +-clip nats, 0 where masked.

    With `discount` each token also gets the discounted sum of those after it; with `mixture` m the ratio is at least log(m) / (1 - m)
    (REOPOLD, arXiv 2603.11137). A single-sample estimate of the negative reverse KL's gradient (Thinking Machines, 2025).
    """
    ratio = _logratio(sequence, signal, sequence.student_logp)
    if clip is not None:
        ratio = ratio.clamp(-clip, clip)
    if mixture is not None:
        ratio = ratio.clamp_min(math.log(mixture) / (1.0 - mixture))
    return torch.where(sequence.loss_mask, sequence.advantage + scale * _reward_to_go(ratio, discount), 0.0)


def _logratio(sequence: SequenceSignals, signal: str, below: Tensor) -> Tensor:
    """log of the signal's probability over `below` [T], 0 where masked."""
    return torch.where(sequence.loss_mask, sequence.scores[signal].sampled - below, 0.0)


def _reward_to_go(values: Tensor, discount: float) -> Tensor:
    """Each entry plus the discounted sum of those after it [T]."""
    return values if discount == 0.0 else _discounted(values, discount)


def _discounted(values: Tensor, discount: float) -> Tensor:
    total, out = values.new_zeros(()), []
    for value in reversed(values.unbind()):
        total = value + discount * total
        out.append(total)
    return torch.stack(out[::-1]) if out else values


@reads("behaviour_logp")
def future_logratio(
    sequence: SequenceSignals,
    *,
    signal: str = "main",
    discount: Share = 1.0,
    own: bool = False,
    normalise: Literal["length", "discounts", "none"] = "length",
    clip: Positive | None = None,
) -> Tensor:
    """The advantage so far + the (discounted) sum of log teacher - log student over the tokens *after* each [T] (MiniLLM, 2306.08543).

    own: each token's own log-ratio too, as in the authors' code. normalise: divided by the number of tokens summed, or by the sum of their
    discounts. For a term beside the exact reverse KL, which already holds each token's own part.
    """
    ratio = _logratio(sequence, signal, sequence.student_logp)
    ratio = ratio if clip is None else ratio.clamp(-clip, clip)
    mask = sequence.loss_mask
    total, ones = _discounted(ratio, discount), torch.where(mask, 1.0, 0.0).to(ratio)
    counts = _discounted(ones, discount if normalise == "discounts" else 1.0)
    if not own:
        total, counts = total - ratio, counts - ones
    if normalise != "none":
        total = torch.where(counts > 0, total / counts.clamp_min(1e-12), 0.0)
    return torch.where(mask, sequence.advantage + total, 0.0)


@reads("behaviour_logp")
def extrapolated_logratio(sequence: SequenceSignals, *, signal: str = "main", reference: str = "reference", scale: Positive = 1.25) -> Tensor:
    """The advantage so far + scale * (log teacher - log reference) - (log student - log reference) [T] (G-OPD, arXiv 2602.12125).

    The teacher's reward against a reference, weighed against staying near it: scale 1 is teacher_logratio, above 1 goes beyond the teacher.
    """
    reward = _logratio(sequence, signal, sequence.scores[reference].sampled)
    stay = -_logratio(sequence, reference, sequence.student_logp)
    return torch.where(sequence.loss_mask, sequence.advantage + scale * reward - stay, 0.0)


def early_tokens_first(sequence: SequenceSignals, *, gamma: NonNegative = 0.5) -> Tensor:
    """The advantage so far times 1 + gamma (1 - share of the answer's |advantage| that lies before the token) [T] (IW-OPD, 2606.22600)."""
    size = torch.where(sequence.loss_mask, sequence.advantage.abs(), 0.0)
    before = size.cumsum(0) - size
    return sequence.advantage * (1.0 + gamma * (1.0 - before / size.sum().clamp_min(1e-8)))


@reads("batch")
def batch_whitened(sequences: Sequence[SequenceSignals], pool: Pool, *, eps: Positive = 1e-8) -> list[Tensor]:
    """The advantage so far, minus its mean and divided by its unbiased deviation over all loss tokens of the batch (REINFORCE++, 2501.03262).

    Zero where all are equal. Over all ranks, through `pool`.
    """
    every = pool(torch.cat([s.advantage[s.loss_mask].double() for s in sequences]) if sequences else torch.zeros(0, dtype=torch.float64))
    if every.numel() < 2 or every.min() == every.max():
        return [torch.zeros_like(s.advantage) for s in sequences]
    mean, deviation = float(every.mean()), float(every.std()) + eps
    return [torch.where(s.loss_mask, (s.advantage - mean) / deviation, 0.0) for s in sequences]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFacts:
    """What a shaping may read of one answer: its length in tokens, its text, and its tokens' log-probs as in SequenceSignals."""

    length: int
    text: str
    sequence: SequenceSignals


def overlong(answer: AnswerFacts, *, share: InnerShare = 0.2, max_tokens: Count | None = None, factor: Positive = 1.0) -> float:
    """0 up to (1 - share) max_tokens, from there down linearly to -factor at max_tokens (DAPO's soft punishment, arXiv 2503.14476).

    max_tokens: null takes sampling.max_tokens.
    """
    assert max_tokens is not None, "filled in from the recipe when the objective is built"
    buffer = share * max_tokens
    return -factor * min(max(answer.length - (max_tokens - buffer), 0.0) / buffer, 1.0)


@reads("behaviour_logp")
def kl_penalty(answer: AnswerFacts, *, coef: NonNegative, signal: str = "reference", kind: Literal["k1", "k2", "k3"] = "k1") -> float:
    """-coef times the sum over the answer's tokens of an estimate of KL(student || signal), in nats.

    k1, the log-ratio, is the one whose policy gradient is that of the sequence's reverse KL (RLHF's reward; RLOO, arXiv 2402.14740).
    """
    gap = -_logratio(answer.sequence, signal, answer.sequence.student_logp).double()
    estimate = {"k1": gap, "k2": gap.square() / 2, "k3": (-gap).clamp_max(20.0).exp() - 1.0 + gap}[kind]
    return -coef * float(estimate.sum())


CREDITS = {
    "group_centered": group_centered,
    "leave_one_out": leave_one_out,
    "max_rl": max_rl,
    "raw_reward": raw_reward,
    "pair_preference": pair_preference,
    "verdict_sign": verdict_sign,
}

TOKEN_CREDITS = {
    "teacher_logratio": teacher_logratio,
    "future_logratio": future_logratio,
    "extrapolated_logratio": extrapolated_logratio,
    "early_tokens_first": early_tokens_first,
    "batch_whitened": batch_whitened,
}

SHAPINGS = {"overlong": overlong, "kl_penalty": kl_penalty}
