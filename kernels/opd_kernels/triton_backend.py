"""The Triton backend: matrix products by cuBLAS with fp32 results, everything between them by row kernels over a scratch tile.

Forward passes take chunks of whole rows. The composable backward pass is vocabulary-outer, over all rows: each block of the weight's
gradient is one product, written once. Gradients of the products are rounded once to the dtype of hidden, the chosen entries exactly.
No step waits for the device but the top-k, once a chunk, to sort anew the rows with too many equal logits.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_kernels.checks import check_same_aux
from opd_kernels.chunked_rows import run_loss
from opd_kernels.distributed import (
    any_over_ranks,
    collect_selected,
    combine_sums,
    gather_ranks,
    reduce_hidden_gradient,
)
from opd_kernels.dlogits import GradientSums, add_tile, gradient_sums
from opd_kernels.first_order import first_order
from opd_kernels.placement import owned_ids
from opd_kernels.precomputed import attach, needs_gradient
from opd_kernels.products import softcap_slope
from opd_kernels.row_kernels import TILES, Tiles, dense_dz, overwrite, scaled
from opd_kernels.selection import Coefficients, RunningSums, Upstream, coefficients, finalize
from opd_kernels.selection_kernels import MOST_IDS, coefficient_rows, finalize_rows
from opd_kernels.tiling import spans
from opd_kernels.topk import merge
from opd_kernels.triton_dense import divergence_of_heads
from opd_kernels.triton_rows import (
    NO_COLUMN,
    RowHead,
    RowScan,
    TileScratch,
    add_values,
    backward_shape,
    kernels_on,
    padded,
    padded_tile,
    project,
    row_chunk,
    row_head,
    rows_in_budget,
    scan_rows,
    sort_flagged,
    weight_block,
)
from opd_kernels.types import Divergence, HeadInputs, LogitOptions, LossFn, SelectedLogprobs, TopkLogprobs, chunk_budget

__all__ = ["dense_divergence", "fused_sparse_loss", "selected_logprobs", "topk_logprobs"]

_NEG_INF = float("-inf")


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    options: LogitOptions,
    tail: bool,
    entropy: bool,
    student_topk: int,
    tiles: Tiles = TILES,
) -> SelectedLogprobs:
    """See `opd_kernels.selected_logprobs`."""
    logp, tail_logp, logz, entropy_N, topk_ids, topk_logp = _Selected.apply(
        hidden, weight, options.bias, ids, replace(options, bias=None), student_topk, tiles
    )
    return SelectedLogprobs(
        logp=logp,
        tail_logp=tail_logp if tail else None,
        logz=logz,
        entropy=entropy_N if entropy else None,
        topk_ids=topk_ids,
        topk_logp=topk_logp,
    )


class _Selected(torch.autograd.Function):
    """Saves the Parameter objects themselves, so that a runtime which frees and gathers them between the passes is served."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, options: LogitOptions, topk: int, tiles: Tiles
    ) -> tuple[Tensor | None, ...]:
        with kernels_on(hidden):
            head = row_head(hidden, weight, replace(options, bias=bias))
            found = _select_all(head, ids, topk, tiles)
        ctx.save_for_backward(hidden, weight, bias, ids, found.logp, found.tail_logp, found.logz, found.entropy)
        ctx.options, ctx.tiles = options, tiles
        ctx.set_materialize_grads(False)
        if topk:
            ctx.mark_non_differentiable(found.topk_ids, found.topk_logp)
        return found.logp, found.tail_logp, found.logz, found.entropy, found.topk_ids, found.topk_logp

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, logp, tail_logp, logz, entropy = ctx.saved_tensors
        found = SelectedLogprobs(logp=logp, tail_logp=tail_logp, logz=logz, entropy=entropy)
        with kernels_on(hidden):
            head = row_head(hidden, weight, replace(ctx.options, bias=bias))
            wanted = Upstream(logp=upstream[0], tail_logp=upstream[1], logz=upstream[2], entropy=upstream[3])
            sums = _backward_tiles(head, ids, _row_rule(head, wanted, ids, found), ctx.needs_input_grad[:3], ctx.tiles)
        d_hidden = None if sums.hidden is None else sums.hidden.to(hidden.dtype)
        d_bias = None if sums.bias is None else sums.bias.to(bias.dtype)
        return d_hidden, sums.weight, d_bias, None, None, None, None


