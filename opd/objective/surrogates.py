"""Policy-gradient surrogates, to be minimised.

(student_logp with its graph, old_logp, advantage), all [N] -> (loss [N], clipped [N] bool or None).
"""

import math
from typing import Annotated

import torch
from torch import Tensor

from opd.config.choices import InnerShare, NonNegative, Positive, Range, reads

LOG_RATIO_LIMIT = 20.0


def ratio(student_logp: Tensor, old_logp: Tensor) -> Tensor:
    """student / old probability [N], the log-ratio held within +-20 nats."""
    return (student_logp - old_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def reinforce(student_logp: Tensor, old_logp: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value -A, gradient -A grad log p."""
    return -advantage * (1.0 + student_logp - student_logp.detach()), None


@reads("old_logp")
def ppo_clip(
    student_logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    low: Annotated[float, Range(0.0, 1.0)] = 0.2,
    high: Positive = 0.2,
    dual: Annotated[float, Range(1.0, open=True)] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = p / p_old (PPO, arXiv 1707.06347; low < high: DAPO, 2503.14476).

    `dual` = c bounds the loss of negative advantages by c |A| (dual-clip PPO, 1912.09729). Clipped tokens give no gradient.
    """
    r = ratio(student_logp, old_logp)
    plain, bounded = -r * advantage, -r.clamp(1.0 - low, 1.0 + high) * advantage
    clipped = bounded > plain
    loss = torch.maximum(plain, bounded)
    if dual is not None:
        ceiling = -dual * advantage
        over = (advantage < 0) & (loss > ceiling)
        loss, clipped = torch.where(over, ceiling, loss), clipped | over
    return loss, clipped.detach()


@reads("old_logp", "sequence")
def sequence_clip(
    student_logp: Tensor, old_logp: Tensor, advantage: Tensor, *, low: Annotated[float, Range(0.0, 1.0)] = 3e-4, high: Positive = 4e-4
) -> tuple[Tensor, Tensor | None]:
    """ppo_clip with one ratio an answer, the geometric mean of its tokens' (GSPO in its token form, arXiv 2507.18071).

    old_logp comes from `at_answer_ratio`: the value of each token's ratio is the answer's, its gradient that of the token's log-prob.
    """
    return ppo_clip(student_logp, old_logp, advantage, low=low, high=high)


def at_answer_ratio(student_logp: Tensor, old_logp: Tensor, sequence: Tensor, loss_mask: Tensor) -> Tensor:
    """Old log-probs [N] under which every token of an answer has the ratio exp(mean over its loss tokens of log p - log p_old).

    student_logp is detached; sequence [N] numbers the answers of a micro-batch, all of whose tokens must be here.
    """
    log_ratio = torch.where(loss_mask, student_logp - old_logp, 0.0)
    answers = int(sequence.max()) + 1 if sequence.numel() else 0
    total = log_ratio.new_zeros(answers).index_add(0, sequence, log_ratio)
    count = log_ratio.new_zeros(answers).index_add(0, sequence, loss_mask.to(log_ratio))
    return student_logp - (total / count.clamp_min(1.0))[sequence]


@reads("old_logp")
def cispo(
    student_logp: Tensor, old_logp: Tensor, advantage: Tensor, *, low: NonNegative = 1.0, high: NonNegative = 4.0
) -> tuple[Tensor, Tensor | None]:
    """Value -w A, gradient -w A grad log p, w = clip(p / p_old, 1 - low, 1 + high) held constant (CISPO, arXiv 2506.13585).

    Clipped tokens still learn. low 1 is no lower bound, high 4 an absolute cap of 5 (ScaleRL, 2510.13786).
    """
    r = ratio(student_logp.detach(), old_logp)
    w = r.clamp(1.0 - low, 1.0 + high)
    return -w * advantage * (1.0 + student_logp - student_logp.detach()), w != r


@reads("old_logp", "sequence")
def log_ratio_regression(
    student_logp: Tensor, old_logp: Tensor, advantage: Tensor, *, scale: Positive = 1.0, low: InnerShare = 0.2, high: Positive = 0.2
) -> tuple[Tensor, Tensor | None]:
    """(clamp(d, log(1 - low), log(1 + high)) - scale A)^2, d the answer's mean log p - log p_old: no ratio is formed, so nothing explodes.

    The form for texts of GDSD (arXiv 2605.29398), which regresses a diffusion model's log-ratio. Beyond the clamp there is no gradient.
    """
    gap = student_logp - old_logp
    held = gap.clamp(math.log1p(-low), math.log1p(high))
    return (held - scale * advantage).square(), (held != gap).detach()


@reads("target_logp")
def squared_error(student_logp: Tensor, old_logp: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor | None]:
    """(log p - A)^2 / 2, where A is a log-probability to come near to and no advantage, such as `curious_teacher` gives."""
    return (student_logp - advantage).square() / 2.0, None


SURROGATES = {
    "reinforce": reinforce,
    "ppo_clip": ppo_clip,
    "sequence_clip": sequence_clip,
    "cispo": cispo,
    "log_ratio_regression": log_ratio_regression,
    "squared_error": squared_error,
}
