"""Chunked PyTorch over whole rows: the logits of a few tokens at a time, over the whole vocabulary.

With a row at hand the objective's gradient is known before the logits are given up, so the loss needs no second projection, and the top k
is found before the columns outside it are summed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_kernels.checks import check_loss, check_loss_depends, check_same_aux
from opd_kernels.distributed import collect_selected, combine_sums, reduce_hidden_gradient, smallest_over_ranks
from opd_kernels.dlogits import GradientSums, add_tile, dlogits_, dlogits_of_mass_, gradient_sums
from opd_kernels.placement import owned_ids, place
from opd_kernels.precomputed import attach, needs_gradient
from opd_kernels.products import Projection, Scratch, logits_into, projection
from opd_kernels.running import MASKED, accumulate, empty_sums, sums_below
from opd_kernels.selection import RunningSums, Upstream, coefficients, finalize
from opd_kernels.tiling import cast_columns, chunk_rows, inner_rows, product_columns, resident_rows, spans
from opd_kernels.topk import best_of_ranks, block_maxima, topk_of
from opd_kernels.types import LogitOptions, LossFn, SelectedLogprobs, TopkLogprobs, chunk_budget


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChunks:
    """Scratch for whole rows of `rows` tokens. Products are as wide as they can be; elementwise work goes a few rows at a time.

    columns: of one product of a gradient, all of them unless the weight must be cast first. filled: of one product of logits, whole blocks of
    `topk` unless it is all columns. inner: rows that are worked on together. tiles: two areas of `inner` rows.
    """

    rows: int
    columns: int
    filled: int
    inner: int
    logits: Scratch
    tiles: Scratch


def row_chunks(head: Projection, copies: int = 1, most: int | None = None) -> RowChunks:
    """Sizes and scratch for `copies` sets of at most `most` whole rows, the same on all ranks of a process group."""
    device = head.hidden.device
    elements = chunk_budget(head.options, device, row_sets=copies) // head.dtype.itemsize
    fitting = chunk_rows(head.hidden.shape[0], head.columns, elements // copies)
    rows = smallest_over_ranks(fitting if most is None else min(fitting, most), head.options.process_group, device)
    columns = max(1, head.columns) if head.weight.dtype == head.hidden.dtype else cast_columns(head.columns, head.hidden.shape[1], device)
    inner = min(rows, inner_rows(head.columns, copies, elements, device))
    tiles = Scratch(inner * head.columns, 2, head)
    filled = min(columns, product_columns(head.columns, device))
    return RowChunks(rows=rows, columns=columns, filled=filled, inner=inner, logits=Scratch(rows * head.columns, copies, head), tiles=tiles)


def fill(rows_x: Tensor, head: Projection, chunks: RowChunks, *, with_maxima: bool = False) -> Tensor:
    """Writes the logits of all columns into rows_x [C, V]; returns the maxima of their blocks, read while the caches hold them, or [C, 0]."""
    maxima = [rows_x.new_empty(rows_x.shape[0], 0)]
    for columns in spans(head.columns, chunks.filled):
        x = rows_x[:, columns]
        logits_into(x, head, slice(0, rows_x.shape[0]), head.weight_tile(columns.start, columns.stop), columns.start)
        if with_maxima:
            maxima.append(block_maxima(x))
    return torch.cat(maxima, dim=1)


def add_gradients(sums: GradientSums, dlogits: Tensor, head: Projection, chunks: RowChunks, rows: slice) -> None:
    """Adds the products of dlogits [C, V] for the chunk `rows`."""
    for columns in spans(head.columns, chunks.columns):
        block = None if sums.weight is None else sums.weight[columns]
        add_tile(sums, dlogits[:, columns], head.hidden, head.weight_tile(columns.start, columns.stop), rows, columns, block)


def part_of(head: Projection, rows: slice) -> Projection:
    """The head as one chunk of tokens sees it."""
    temperature = head.options.temperature
    options = replace(head.options, temperature=temperature[rows]) if isinstance(temperature, Tensor) else head.options
    return replace(head, hidden=head.hidden[rows], options=options)


def topk_logprobs(hidden: Tensor, weight: Tensor, k: int, *, always_include: Tensor | None, options: LogitOptions) -> TopkLogprobs:
    """See `opd_kernels.topk_logprobs`."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = projection(hidden, weight, options)
        chunks = row_chunks(head, most=resident_rows(head.hidden.device))
        parts = [
            _score_chunk(part_of(head, rows), chunks, k, None if always_include is None else always_include[rows])
            for rows in spans(hidden.shape[0], chunks.rows)
        ]
        ids, selected, m, l, t = (torch.cat(column) for column in zip(*parts, strict=True))  # noqa: E741
        selected = collect_selected(selected, owned_ids(ids, head), options.process_group)
        logp, tail_logp, logz, entropy = finalize(selected, ids, combine_sums(RunningSums(m=m, l=l, t=t), options.process_group))
    return TopkLogprobs(ids=ids, logp=logp, tail_logp=tail_logp, logz=logz, entropy=entropy)


