"""Dense twins: they build [N, V] logits and leave gradients to autograd. They define what the operations mean, in any dtype."""

from typing import Any

import torch
from torch import Tensor

from opd_kernels.checks import check_loss, check_loss_depends
from opd_kernels.selection import FLOOR
from opd_kernels.types import (
    PAD_LOGP,
    Divergence,
    HeadInputs,
    LogitOptions,
    LossFn,
    SelectedLogprobs,
    TopkLogprobs,
    accumulation_dtype,
)

_NEG_INF = float("-inf")


def dense_logits(hidden: Tensor, weight: Tensor, options: LogitOptions) -> Tensor:
    """x [N, V] in the accumulation dtype; columns beyond the valid ones are -inf."""
    if options.process_group is not None:
        raise ValueError("backend 'reference' holds the whole vocabulary on one rank; use backend='torch' with a process_group")
    dtype = accumulation_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        x = hidden.to(dtype) @ weight.to(dtype).T
        if options.bias is not None:
            x = x + options.bias.to(dtype)
        x = x * options.logit_scale
        if options.softcap is not None:
            x = torch.where(x == _NEG_INF, _NEG_INF, options.softcap * torch.tanh(x / options.softcap))
        temperature = options.temperature
        x = x / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
        padded = torch.arange(x.shape[1], device=x.device) >= options.valid_columns
        return x.masked_fill(padded, _NEG_INF)


def selected_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, options: LogitOptions, tail: bool, entropy: bool, student_topk: int
) -> SelectedLogprobs:
    """See `opd_kernels.selected_logprobs`."""
    x = dense_logits(hidden, weight, options)
    logz = x.logsumexp(dim=1)
    logp_all = x - logz[:, None]
    valid = ids >= 0
    logp = torch.where(valid, logp_all.gather(1, ids.clamp(min=0)), PAD_LOGP)
    topk_ids = ordered_ids(x.detach(), student_topk) if student_topk else None
    return SelectedLogprobs(
        logp=logp,
        tail_logp=_tail(x, ids, logz) if tail else None,
        logz=logz,
        entropy=_entropy(logp_all) if entropy else None,
        topk_ids=topk_ids,
        topk_logp=None if topk_ids is None else logp_all.detach().gather(1, topk_ids),
    )


def _tail(x: Tensor, ids: Tensor, logz: Tensor) -> Tensor:
    """Log of the mass outside ids; a constant -inf where nothing is outside."""
    chosen = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=torch.bool, device=x.device)
    chosen.scatter_(1, torch.where(ids >= 0, ids, x.shape[1]), True)
    outside = x.masked_fill(chosen[:, :-1], _NEG_INF)
    nothing = (outside == _NEG_INF).all(dim=1)
    return torch.where(nothing, _NEG_INF, torch.where(nothing[:, None], 0.0, outside).logsumexp(dim=1) - logz)


def _entropy(logp: Tensor) -> Tensor:
    possible = logp != _NEG_INF
    finite = torch.where(possible, logp, 0.0)
    return -torch.where(possible, finite.exp() * finite, 0.0).sum(dim=1)


def fused_sparse_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    loss_fn: LossFn,
    extras: tuple[Tensor, ...],
    **keywords: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `opd_kernels.fused_sparse_loss`: the closure on selected_logprobs of all tokens."""
    selected = selected_logprobs(hidden, weight, ids, **keywords)
    loss, aux = check_loss(loss_fn(selected, *extras), hidden.shape[0])
    check_loss_depends(loss.requires_grad or not selected.logz.requires_grad)
    return loss, {name: value.detach() for name, value in aux.items()}


def topk_logprobs(hidden: Tensor, weight: Tensor, k: int, *, always_include: Tensor | None, options: LogitOptions) -> TopkLogprobs:
    """See `opd_kernels.topk_logprobs`."""
    with torch.no_grad():
        ids = ordered_ids(dense_logits(hidden, weight, options), k)
        if always_include is not None:
            included = always_include[:, None]
            ids = torch.cat([included, torch.where(ids == included, -1, ids)], dim=1)
        chosen = selected_logprobs(hidden, weight, ids, options=options, tail=True, entropy=True, student_topk=0)
        return TopkLogprobs(ids=ids, logp=chosen.logp, tail_logp=chosen.tail_logp, logz=chosen.logz, entropy=chosen.entropy)


def ordered_ids(x: Tensor, k: int) -> Tensor:
    """Ids of the k largest of each row, descending, ties to the lowest id."""
    return x.sort(dim=1, descending=True, stable=True).indices[:, :k]


def dense_divergence(
    student: HeadInputs, teacher: HeadInputs, divergence: Divergence, *, token_weight: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, SelectedLogprobs | None]:
    """See `opd_kernels.dense_divergence`; the definitions as published, entry by entry. token_weight changes nothing here."""
    lp = _valid_logp(student)
    with torch.no_grad():
        lq = _valid_logp(teacher)
    entry = _entry(divergence, lp, lq)
    value = (entry if divergence.entry_clip is None else entry.clamp(max=divergence.entry_clip)).sum(dim=1)
    if ids is None:
        return value, None
    with torch.no_grad():
        return value, selected_logprobs(student.hidden, student.weight, ids, options=student.options, tail=True, entropy=True, student_topk=0)


def _valid_logp(side: HeadInputs) -> Tensor:
    x = dense_logits(side.hidden, side.weight, side.options)[:, : side.options.valid_columns]
    return (x - x.logsumexp(dim=1, keepdim=True)).clamp(min=FLOOR)


def _entry(divergence: Divergence, lp: Tensor, lq: Tensor) -> Tensor:
    p, q = lp.exp(), lq.exp()
    match divergence.name:
        case "forward_kl":
            return q * (lq - lp)
        case "reverse_kl":
            return p * (lp - lq)
        case "jsd":
            log_m = (divergence.mix * q + (1 - divergence.mix) * p).clamp(min=torch.finfo(p.dtype).tiny).log()
            return divergence.mix * q * (lq - log_m) + (1 - divergence.mix) * p * (lp - log_m)
        case "skew_forward_kl":
            return q * (lq - (divergence.alpha * q + (1 - divergence.alpha) * p).clamp(min=torch.finfo(p.dtype).tiny).log())
        case "skew_reverse_kl":
            return p * (lp - (divergence.alpha * p + (1 - divergence.alpha) * q).clamp(min=torch.finfo(p.dtype).tiny).log())
        case "elementwise":
            assert divergence.value is not None
            return divergence.value(lp, lq)
    raise AssertionError(f"unknown divergence {divergence.name}")
