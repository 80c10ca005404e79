"""The maths on [N, K] that every backend shares: from running sums to log-probabilities, and from upstream gradients to coefficients.

Let S be a token's set of chosen ids, (m, l, t) = (max, sum exp(x - m), sum exp(x - m) (x - m)) over the columns outside S, and
A = g_logz - g_tail - sum_k g_k for upstream gradients g. With p = exp(logp) and entropy E,

    v not in S:  dx_v = A p_v + g_tail exp(logp_v - tail_logp) - g_E p_v (logp_v + E)
    v in S:      dx_v = sum of g_k over k with id v, plus A p_v - g_E p_v (logp_v + E)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.types import PAD_LOGP

FLOOR = -1e4  # stands for -inf where a product with a zero probability is formed
_NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningSums:
    """Maximum, sum of exponentials and sum of exponential times exponent, per token, over the columns seen so far."""

    m: Tensor  # [N]
    l: Tensor  # [N]  # noqa: E741
    t: Tensor  # [N]; zeros where the entropy is not asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """Gradients of a loss with respect to the four outputs; None where the loss does not use one."""

    logp: Tensor | None
    tail_logp: Tensor | None
    logz: Tensor | None
    entropy: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """dx of a row: e_v * (scale + slope * (x_v - reference)) with e_v = exp(x_v - reference) outside S, `selected` inside."""

    reference: Tensor  # [N] log-normaliser of the columns outside S where there is a tail, of all columns elsewhere
    scale: Tensor  # [N]
    slope: Tensor | None  # [N]; None without an entropy gradient
    selected: Tensor  # [N, K] the whole dx at each id, equal at duplicates, 0 at pads


def first_occurrences(ids: Tensor) -> Tensor:
    """[N, K] bool: True at the first of equal ids of a row; False at pads (-1)."""
    ordered, order = ids.sort(dim=1, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(new).scatter_(1, order, new) & (ids >= 0)


def sum_over_duplicates(values: Tensor, ids: Tensor) -> Tensor:
    """[N, K]: each entry becomes the sum of its row's values over equal ids, in a fixed order, the same bits at each duplicate."""
    ordered, order = ids.sort(dim=1, stable=True)
    total = values.gather(1, order)
    columns = ids.shape[1]
    shift = 1
    while shift < columns:
        same = ordered[:, shift:] == ordered[:, :-shift]
        total = torch.cat([total[:, :shift], total[:, shift:] + torch.where(same, total[:, :-shift], 0.0)], dim=1)
        shift *= 2
    ends = torch.ones_like(ordered, dtype=torch.bool)
    ends[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    position = torch.arange(columns, device=ids.device).expand_as(ids)
    last = torch.where(ends, position, columns).flip(1).cummin(dim=1).values.flip(1)
    return torch.empty_like(values).scatter_(1, order, total.gather(1, last))


def finalize(selected: Tensor, ids: Tensor, sums: RunningSums) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp [N,K], tail_logp, logz, entropy) from the logits x at ids and the running sums over all other columns.

    Where the largest logit is a chosen one the normaliser is 1 + rest, so that 1 - p keeps its relative accuracy as p -> 1.
    """
    first = first_occurrences(ids)
    chosen = torch.where(first, selected, _NEG_INF)
    chosen_max, chosen_argmax = chosen.max(dim=1)
    top = torch.maximum(sums.m, chosen_max)
    dead = top == _NEG_INF
    top = torch.where(dead, 0.0, top)
    offset = torch.where(sums.m == _NEG_INF, FLOOR, sums.m - top)
    outside = sums.l * offset.exp()
    shifted = chosen - top[:, None]
    mass = shifted.exp()
    rest = outside + mass.scatter(1, chosen_argmax[:, None], 0.0).sum(dim=1)
    log_normalizer = torch.where(chosen_max >= sums.m, rest.log1p(), (outside + mass.sum(dim=1)).log())
    log_normalizer = torch.where(dead, 0.0, log_normalizer)
    moment = torch.where(outside == 0, 0.0, offset.exp() * sums.t + outside * offset) + (mass * shifted.clamp(min=FLOOR)).sum(dim=1)
    entropy = log_normalizer - moment / (outside + mass.sum(dim=1))
    logp = (selected - top[:, None]) - log_normalizer[:, None]
    return (
        torch.where(ids < 0, PAD_LOGP, logp),
        torch.where(sums.m == _NEG_INF, _NEG_INF, sums.m - top) + sums.l.log() - log_normalizer,
        torch.where(dead, _NEG_INF, top + log_normalizer),
        torch.where(dead, 0.0, entropy),
    )


def coefficients(
    upstream: Upstream,
    ids: Tensor,
    logp: Tensor,
    tail_logp: Tensor | None,
    logz: Tensor,
    entropy: Tensor | None,
    row_scale: Tensor | float,
) -> Coefficients:
    """What the dense pass and the overwrite of the chosen columns need; `row_scale` (number or [N]) multiplies every dx."""
    valid = ids >= 0
    zeros = torch.zeros_like(logz)
    g_logp = torch.zeros_like(logp) if upstream.logp is None else torch.where(valid, upstream.logp, 0.0)
    a = -g_logp.sum(dim=1)
    if upstream.logz is not None:
        a = a + upstream.logz
    reference, g_tail = logz, zeros
    if upstream.tail_logp is not None:
        assert tail_logp is not None
        has_tail = tail_logp != _NEG_INF
        g_tail = torch.where(has_tail, upstream.tail_logp, 0.0)
        reference = torch.where(has_tail, logz + tail_logp, logz)
    dead = logz == _NEG_INF
    reference = torch.where(dead, 0.0, reference)
    outside = torch.where(dead, 0.0, reference - logz).exp()
    scale = a * outside
    if upstream.tail_logp is not None:
        # g_tail * (1 - outside) by the chosen ids' own mass: the difference has no digits left where they hold little
        scale = scale + g_tail * torch.where(first_occurrences(ids), logp.exp(), 0.0).sum(dim=1)
        a = a - g_tail
    inside = _at_chosen(sum_over_duplicates(g_logp, ids), a[:, None], logp)
    slope = None
    if upstream.entropy is not None:
        assert entropy is not None
        g_entropy = upstream.entropy
        slope = -g_entropy * outside
        scale = scale + slope * (torch.where(dead, 0.0, reference - logz) + entropy)
        inside = inside - g_entropy[:, None] * logp.exp() * (logp.clamp(min=FLOOR) + entropy[:, None])
        slope = torch.where(dead, 0.0, slope) * row_scale
    column_scale = row_scale[:, None] if isinstance(row_scale, Tensor) else row_scale
    return Coefficients(
        reference=reference,
        scale=torch.where(dead, 0.0, scale) * row_scale,
        slope=slope,
        selected=torch.where(valid & ~dead[:, None], inside, 0.0) * column_scale,
    )


def _at_chosen(direct: Tensor, a: Tensor, logp: Tensor) -> Tensor:
    """direct + a * p, without cancellation where p is near 1 (there direct is often -a) and without rounding a small p to 1 - 1."""
    return torch.where(logp > -0.5, (direct + a) + a * torch.expm1(logp), direct + a * logp.exp())
