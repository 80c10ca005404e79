"""Which vocabulary entries a divergence is computed on, and what becomes of the mass outside them.

Legend: N tokens, K ids of a micro-batch's rows, k ids of one signal, k' categories after completion.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from opd_kernels import PAD_LOGP, SelectedLogprobs
from torch import Tensor

from opd.config.choices import Count
from opd.types import SignalRows, TokenRows

Tail = Literal["bucket", "renormalise", "drop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """kind: the whole vocabulary, the sampled token, the k likeliest tokens of one side (`sampled` adds the sampled token) or of all sides, or
    k draws.

    "hidden" is no support: both sides' last hidden states are compared, before any vocabulary. "spans": no vocabulary either, but the
    log-probs of runs of tokens that two tokenizers have in common. "unpaired": tokens that only one of two tokenizers has, by rank.

    tail: "bucket" keeps the outside mass as one more category, "renormalise" makes both sides sum to one inside, "drop" does neither.
    """

    kind: Literal["full", "hidden", "spans", "sampled", "student_topk", "teacher_topk", "union", "teacher_sample", "unpaired"]
    k: int = 0
    tail: Tail = "bucket"
    sampled: bool = False

    @property
    def sparse(self) -> bool:
        return self.kind in ("student_topk", "teacher_topk", "union", "teacher_sample", "unpaired")

    @property
    def by_student(self) -> bool:
        """Whether the student's likeliest tokens, chosen before the step, belong to it."""
        return self.kind in ("student_topk", "union", "unpaired")


@dataclass(frozen=True, slots=True, kw_only=True)
class Categories:
    """Both sides' log-probs on the same k' categories, student [N, k'] with its graph, teacher [N, k'] constant; tails [N] detached."""

    student: Tensor
    teacher: Tensor
    student_tail: Tensor
    teacher_tail: Tensor


def full() -> Support:
    """Every entry, computed from hidden states chunk by chunk; not for a teacher behind vLLM or on file."""
    return Support(kind="full")


def sampled() -> Support:
    """The sampled token alone: one unbiased sample of the reverse KL's gradient a token."""
    return Support(kind="sampled")


def spans() -> Support:
    """Runs of tokens with the same bytes under two tokenizers, for `span_likelihood`."""
    return Support(kind="spans")


def student_topk(*, k: Count, tail: Tail = "bucket", sampled: bool = False) -> Support:
    """The student's k likeliest entries at rollout weights; sampled: the sampled token too."""
    return Support(kind="student_topk", k=k, tail=tail, sampled=sampled)


def teacher_topk(*, k: Count, tail: Tail = "bucket", sampled: bool = False) -> Support:
    """The teacher's k likeliest entries; sampled: the sampled token too."""
    return Support(kind="teacher_topk", k=k, tail=tail, sampled=sampled)


def union(*, k: Count, tail: Tail = "bucket") -> Support:
    """The k likeliest tokens of the student and of every signal that has this support, and the sampled token, for all of them the same ids."""
    return Support(kind="union", k=k, tail=tail, sampled=True)


def teacher_sample(*, draws: Count) -> Support:
    """Ids drawn from the teacher at each token, by how often they came (RS-KD, arXiv 2503.16870): unbiased for the forward KL's gradient."""
    return Support(kind="teacher_sample", k=draws, tail="drop")


def unpaired(*, k: Count) -> Support:
    """Of the k likeliest tokens of student and teacher those of which the other tokenizer has none, paired by rank (GOLD, with `rank_distance`)."""
    return Support(kind="unpaired", k=k, tail="drop")


def first_occurrence(ids: Tensor) -> Tensor:
    """[N, K] bool: true at each row's real ids (not -1), once an id."""
    order = ids.argsort(dim=-1, stable=True)
    ordered = ids.gather(-1, order)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(fresh).scatter(-1, order, fresh) & (ids >= 0)


def categories(support: Support, selected: SelectedLogprobs, rows: TokenRows, signal: SignalRows) -> Categories:
    """Student and teacher on a sparse support's categories, the tail completed as the support says.

    The kernel's tail holds the mass outside all ids of the row. The mass of the ids that are not in this support is added to it in
    log space: no subtraction from one, so nothing cancels. Where the signal is not available the teacher's side is the student's.
    """
    columns = _columns(support)
    ids = rows.ids[:, signal.columns][:, columns]
    kept = _kept(support, ids, rows.token)
    others = first_occurrence(torch.cat([torch.where(kept, ids, -1), rows.ids], dim=-1))[:, ids.shape[1] :]
    student = torch.where(kept, selected.logp[:, signal.columns][:, columns], PAD_LOGP)
    assert selected.tail_logp is not None, "a sparse support needs the kernel's tail"
    student_tail = torch.logaddexp(selected.tail_logp, _mass(selected.logp, others))
    logp = signal.logp[:, columns].to(student)
    teacher = torch.where(kept, logp, PAD_LOGP)
    outside = first_occurrence(ids) & ~kept
    teacher_tail = torch.logaddexp(signal.tail_logp.to(student), _mass(logp, outside))
    available = signal.available[:, None]
    teacher = torch.where(available, teacher, student.detach()).clamp_min(PAD_LOGP)
    teacher_tail = torch.where(signal.available, teacher_tail, student_tail.detach()).clamp_min(PAD_LOGP)
    tails = {"student_tail": student_tail.detach(), "teacher_tail": teacher_tail}
    if support.tail == "bucket":
        student = torch.cat([student, student_tail.clamp_min(PAD_LOGP)[:, None]], dim=-1)
        teacher = torch.cat([teacher, teacher_tail[:, None]], dim=-1)
    if support.tail == "renormalise":
        student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return Categories(student=student, teacher=teacher, **tails)


def _columns(support: Support) -> slice:
    """The columns of a signal that a support reads: a teacher with another tokenizer may bring its own top-k, then what has no partner."""
    if support.kind not in ("teacher_topk", "unpaired"):
        return slice(None)
    return slice(support.k + 1, None) if support.kind == "unpaired" else slice(support.k + 1)


def _kept(support: Support, ids: Tensor, token: Tensor) -> Tensor:
    """The slice's ids that belong to the support: scorers add the sampled token to their top-k, which is then one id too many."""
    distinct = first_occurrence(ids)
    if support.sampled:
        return distinct
    added = distinct.sum(-1, keepdim=True) > support.k
    return distinct & ~(added & (ids == token[:, None]))


def _mass(logp: Tensor, chosen: Tensor) -> Tensor:
    """log of the summed probability of the chosen columns [N]; PAD_LOGP, with gradient 0, where there are none."""
    if logp.shape[-1] == 0:
        return logp.new_full(logp.shape[:-1], PAD_LOGP)
    return torch.where(chosen, logp, PAD_LOGP).clamp_min(PAD_LOGP).logsumexp(-1)


SUPPORTS = {
    "full": full,
    "spans": spans,
    "sampled": sampled,
    "student_topk": student_topk,
    "teacher_topk": teacher_topk,
    "union": union,
    "teacher_sample": teacher_sample,
    "unpaired": unpaired,
}