def _select_all(head: RowHead, ids: Tensor, topk: int, tiles: Tiles) -> SelectedLogprobs:
    projection, columns, device = head.head, head.head.columns, ids.device
    budget = chunk_budget(projection.options, device, row_sets=0)
    chunk = rows_in_budget(ids.shape[0], 4 * padded(columns), budget)
    scratch = TileScratch(chunk, columns, device)
    weight_tile = padded_tile(projection, slice(0, columns))
    scans = []
    for rows in spans(ids.shape[0], chunk):
        z = project(scratch.tile(rows.stop - rows.start, columns), projection, rows, weight_tile)
        scans.append(scan_rows(z, ids[rows], head.constants(rows, slice(0, columns)), projection.options.vocab_start, topk, tiles))
    scan = _joined(scans)
    if topk:
        sort_flagged(scan, head.products, ids, head.constants(slice(None), slice(0, columns)), projection.options.vocab_start)
    return _found(head, ids, scan)


def _joined(scans: list[RowScan]) -> RowScan:
    if len(scans) == 1:
        return scans[0]
    sums = replace(scans[0].sums, **{name: torch.cat([getattr(scan.sums, name) for scan in scans]) for name in ("m", "l", "t")})
    with_top = scans[0].best_x is not None
    return RowScan(
        selected=torch.cat([scan.selected for scan in scans]),
        sums=sums,
        best_x=torch.cat([scan.best_x for scan in scans]) if with_top else None,
        best_ids=torch.cat([scan.best_ids for scan in scans]) if with_top else None,
        redo=torch.cat([scan.redo for scan in scans]) if scans[0].redo is not None else None,
        redo_rows=scans[0].redo_rows,
    )


def _found(head: RowHead, ids: Tensor, scan: RowScan) -> SelectedLogprobs:
    """From a scan of this rank's columns to what holds over those of all ranks."""
    group = head.head.options.process_group
    selected = _collected(head, ids, scan)
    if scan.best_x is not None:
        add_values(scan.sums, scan.best_x)
    logp, tail_logp, logz, entropy = _finalized(selected, ids, combine_sums(scan.sums, group))
    topk_ids = topk_logp = None
    if scan.best_x is not None:
        x, candidates = _over_ranks(scan.best_x, group), _over_ranks(scan.best_ids, group)
        chosen = torch.where(ids < 0, NO_COLUMN, ids)
        chosen_first = torch.where(_repeated(ids), NO_COLUMN, chosen)
        x, topk_ids = merge(
            torch.cat([x, torch.where(chosen_first == NO_COLUMN, _NEG_INF, selected)], dim=1),
            torch.cat([candidates, chosen_first], dim=1),
            scan.best_x.shape[1],
        )
        topk_ids, topk_logp = torch.where(topk_ids == NO_COLUMN, -1, topk_ids), x - logz[:, None]
    return SelectedLogprobs(logp=logp, tail_logp=tail_logp, logz=logz, entropy=entropy, topk_ids=topk_ids, topk_logp=topk_logp)


def _collected(head: RowHead, ids: Tensor, scan: RowScan) -> Tensor:
    """Logits [C, K] at ids over the columns of all ranks; a scan holds -inf where its rank has no such column."""
    group = head.head.options.process_group
    return scan.selected if group is None else collect_selected(scan.selected, owned_ids(ids, head.head), group)


def _finalized(selected: Tensor, ids: Tensor, sums: RunningSums) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (finalize_rows if ids.shape[1] <= MOST_IDS else finalize)(selected, ids, sums)


def _repeated(ids: Tensor) -> Tensor:
    """[N, K] bool: ids that stand earlier in their row."""
    ordered, order = ids.sort(dim=1, stable=True)
    same = torch.zeros_like(ordered, dtype=torch.bool)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.empty_like(same).scatter_(1, order, same)


def _over_ranks(values: Tensor, group: Any) -> Tensor:
    return values if group is None else gather_ranks(values, group).permute(1, 0, 2).flatten(1)


