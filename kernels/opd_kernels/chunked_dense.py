"""Divergence between two heads over the whole vocabulary, chunked: no [N, V] tensor of either.

Forward: rows of both heads for a few tokens; both normalisers, then D and sum(u) from the same scratch. With token weights the gradient
follows from that scratch too; without, backward projects both heads again, vocabulary-outer, with the saved normalisers.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_kernels.chunked_rows import RowChunks, add_gradients, fill, part_of, row_chunks, select_chunk, sums_of
from opd_kernels.distributed import combine_sums, reduce_hidden_gradient, sum_ranks
from opd_kernels.divergence_maths import entries
from opd_kernels.dlogits import GradientSums, add_tile, gradient_sums
from opd_kernels.exponentials import exp_into
from opd_kernels.first_order import first_order
from opd_kernels.precomputed import attach, needs_gradient
from opd_kernels.products import Projection, Scratch, logits_into, projection, softcap_slope
from opd_kernels.running import accumulate, empty_sums
from opd_kernels.selection import FLOOR
from opd_kernels.tiling import spans, tile_shape
from opd_kernels.types import Divergence, HeadInputs, SelectedLogprobs, chunk_budget

_WORKING_COPIES = 12  # tensors like a tile that forming the entries may hold at once


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSums:
    """Per token [N]: normalisers of both sides, D, and the sum of the slopes."""

    logz_s: Tensor
    logz_t: Tensor
    divergence: Tensor
    slope: Tensor


def dense_divergence(
    student: HeadInputs, teacher: HeadInputs, divergence: Divergence, *, token_weight: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, SelectedLogprobs]:
    """See `opd_kernels.dense_divergence`; (D, the student at ids, of which only logz has a meaning without ids)."""
    hidden, weight, bias = student.hidden, student.weight, student.options.bias
    needs = needs_gradient(hidden, weight, bias)
    if any(needs) and token_weight is None:
        return _Recomputed.apply(hidden, weight, bias, student, teacher, divergence, ids)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        sums, selected, gradients = _forward(student, teacher, divergence, needs, token_weight, ids)
    return (sums.divergence if gradients is None else attach(sums.divergence, gradients, hidden, weight, bias, token_weight)), selected


class _Recomputed(torch.autograd.Function):
    """The SelectedLogprobs passes through autograd as it is: constants."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        student: HeadInputs,
        teacher: HeadInputs,
        divergence: Divergence,
        ids: Tensor | None,
    ) -> tuple[Tensor, SelectedLogprobs]:
        with torch.autocast(hidden.device.type, enabled=False):
            sums, selected, _ = _forward(student, teacher, divergence, (False, False, False), None, ids)
        ctx.save_for_backward(hidden, weight, bias, teacher.hidden, teacher.weight, teacher.options.bias, sums.logz_s, sums.logz_t, sums.slope)
        ctx.options = replace(student.options, bias=None), replace(teacher.options, bias=None)
        ctx.divergence = divergence
        return sums.divergence, selected

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, hidden_t, weight_t, bias_t, logz_s, logz_t, slope = ctx.saved_tensors
        options_s, options_t = ctx.options
        with torch.autocast(hidden.device.type, enabled=False):
            student = projection(hidden, weight, replace(options_s, bias=bias))
            teacher = projection(hidden_t, weight_t, replace(options_t, bias=bias_t))
            sums = TokenSums(logz_s=logz_s, logz_t=logz_t, divergence=upstream, slope=slope)
            grads = _backward(student, teacher, ctx.divergence, sums, upstream, ctx.needs_input_grad[:3])
        d_hidden = None if grads.hidden is None else grads.hidden.to(hidden.dtype)
        d_bias = None if grads.bias is None else grads.bias.to(bias.dtype)
        return d_hidden, grads.weight, d_bias, None, None, None, None