def _score_chunk(head: Projection, chunks: RowChunks, k: int, always_include: Tensor | None) -> tuple[Tensor, ...]:
    """ids, this rank's logits there, and its sums over all other columns below the largest of them on any rank."""
    x = chunks.logits.view(0, head.hidden.shape[0], head.columns)
    maxima = fill(x, head, chunks, with_maxima=True)
    values, ids = _topk_of_ranks(head, x, k + 2, maxima)
    largest_outside = values[:, k]
    if always_include is None:
        ids = ids[:, :k].contiguous()
    else:
        included = always_include[:, None]
        largest_outside = torch.where(ids[:, k] == always_include, values[:, k + 1], largest_outside)
        ids = torch.cat([included, torch.where(ids[:, :k] == included, -1, ids[:, :k])], dim=1)
    row, slot = torch.nonzero(owned_ids(ids, head), as_tuple=True)
    column = ids[row, slot] - head.options.vocab_start
    selected = x.new_zeros(ids.shape)
    selected[row, slot] = x[row, column]
    x[row, column] = MASKED
    sums = sums_below(x, largest_outside, chunks.inner, chunks.tiles, bounded=head.options.bias is None)
    return ids, selected, sums.m, sums.l, sums.t


def sums_of(sums: RunningSums, rows: slice) -> RunningSums:
    """The sums of some rows, as views."""
    return RunningSums(m=sums.m[rows], l=sums.l[rows], t=sums.t[rows])