def _row_rule(head: RowHead, upstream: Upstream, ids: Tensor, found: SelectedLogprobs, rows: slice = slice(None)) -> Coefficients:
    """Gradients of the products of some rows; the chosen entries complete, with the softcap's slope."""
    scale = head.head.options.logit_scale * head.inverse_temperature[rows]
    rule_of = coefficient_rows if ids.shape[1] <= MOST_IDS else coefficients
    rule = rule_of(upstream, ids, found.logp, found.tail_logp, found.logz, found.entropy, scale)
    if head.head.options.softcap is not None:
        bend = softcap_slope(found.logp + found.logz[:, None], head.head, rows)
        rule = replace(rule, selected=rule.selected * bend)
    return replace(rule, selected=rule.selected.contiguous())


def _rows_of(rule: Coefficients, rows: slice) -> Coefficients:
    slope = None if rule.slope is None else rule.slope[rows]
    return Coefficients(reference=rule.reference[rows], scale=rule.scale[rows], slope=slope, selected=rule.selected[rows])


def _backward_tiles(head: RowHead, ids: Tensor, rule: Coefficients, needs: tuple[bool, ...], tiles: Tiles) -> GradientSums:
    projection, device = head.head, ids.device
    height, width = backward_shape(head, 1)
    products = TileScratch(height, width, device)
    sums = gradient_sums(projection, needs, projection.weight.dtype)
    room = weight_block(sums, head, width)
    for columns in spans(projection.columns, width):
        shape = columns.stop - columns.start
        weight_tile = padded_tile(projection, columns)
        written = slice(columns.start, columns.start + len(weight_tile))
        block = None if sums.weight is None else sums.weight[written] if room is None else room[: len(weight_tile)]
        for rows in spans(ids.shape[0], height):
            z = project(products.tile(rows.stop - rows.start, shape), projection, rows, weight_tile)
            dz = products.over(z, head.gradient_dtype)
            wide = products.over(z, head.gradient_dtype, len(weight_tile))
            part = _rows_of(rule, rows)
            dense_dz(z, dz, part, head.constants(rows, columns), tiles)
            overwrite(dz, ids[rows], part.selected, projection.options.vocab_start + columns.start)
            add_tile(sums, wide, projection.hidden[rows], weight_tile, rows, written, block)
        if room is not None:
            sums.weight[written] = block
    reduce_hidden_gradient(sums.hidden, projection.options.process_group)
    return sums


