"""Running sums of exponentials over tiles."""

import math

import torch
from torch import Tensor

from opd_kernels.exponentials import exp_into, log2_below_into
from opd_kernels.selection import FLOOR, RunningSums

MASKED = -1e30  # a column left out of sums with a known maximum: its exponential is 0, and 0 * MASKED is no NaN
_NEG_INF = float("-inf")


def empty_sums(tokens: int, like: Tensor) -> RunningSums:
    m = like.new_full((tokens,), _NEG_INF)
    return RunningSums(m=m, l=torch.zeros_like(m), t=torch.zeros_like(m))


def accumulate(x: Tensor, sums: RunningSums, shifted: Tensor, mass: Tensor | None) -> None:
    """Adds the columns of x [C, cv] to sums, in place.

    `shifted` is scratch like x; `mass` is another, or None to leave t alone. The last of the two that is given (mass, else shifted) may be
    x itself, which then holds exp(x - m) afterwards. t is the moment about the maximum: about zero it would lose the digits of a small
    entropy to those of large logits.
    """
    if x.shape[1] == 0:
        return
    top = torch.maximum(sums.m, x.amax(dim=1))
    origin = _origin(top)
    offset = torch.where(sums.m == _NEG_INF, FLOOR, sums.m - origin)
    decay = offset.exp()
    torch.sub(x, origin[:, None], out=shifted)
    if mass is None:
        exp_into(shifted, out=shifted)
        sums.l.mul_(decay).add_(shifted.sum(dim=1))
    else:
        shifted.clamp_(min=FLOOR)
        exp_into(shifted, out=mass)
        sums.t.add_(torch.where(sums.l == 0, 0.0, offset * sums.l)).mul_(decay)
        sums.l.mul_(decay).add_(mass.sum(dim=1))
        sums.t.add_(shifted.mul_(mass).sum(dim=1))
    sums.m.copy_(top)


def accumulate_below(x: Tensor, sums: RunningSums, shifted: Tensor, mass: Tensor, *, bounded: bool) -> None:
    """Adds the columns of x [C, cv] to sums.l and sums.t, in place, where sums.m is the maximum over all columns to come.

    `bounded` promises that x holds no -inf.
    """
    log2_below_into(x, _origin(sums.m), out=shifted)
    if not bounded:
        shifted.clamp_(min=MASKED)
    torch.exp2(shifted, out=mass)
    sums.l.add_(mass.sum(dim=1))
    sums.t.add_(mass.mul_(shifted).sum(dim=1), alpha=math.log(2.0))


def exp_below_(x: Tensor, top: Tensor) -> Tensor:
    """x [C, cv] becomes exp(x - top), bit for bit what accumulate left in it where `top` [C] was the maximum afterwards."""
    return exp_into(x.sub_(_origin(top)[:, None]), out=x)


def _origin(top: Tensor) -> Tensor:
    return torch.where(top == _NEG_INF, 0.0, top)