def _topk_of_ranks(head: Projection, x: Tensor, k: int, maxima: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = topk_of(x, min(k, x.shape[1]), maxima)
    return best_of_ranks(values, ids + head.options.vocab_start, k, head.options.process_group)


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `opd_kernels.fused_sparse_loss`; loss_fn runs with autocast off."""
    needs = needs_gradient(hidden, weight, options.bias)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = projection(hidden, weight, options)
        chunks = row_chunks(head, most=resident_rows(head.hidden.device))
        sums = gradient_sums(head, needs, head.dtype)
        losses, auxes = [], []
        for rows in spans(hidden.shape[0], chunks.rows):
            part = part_of(head, rows)
            selected, top = select_chunk(part, chunks, ids[rows], tail=tail, entropy=entropy, student_topk=student_topk)
            loss, aux, upstream = run_loss(loss_fn, selected, tuple(extra[rows] for extra in extras), any(needs))
            losses.append(loss)
            auxes.append(aux)
            check_same_aux(auxes[0], aux)
            if upstream is not None:
                _add_chunk(sums, part, chunks, rows, ids[rows], selected, top, upstream)
        reduce_hidden_gradient(sums.hidden, options.process_group)
        total = torch.stack(losses).sum()
    return attach(total, sums, hidden, weight, options.bias), {name: torch.cat([aux[name] for aux in auxes]) for name in auxes[0]}


def select_chunk(
    head: Projection, chunks: RowChunks, ids: Tensor, *, tail: bool, entropy: bool, student_topk: int, keep_logits: bool = False
) -> tuple[SelectedLogprobs, Tensor | None]:
    """Also leaves in scratch what the gradient starts from: exp(x - top), with top [C]; or the logits, with None.

    The second exponential of every logit is worth saving; a softcap's slope, the top k and a divergence need the logits themselves.
    """
    keep_logits = keep_logits or head.options.softcap is not None or student_topk > 0
    tokens, group = head.hidden.shape[0], head.options.process_group
    where = place(ids, head, tile_rows=chunks.inner, tile_columns=max(1, head.columns))
    rows_x = chunks.logits.view(0, tokens, head.columns)
    maxima = fill(rows_x, head, chunks, with_maxima=student_topk > 0)
    sums = empty_sums(tokens, rows_x)
    selected = rows_x.new_zeros(ids.numel())
    for i, rows in enumerate(spans(tokens, chunks.inner)):
        x, chosen = rows_x[rows], where.tile(i, 0)
        selected[chosen.entry] = x[chosen.row, chosen.column]
        x[chosen.row, chosen.column] = float("-inf")
        shifted, last = chunks.tiles.view(0, *x.shape), chunks.tiles.view(1, *x.shape) if keep_logits else x
        accumulate(x, sums_of(sums, rows), shifted if entropy else last, last if entropy else None)
    top = None if keep_logits else sums.m.clone()
    if keep_logits:
        rows_x[where.row, where.column] = selected[where.entry]
    topk_values, topk_ids = _topk_of_ranks(head, rows_x, student_topk, maxima) if student_topk else (None, None)
    selected = collect_selected(selected.view(ids.shape), owned_ids(ids, head), group)
    logp, tail_logp, logz, entropy_C = finalize(selected, ids, combine_sums(sums, group))
    found = SelectedLogprobs(
        logp=logp,
        tail_logp=tail_logp if tail else None,
        logz=logz,
        entropy=entropy_C if entropy else None,
        topk_ids=topk_ids,
        topk_logp=None if topk_values is None else topk_values - logz[:, None],
    )
    return found, top


def run_loss(
    loss_fn: LossFn, selected: SelectedLogprobs, extras: tuple[Tensor, ...], differentiate: bool
) -> tuple[Tensor, dict[str, Tensor], Upstream | None]:
    """Runs a closure on one chunk: (loss, aux, gradients of the loss at the chunk's outputs). Raises ValueError for a bad result."""
    names = ("logp", "tail_logp", "logz", "entropy")
    leaves = {name: getattr(selected, name) for name in names if getattr(selected, name) is not None}
    with torch.set_grad_enabled(differentiate):
        leaves = {name: leaf.detach().requires_grad_(differentiate) for name, leaf in leaves.items()}
        loss, aux = check_loss(loss_fn(replace(selected, **leaves), *extras), selected.logz.shape[0])
    grads: dict[str, Tensor | None] = dict.fromkeys(names)
    if differentiate:
        check_loss_depends(loss.requires_grad)
        grads.update(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
        check_loss_depends(any(grad is not None for grad in grads.values()))
    upstream = Upstream(**grads) if differentiate else None
    return loss.detach(), {name: value.detach() for name, value in aux.items()}, upstream


def _add_chunk(
    sums: GradientSums,
    head: Projection,
    chunks: RowChunks,
    rows: slice,
    ids: Tensor,
    selected: SelectedLogprobs,
    top: Tensor | None,
    upstream: Upstream,
) -> None:
    """Turns what select_chunk left in scratch into gradients and adds up their products."""
    tokens = head.hidden.shape[0]
    rule = coefficients(upstream, ids, selected.logp, selected.tail_logp, selected.logz, selected.entropy, head.row_scale())
    where = place(ids, head, tile_rows=chunks.inner, tile_columns=max(1, head.columns))
    rows_x = chunks.logits.view(0, tokens, head.columns)
    for i, inner in enumerate(spans(tokens, chunks.inner)):
        x = rows_x[inner]
        scratch = chunks.tiles.view(0, *x.shape)
        if top is not None:
            dlogits_of_mass_(x, top[inner], inner, rule, where.tile(i, 0), scratch)
            continue
        slope = chunks.tiles.view(1, *x.shape) if head.options.softcap is not None else None
        dlogits_(x, head, inner, rule, where.tile(i, 0), scratch, slope)
    add_gradients(sums, rows_x, head, chunks, rows)
