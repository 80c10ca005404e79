"""Policy-gradient surrogates, to be minimised.

(student_logp with its graph, old_logp, advantage), all [N] -> (loss [N], clipped [N] bool or None).
"""

from typing import Annotated

import torch
from torch import Tensor

from opd.choices import Positive, Range, reads

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


SURROGATES = {"reinforce": reinforce, "ppo_clip": ppo_clip}
