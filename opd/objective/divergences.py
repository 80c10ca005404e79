"""Divergences on a small set of categories, and the estimators that see the sampled token only.

Legend: N tokens, K categories. p is the student, q the teacher; student_logp [N, K] carries the graph, teacher_logp [N, K] is constant.
The names are those of `opd_kernels.divergences`, which computes the same sums over the whole vocabulary.
"""

import math
from collections.abc import Callable

import opd_kernels
import torch
from opd_kernels import PAD_LOGP, Divergence
from torch import Tensor

from opd.config.choices import InnerShare, NonNegative
from opd.text.align import rank_distance, span_likelihood


def forward_kl(
    student_logp: Tensor, teacher_logp: Tensor, *, entry_clip: NonNegative | None = None, token_clip: NonNegative | None = None
) -> Tensor:
    """KL(q || p) [N] nats; `entry_clip` caps each category's contribution (OPSD, arXiv 2601.18734), `token_clip` the sum (UniSD, 2605.06597)."""
    total = _total(teacher_logp.exp() * (teacher_logp - student_logp), entry_clip)
    return total if token_clip is None else total.clamp_max(token_clip)


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor, *, entry_clip: NonNegative | None = None) -> Tensor:
    """KL(p || q) [N] nats."""
    return _total(student_logp.exp() * (student_logp - teacher_logp), entry_clip)


def stop_gradient_reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Reverse KL whose log-ratio is a constant: gradient 0 at p == q on any subset of the vocabulary (arXiv 2605.11182)."""
    return (student_logp.exp() * (student_logp.detach() - teacher_logp)).sum(-1)


def jsd(student_logp: Tensor, teacher_logp: Tensor, *, mix: InnerShare = 0.5, entry_clip: NonNegative | None = None) -> Tensor:
    """mix KL(q || M) + (1 - mix) KL(p || M) [N] nats, M = mix q + (1 - mix) p (generalised JSD, arXiv 2306.13649)."""
    mixture = _mixture(teacher_logp, student_logp, mix)
    teacher_side = teacher_logp.exp() * (teacher_logp - mixture)
    student_side = student_logp.exp() * (student_logp - mixture)
    return _total(mix * teacher_side + (1 - mix) * student_side, entry_clip)


def skew_forward_kl(student_logp: Tensor, teacher_logp: Tensor, *, alpha: InnerShare, entry_clip: NonNegative | None = None) -> Tensor:
    """KL(q || alpha q + (1 - alpha) p) [N] nats (DistiLLM, arXiv 2402.03898)."""
    return _total(teacher_logp.exp() * (teacher_logp - _mixture(teacher_logp, student_logp, alpha)), entry_clip)


def skew_reverse_kl(student_logp: Tensor, teacher_logp: Tensor, *, alpha: InnerShare, entry_clip: NonNegative | None = None) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) [N] nats (DistiLLM, arXiv 2402.03898)."""
    return _total(student_logp.exp() * (student_logp - _mixture(student_logp, teacher_logp, alpha)), entry_clip)


def held_skew_reverse_kl(student_logp: Tensor, teacher_logp: Tensor, *, alpha: InnerShare) -> Tensor:
    """skew_reverse_kl whose mixture is a constant: the same value, another gradient (DistiLLM-2 on the student's answers, 2503.07067)."""
    return (student_logp.exp() * (student_logp - _mixture(student_logp.detach(), teacher_logp, alpha))).sum(-1)


def expected_advantage(student_logp: Tensor, advantage: Tensor) -> Tensor:
    """-sum of p A [N] over candidate tokens, A in the teacher's place (target: log_ratio); linear in p, so it needs an anchor beside it."""
    return -(student_logp.exp() * advantage).sum(-1)


def plackett_luce(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """-log probability [N] under the student's logits of the teacher's order of the candidates (TSD-KD, arXiv 2603.13260).

    sum over ranks j of log(sum over l at or after j of exp z_l) - z_j. Only differences of logits matter, so log-probs serve.
    """
    order = teacher_logp.argsort(dim=-1, descending=True, stable=True)
    ranked = student_logp.gather(-1, order)
    real = ranked > PAD_LOGP / 2
    after = torch.where(real, ranked, PAD_LOGP).flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(real, after - ranked, 0.0).sum(-1)


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def _total(entries: Tensor, entry_clip: float | None) -> Tensor:
    return (entries if entry_clip is None else entries.clamp_max(entry_clip)).sum(-1)


def sampled_reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Score-function estimate from the sampled token, [N] each: value log p - log q, expected gradient that of the reverse KL."""
    gap = (student_logp - teacher_logp).detach()
    return gap * (1.0 + student_logp - student_logp.detach())


def k1(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """log p - log q of the sampled token: the reverse KL's value, but its expected gradient is 0."""
    return student_logp - teacher_logp


def k2(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """(log p - log q)^2 / 2 of the sampled token: a biased value with the reverse KL's expected gradient."""
    return (student_logp - teacher_logp).square() / 2


def k3(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """q/p - 1 - log(q/p) of the sampled token: the reverse KL's value, but the *forward* KL's expected gradient (GRPO's penalty)."""
    ratio = (teacher_logp - student_logp).clamp_max(20.0)
    return ratio.exp() - 1.0 - ratio


def k3_with_ratio(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """k3 times p / sg[p]: the reverse KL's value *and* expected gradient (DeepSeek-V3.2's and K3++'s correction, arXiv 2604.10674).

    With several updates a batch add `weight: staleness_ratio`: together they are k3 times the live ratio p / p_old.
    """
    return (student_logp - student_logp.detach()).exp() * k3(student_logp, teacher_logp)


def dense_stop_gradient_reverse_kl() -> Divergence:
    """On the whole vocabulary both forms have the same gradient."""
    return opd_kernels.reverse_kl()


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "stop_gradient_reverse_kl": stop_gradient_reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "span_likelihood": span_likelihood,
    "rank_distance": rank_distance,
    "held_skew_reverse_kl": held_skew_reverse_kl,
    "expected_advantage": expected_advantage,
    "plackett_luce": plackett_luce,
}

DENSE: dict[str, Callable[..., Divergence]] = {
    "forward_kl": opd_kernels.forward_kl,
    "reverse_kl": opd_kernels.reverse_kl,
    "stop_gradient_reverse_kl": dense_stop_gradient_reverse_kl,
    "jsd": opd_kernels.jsd,
    "skew_forward_kl": opd_kernels.skew_forward_kl,
    "skew_reverse_kl": opd_kernels.skew_reverse_kl,
}

ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "k3_with_ratio": k3_with_ratio}
