"""Running sums of exponentials over tiles."""

import torch
from torch import Tensor

from opd_kernels.exponentials import base_of_log2, log2_into, sums_of_log2
from opd_kernels.products import Scratch
from opd_kernels.selection import FLOOR, RunningSums
from opd_kernels.tiling import spans

MASKED = -1e30  # a column left out of sums with a known maximum: its exponential is 0, and 0 * MASKED is no NaN
_NEG_INF = float("-inf")


def empty_sums(tokens: int, like: Tensor) -> RunningSums:
    m = like.new_full((tokens,), _NEG_INF)
    return RunningSums(m=m, l=torch.zeros_like(m), t=torch.zeros_like(m))


def accumulate(x: Tensor, sums: RunningSums, shifted: Tensor, mass: Tensor | None) -> None:
    """Adds the columns of x [C, cv] to sums, in place.

    `shifted` is scratch like x; `mass` is another, or None to leave t alone. The last of the two that is given (mass, else shifted) may be
    x itself, which then holds exp(x - m) afterwards, but for the excess of `base_of_log2`. t is the moment about the maximum: about zero it
    would lose the digits of a small entropy to those of large logits.
    """
    if x.shape[1] == 0:
        return
    top = torch.maximum(sums.m, x.amax(dim=1))
    origin = _origin(top)
    offset = torch.where(sums.m == _NEG_INF, FLOOR, sums.m - origin)
    decay = offset.exp()
    base, excess = base_of_log2(origin)
    log2_into(x, base, out=shifted)
    if mass is None:
        sums.l.mul_(decay).add_(shifted.exp2_().sum(dim=1) * torch.exp2(-excess))
    else:
        torch.exp2(shifted.clamp_(min=FLOOR), out=mass)
        sums.t.add_(torch.where(sums.l == 0, 0.0, offset * sums.l)).mul_(decay)
        l, t = sums_of_log2(mass.sum(dim=1), shifted.mul_(mass).sum(dim=1), excess)  # noqa: E741
        sums.l.mul_(decay).add_(l)
        sums.t.add_(t)
    sums.m.copy_(top)


def sums_below(x: Tensor, top: Tensor, inner: int, scratch: Scratch, *, bounded: bool) -> RunningSums:
    """Sums over the columns of x [C, V] whose maximum is top [C], or a larger value of the same row on another rank.

    `inner` rows at a time in two areas of scratch. `bounded` promises that x holds no -inf.
    """
    base, excess = base_of_log2(_origin(top))
    areas = [scratch.view(area, min(inner, x.shape[0]), x.shape[1]) for area in (0, 1)]
    parts = []
    for rows in spans(x.shape[0], inner):
        shifted, mass = (area[: rows.stop - rows.start] for area in areas)
        log2_into(x[rows], base[rows], out=shifted)
        if not bounded:
            shifted.clamp_(min=MASKED)
        torch.exp2(shifted, out=mass)
        parts.append((mass.sum(dim=1), mass.mul_(shifted).sum(dim=1)))
    l, t = (torch.cat(column) for column in zip(*parts, strict=True))  # noqa: E741
    l, t = sums_of_log2(l, t, excess)  # noqa: E741
    return RunningSums(m=top, l=l, t=t)


def exp_below_(x: Tensor, top: Tensor) -> Tensor:
    """x [C, cv] becomes exp(x - top), bit for bit what accumulate left in it where `top` [C] was the maximum afterwards."""
    return log2_into(x, base_of_log2(_origin(top))[0], out=x).exp2_()


def _origin(top: Tensor) -> Tensor:
    return torch.where(top == _NEG_INF, 0.0, top)