def fused_sparse_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    loss_fn: LossFn,
    extras: tuple[Tensor, ...],
    *,
    options: LogitOptions,
    tail: bool,
    entropy: bool,
    student_topk: int,
    tiles: Tiles = TILES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `opd_kernels.fused_sparse_loss`; loss_fn runs with autocast off."""
    needs = needs_gradient(hidden, weight, options.bias)
    with torch.no_grad(), kernels_on(hidden):
        head = row_head(hidden, weight, options)
        projection, columns = head.head, slice(0, options.valid_columns)
        chunk = row_chunk(head, 1)
        products = TileScratch(chunk, columns.stop, ids.device)
        weight_tile = padded_tile(projection, columns)
        sums, written = gradient_sums(projection, needs, torch.float32), slice(0, len(weight_tile))
        block = None if sums.weight is None else sums.weight[written]
        losses, auxes = [], []
        for rows in spans(ids.shape[0], chunk):
            constants, tokens = head.constants(rows, columns), rows.stop - rows.start
            z = project(products.tile(tokens, columns.stop), projection, rows, weight_tile)
            scan = scan_rows(z, ids[rows], constants, options.vocab_start, student_topk, tiles)
            if student_topk:
                first = rows.start
                sort_flagged(scan, lambda part, first=first: head.products(part + first), ids[rows], constants, options.vocab_start)
            found = _found(head, ids[rows], scan)
            offered = replace(found, tail_logp=found.tail_logp if tail else None, entropy=found.entropy if entropy else None)
            loss, aux, upstream = run_loss(loss_fn, offered, tuple(extra[rows] for extra in extras), any(needs))
            losses.append(loss)
            auxes.append(aux)
            check_same_aux(auxes[0], aux)
            if upstream is not None:
                dz, rule = products.over(z, head.gradient_dtype), _row_rule(head, upstream, ids[rows], found, rows)
                dense_dz(z, dz, rule, constants, tiles)
                overwrite(dz, ids[rows], rule.selected, options.vocab_start)
                wide = products.over(z, head.gradient_dtype, len(weight_tile))
                add_tile(sums, wide, projection.hidden[rows], weight_tile, rows, written, block)
        reduce_hidden_gradient(sums.hidden, options.process_group)
    loss = attach(torch.stack(losses).sum(), sums, hidden, weight, options.bias, None, scaled)
    return loss, {name: torch.cat([aux[name] for aux in auxes]) for name in auxes[0]}


def topk_logprobs(
    hidden: Tensor, weight: Tensor, k: int, *, always_include: Tensor | None, options: LogitOptions, tiles: Tiles = TILES
) -> TopkLogprobs:
    """See `opd_kernels.topk_logprobs`."""
    with torch.no_grad(), kernels_on(hidden):
        head = row_head(hidden, weight, options)
        projection, columns = head.head, slice(0, options.valid_columns)
        chunk = row_chunk(head, 1)
        products = TileScratch(chunk, columns.stop, hidden.device)
        weight_tile = padded_tile(projection, columns)
        included = hidden.new_full((hidden.shape[0], 1), -1, dtype=torch.int64) if always_include is None else always_include[:, None]
        scans = []
        for rows in spans(hidden.shape[0], chunk):
            tokens = rows.stop - rows.start
            z = project(products.tile(tokens, columns.stop), projection, rows, weight_tile)
            scans.append(scan_rows(z, included[rows], head.constants(rows, columns), options.vocab_start, k, tiles))
        scan, keep_slot = _joined(scans), always_include is not None
        before = replace(scan.sums, m=scan.sums.m.clone(), l=scan.sums.l.clone(), t=scan.sums.t.clone())  # `_scored` adds to them
        ids, logp, tail_logp, logz, entropy = _scored(head, included, scan, k, keep_slot=keep_slot)
        scan = replace(scan, sums=before)
        sorted_any = sort_flagged(scan, head.products, included, head.constants(slice(None), columns), options.vocab_start)
        if any_over_ranks(sorted_any, options.process_group, hidden.device):  # asked last: it waits for the device
            ids, logp, tail_logp, logz, entropy = _scored(head, included, scan, k, keep_slot=keep_slot)
    return TopkLogprobs(ids=ids, logp=logp, tail_logp=tail_logp, logz=logz, entropy=entropy)


def _scored(head: RowHead, included: Tensor, scan: RowScan, k: int, *, keep_slot: bool) -> tuple[Tensor, ...]:
    """(ids, logp, tail_logp, logz, entropy) from a scan, over the columns of all ranks."""
    group = head.head.options.process_group
    included_x = _collected(head, included, scan)
    candidates = torch.cat([_over_ranks(scan.best_ids, group), torch.where(included < 0, NO_COLUMN, included)], dim=1)
    x, ids = merge(torch.cat([_over_ranks(scan.best_x, group), included_x], dim=1), candidates, candidates.shape[1])
    sums = combine_sums(scan.sums, group)
    listed = (ids[:, k:] != included) & (ids[:, k:] != NO_COLUMN)
    add_values(sums, torch.where(listed, x[:, k:], _NEG_INF))
    ids, x = torch.where((ids == included) | (ids == NO_COLUMN), -1, ids)[:, :k], x[:, :k]
    if keep_slot:
        ids, x = torch.cat([included, ids], dim=1), torch.cat([included_x, x], dim=1)
    return ids, *_finalized(x, ids, sums)


def dense_divergence(
    student: HeadInputs,
    teacher: HeadInputs,
    divergence: Divergence,
    *,
    token_weight: Tensor | None,
    ids: Tensor | None,
    tiles: Tiles = TILES,
) -> tuple[Tensor, SelectedLogprobs | None]:
    """See `opd_kernels.dense_divergence`; with ids the student is projected once more here."""
    value = divergence_of_heads(student, teacher, divergence, token_weight=token_weight, tiles=tiles)
    if ids is None:
        return value, None
    with torch.no_grad():
        return value, selected_logprobs(student.hidden, student.weight, ids, options=student.options, tail=True, entropy=True, student_topk=0)
