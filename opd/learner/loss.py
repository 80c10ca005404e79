"""The loss of one micro-batch as a request to the head: everything on the vocabulary happens inside the head's forward.

Legend: N completion tokens of a micro-batch, D hidden size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from opd_kernels import HeadView, SelectedLogprobs, dense_divergence, fused_sparse_loss, selected_logprobs
from torch import Tensor

from opd.objective.compose import rows_to_tensors, token_loss, token_weight
from opd.objective.terms import Objective, Term
from opd.types import MicroBatch

Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a micro-batch's loss needs besides its rows: the objective (coefficients as numbers), its denominators, the scorers' heads."""

    objective: Objective
    denominators: Mapping[str, float]
    heads: Mapping[str, HeadView]
    chunk_bytes: int | None


def loss_request(batch: MicroBatch, inputs: LossInputs) -> Callable[[Tensor, HeadView], Loss]:
    """(hidden [N, D], head) -> (sum of the token losses, per-token columns); a loss that is not finite comes back as NaN.

    The gradient of such a loss is NaN everywhere too, so that whoever checks gradients refuses the update. A micro-batch without rows
    gives a zero that is connected to every weight.
    """

    def request(hidden_ND: Tensor, view: HeadView) -> Loss:
        if hidden_ND.shape[0] == 0:
            return connected(hidden_ND, view), {}
        compute = _fused if inputs.objective.needs.separable else _composed
        loss, columns = compute(hidden_ND, view, batch, inputs)
        if not bool(torch.isfinite(loss)):
            return connected(hidden_ND, view) * torch.nan, columns
        if torch.is_grad_enabled() and not loss.requires_grad:  # no term applies to any of these answers
            loss = loss + connected(hidden_ND[:0], view)
        return loss, columns

    return request


def connected(hidden_ND: Tensor, view: HeadView) -> Tensor:
    """A number that depends on every weight of the policy (on a head's without using its values)."""
    zero = hidden_ND.float().sum() + view.weight[:0].float().sum()
    return zero if view.bias is None else zero + view.bias[:0].float().sum()


def _fused(hidden_ND: Tensor, view: HeadView, batch: MicroBatch, inputs: LossInputs) -> Loss:
    tensors, rebuild = rows_to_tensors(batch.rows)

    def chunk_loss(selected: SelectedLogprobs, *chunk: Tensor) -> Loss:
        return token_loss(inputs.objective, inputs.denominators, selected, rebuild(chunk), {})

    return fused_sparse_loss(hidden_ND, view.weight, batch.rows.ids, chunk_loss, tensors, **_options(view, batch, inputs))


def _options(view: HeadView, batch: MicroBatch, inputs: LossInputs) -> dict[str, Any]:
    tail = any(term.support is not None and term.support.sparse for term in inputs.objective.terms)
    return {"temperature": batch.temperature, "tail": tail, "chunk_bytes": inputs.chunk_bytes, **view.keywords()}


def _composed(hidden_ND: Tensor, view: HeadView, batch: MicroBatch, inputs: LossInputs) -> Loss:
    objective, rows = inputs.objective, batch.rows
    if _one_projection(objective, view, batch, inputs):
        (term,) = objective.terms
        zeros_NK = hidden_ND.new_zeros(rows.ids.shape, dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        unread = SelectedLogprobs(logp=zeros_NK, tail_logp=None, logz=zeros_NK[:, 0], entropy=None)
        weight = token_weight(term, inputs.denominators, unread, rows)
        value, selected = _divergence(term, hidden_ND, view, batch, inputs, weight, ids=rows.ids)
        return token_loss(objective, inputs.denominators, selected, rows, {term.name: value})
    dense_only = len(objective.needs.full_terms) == len(objective.terms)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not dense_only):  # then log-probs serve weights and meters only
        selected = selected_logprobs(hidden_ND, view.weight, rows.ids, **_options(view, batch, inputs))
    full = {}
    for term in objective.needs.full_terms:
        weight = token_weight(term, inputs.denominators, selected, rows)
        full[term.name] = _divergence(term, hidden_ND, view, batch, inputs, weight)
    return token_loss(objective, inputs.denominators, selected, rows, full)


def _one_projection(objective: Objective, view: HeadView, batch: MicroBatch, inputs: LossInputs) -> bool:
    """Whether the only term's divergence can bring the student's log-probs along: same columns, and a weight that does not need them first."""
    if len(objective.terms) != 1 or objective.terms[0].support is None or objective.terms[0].support.kind != "full":
        return False
    (term,) = objective.terms
    if term.weights or term.signal is None or batch.rows.signals[term.signal].hidden is None:
        return False
    own = view.weight.shape[0] if view.vocab_size is None else view.vocab_size
    return _valid_columns(view, inputs.heads[term.signal]) == own


def _divergence(
    term: Term, hidden_ND: Tensor, view: HeadView, batch: MicroBatch, inputs: LossInputs, weight: Tensor, ids: Tensor | None = None
) -> Tensor | tuple[Tensor, SelectedLogprobs]:
    """Per-token loss of a term on the whole vocabulary or on hidden states; with ids (full vocabulary only) also the student at them."""
    assert term.signal and term.support, "a term on the full vocabulary or on hidden states has a signal"
    teacher_hidden = batch.rows.signals[term.signal].hidden
    if teacher_hidden is None:  # no answer of this batch has a view
        return hidden_ND.new_zeros(hidden_ND.shape[0], dtype=weight.dtype)
    if term.support.kind == "hidden":
        return hidden_distance(hidden_ND, teacher_hidden)
    assert term.dense, "a term on the full vocabulary has a dense divergence"
    head = inputs.heads[term.signal]
    return dense_divergence(
        hidden_ND,
        view.weight,
        teacher_hidden,
        head.weight,
        term.dense,
        token_weight=weight,
        ids=ids,
        temperature=batch.temperature,
        constants_s=view.constants(),
        constants_t=head.constants(),
        vocab_size=_valid_columns(view, head),
        chunk_bytes=inputs.chunk_bytes,
    )


def hidden_distance(hidden_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean over the hidden size of the squared difference of the last hidden states [N], in fp32 at least (UniSD, arXiv 2605.06597)."""
    return (hidden_ND.float() if hidden_ND.dtype != torch.float64 else hidden_ND).sub(teacher_ND).square().mean(-1)


def _valid_columns(student: HeadView, teacher: HeadView) -> int:
    """Ids that both heads mean: the smaller valid vocabulary."""
    return min(view.weight.shape[0] if view.vocab_size is None else view.vocab_size for view in (student, teacher))