def _forward(
    student: HeadInputs,
    teacher: HeadInputs,
    divergence: Divergence,
    needs: tuple[bool, ...],
    token_weight: Tensor | None,
    ids: Tensor | None,
) -> tuple[TokenSums, SelectedLogprobs, GradientSums | None]:
    heads = [projection(side.hidden, side.weight, side.options) for side in (student, teacher)]
    chunks = row_chunks(heads[0], copies=2)
    gradients = gradient_sums(heads[0], needs, heads[0].dtype) if token_weight is not None and any(needs) else None
    wanted, parts, chosen = ids is not None, [], []
    ids = torch.full((student.hidden.shape[0], 1), -1, device=student.hidden.device) if ids is None else ids
    for rows in spans(student.hidden.shape[0], chunks.rows):
        part_s, part_t = (part_of(head, rows) for head in heads)
        selected, _ = select_chunk(part_s, chunks, ids[rows], tail=True, entropy=wanted, student_topk=0, keep_logits=True)
        chosen.append((selected.logp, selected.tail_logp, selected.logz, selected.entropy if wanted else selected.logz))
        logz_s, logz_t = selected.logz, _fill_teacher(part_t, chunks)
        value, slope = _chunk_sums(part_s, chunks, divergence, logz_s, logz_t, keep=gradients is not None)
        parts.append((logz_s, logz_t, value, slope))
        if gradients is not None:
            _add_chunk(gradients, part_s, chunks, rows, slope, token_weight[rows])
    if gradients is not None:
        reduce_hidden_gradient(gradients.hidden, student.options.process_group)
    logz_s, logz_t, values, slopes = (torch.cat(column) for column in zip(*parts, strict=True))
    logp, tail_logp, logz, entropy = (torch.cat(column) for column in zip(*chosen, strict=True))
    selected = SelectedLogprobs(logp=logp, tail_logp=tail_logp, logz=logz, entropy=entropy if wanted else None)
    return TokenSums(logz_s=logz_s, logz_t=logz_t, divergence=values, slope=slopes), selected, gradients


def _fill_teacher(head: Projection, chunks: RowChunks) -> Tensor:
    """Writes the teacher's logits of a chunk into scratch and returns their log-normalisers [C], over the columns of all ranks."""
    tokens = head.hidden.shape[0]
    rows_x = chunks.logits.view(1, tokens, head.columns)
    fill(rows_x, head, chunks)
    sums = empty_sums(tokens, rows_x)
    for rows in spans(tokens, chunks.inner):
        x = rows_x[rows]
        accumulate(x, sums_of(sums, rows), chunks.tiles.view(0, *x.shape), None)
    sums = combine_sums(sums, head.options.process_group)
    return sums.m + sums.l.log()


def _chunk_sums(head: Projection, chunks: RowChunks, divergence: Divergence, logz_s: Tensor, logz_t: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
    """(D, sum of slopes) [C] from both sides' logits in scratch, over the columns of all ranks.

    With `keep` scratch holds p and the slopes afterwards, both times the softcap's slope.
    """
    tokens = head.hidden.shape[0]
    scratch_p, scratch_q = (chunks.logits.view(copy, tokens, head.columns) for copy in (0, 1))
    totals = scratch_p.new_zeros(2, tokens)
    for rows in spans(tokens, _narrow(chunks.inner)):
        p, q = scratch_p[rows], scratch_q[rows]
        lp, lq = (chunks.tiles.view(area, *p.shape) for area in (0, 1))
        softcap = softcap_slope(p, head, rows) if keep and head.options.softcap is not None else None
        normalized(p, logz_s[rows], out=lp)
        normalized(q, logz_t[rows], out=lq)
        value, slope = entries(divergence, lp, lq, exp_into(lp, out=p), exp_into(lq, out=q))
        totals[0, rows] = value.sum(dim=1)
        totals[1, rows] = slope.sum(dim=1)
        if softcap is not None:
            p.mul_(softcap)
            slope = slope * softcap
        if keep:
            q.copy_(slope)
    divergence_C, slope_C = sum_ranks(totals, head.options.process_group)
    return divergence_C, slope_C


def _add_chunk(gradients: GradientSums, head: Projection, chunks: RowChunks, rows: slice, slope_C: Tensor, token_weight: Tensor) -> None:
    """Adds the gradients of a chunk from what `_chunk_sums` kept: (slope - p * sum of slopes) times the row's weight."""
    tokens = head.hidden.shape[0]
    p, slope = (chunks.logits.view(copy, tokens, head.columns) for copy in (0, 1))
    scale = (token_weight * head.row_scale())[:, None]
    for inner in spans(tokens, chunks.inner):
        p[inner].mul_(-slope_C[inner, None]).add_(slope[inner]).mul_(scale[inner])
    add_gradients(gradients, p, head, chunks, rows)


def _backward(
    student: Projection, teacher: Projection, divergence: Divergence, sums: TokenSums, upstream: Tensor, needs: tuple[bool, ...]
) -> GradientSums:
    tokens, device = student.hidden.shape[0], student.hidden.device
    copies = 2 + _WORKING_COPIES
    elements = chunk_budget(student.options, device, row_sets=0) // (copies * student.dtype.itemsize)
    hidden_size = max(student.hidden.shape[1], teacher.hidden.shape[1])
    tile_rows, tile_columns = tile_shape(tokens, student.columns, hidden_size, elements, device)
    scratch = Scratch(tile_rows * tile_columns, 2, student)
    gradients = gradient_sums(student, needs, student.weight.dtype)
    direct = gradients.weight is None or gradients.weight.dtype == student.dtype
    block = None if direct else torch.empty(tile_columns, student.hidden.shape[1], dtype=student.dtype, device=device)
    for columns in spans(student.columns, tile_columns):
        tiles = [head.weight_tile(columns.start, columns.stop) for head in (student, teacher)]
        target = None if gradients.weight is None else gradients.weight[columns] if block is None else block[: columns.stop - columns.start]
        for rows in spans(tokens, tile_rows):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            x_s, x_t = scratch.view(0, *shape), scratch.view(1, *shape)
            logits_into(x_s, student, rows, tiles[0], columns.start)
            logits_into(x_t, teacher, rows, tiles[1], columns.start)
            lp, lq = normalized(x_s, sums.logz_s[rows]), normalized(x_t, sums.logz_t[rows])
            dlogits = _dlogits(lp, lq, student, rows, divergence, sums.slope[rows], upstream[rows])
            if student.options.softcap is not None:
                dlogits.mul_(softcap_slope(x_s, student, rows))
            add_tile(gradients, dlogits, student.hidden[rows], tiles[0], rows, columns, target)
        if block is not None:
            gradients.weight[columns] = target
    reduce_hidden_gradient(gradients.hidden, student.options.process_group)
    return gradients


def normalized(x: Tensor, logz: Tensor, out: Tensor | None = None) -> Tensor:
    """Log-probabilities of logits x [C, cv], at least -1e4."""
    return torch.sub(x, logz[:, None], out=out).clamp_(min=FLOOR)


def _dlogits(lp: Tensor, lq: Tensor, head: Projection, rows: slice, divergence: Divergence, slope_C: Tensor, token_weight: Tensor) -> Tensor:
    """Gradient of sum(token_weight * D) with respect to a tile of the student's logits times what the row's options scale them by."""
    p = exp_into(lp, out=torch.empty_like(lp))
    _, slope = entries(divergence, lp, lq, p, exp_into(lq, out=torch.empty_like(lq)))
    scale = head.row_scale()
    scale = token_weight * (scale[rows] if isinstance(scale, Tensor) else scale)
    return (slope - p.mul_(slope_C[:, None])).mul_(scale[:, None])


def _narrow(rows: int) -> int:
    """Rows worked on together where several working copies of them are held."""
    return max(1, rows // 4)
