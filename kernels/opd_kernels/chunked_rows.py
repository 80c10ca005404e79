"""Chunked PyTorch over whole rows: the logits of a few tokens at a time, over the whole vocabulary.

With a row at hand the objective's gradient is known before the logits are given up, so the loss needs no second projection, and the top k
is found before the columns outside it are summed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_kernels.distributed import collect_selected, combine_sums, reduce_hidden_gradient, smallest_over_ranks
from opd_kernels.dlogits import GradientSums, add_tile, dlogits_, gradient_sums
from opd_kernels.placement import owned_ids, place
from opd_kernels.precomputed import attach, needs_gradient
from opd_kernels.products import Projection, Scratch, logits_into, projection
from opd_kernels.running import MASKED, accumulate, accumulate_below, empty_sums
from opd_kernels.selection import RunningSums, Upstream, coefficients, finalize
from opd_kernels.tiling import chunk_rows, inner_columns, spans
from opd_kernels.topk import RunningTopk, block_maxima
from opd_kernels.types import LogitOptions, LossFn, SelectedLogprobs, TopkLogprobs, chunk_budget


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChunks:
    """Scratch for whole rows of `rows` tokens and for tiles inside them."""

    rows: int
    columns: int  # of an inner tile
    logits: Scratch
    tiles: Scratch


def row_chunks(head: Projection, copies: int = 1) -> RowChunks:
    """Sizes and scratch for `copies` sets of whole rows, the same on all ranks of a process group."""
    device = head.hidden.device
    elements = chunk_budget(head.options, device, whole_rows=True) // (copies * head.dtype.itemsize)
    rows = smallest_over_ranks(chunk_rows(head.hidden.shape[0], head.columns, elements), head.options.process_group, device)
    columns = inner_columns(rows, head.columns, device)
    return RowChunks(rows=rows, columns=columns, logits=Scratch(rows * head.columns, copies, head), tiles=Scratch(rows * columns, 2, head))


def part_of(head: Projection, rows: slice) -> Projection:
    """The head as one chunk of tokens sees it."""
    temperature = head.options.temperature
    options = replace(head.options, temperature=temperature[rows]) if isinstance(temperature, Tensor) else head.options
    return replace(head, hidden=head.hidden[rows], options=options)


def topk_logprobs(hidden: Tensor, weight: Tensor, k: int, *, always_include: Tensor | None, options: LogitOptions) -> TopkLogprobs:
    """See `opd_kernels.topk_logprobs`."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = projection(hidden, weight, options)
        chunks = row_chunks(head)
        parts = [
            _score_chunk(part_of(head, rows), chunks, k, None if always_include is None else always_include[rows])
            for rows in spans(hidden.shape[0], chunks.rows)
        ]
        ids, logp, tail_logp, logz, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return TopkLogprobs(ids=ids, logp=logp, tail_logp=tail_logp, logz=logz, entropy=entropy)


def _score_chunk(head: Projection, chunks: RowChunks, k: int, always_include: Tensor | None) -> tuple[Tensor, ...]:
    tokens, group, everyone = head.hidden.shape[0], head.options.process_group, slice(0, head.hidden.shape[0])
    x = chunks.logits.view(0, tokens, head.columns)
    maxima = []
    for columns in spans(head.columns, chunks.columns):
        logits_into(x[:, columns], head, everyone, head.weight_tile(columns.start, columns.stop), columns.start)
        maxima.append(block_maxima(x[:, columns]))
    values, ids = _topk_of_ranks(head, x, k + 2, maxima)
    largest_outside = values[:, k]
    if always_include is None:
        ids = ids[:, :k].contiguous()
    else:
        included = always_include[:, None]
        largest_outside = torch.where(ids[:, k] == always_include, values[:, k + 1], largest_outside)
        ids = torch.cat([included, torch.where(ids[:, :k] == included, -1, ids[:, :k])], dim=1)
    owned = owned_ids(ids, head)
    row, slot = torch.nonzero(owned, as_tuple=True)
    column = ids[row, slot] - head.options.vocab_start
    selected = x.new_zeros(ids.shape)
    selected[row, slot] = x[row, column]
    x[row, column] = MASKED
    sums = RunningSums(m=largest_outside, l=x.new_zeros(tokens), t=x.new_zeros(tokens))
    for columns in spans(head.columns, chunks.columns):
        shape = (tokens, columns.stop - columns.start)
        shifted, mass = chunks.tiles.view(0, *shape), chunks.tiles.view(1, *shape)
        accumulate_below(x[:, columns], sums, shifted, mass, bounded=head.options.bias is None)
    logp, tail_logp, logz, entropy = finalize(collect_selected(selected, owned, group), ids, combine_sums(sums, group))
    return ids, logp, tail_logp, logz, entropy


def _topk_of_ranks(head: Projection, x: Tensor, k: int, maxima: list[Tensor]) -> tuple[Tensor, Tensor]:
    best = RunningTopk(x.shape[0], k, x)
    if maxima:
        best.add(x, slice(0, x.shape[0]), head.options.vocab_start, torch.cat(maxima, dim=1))
    return best.result(head.options.process_group)


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
        chunks = row_chunks(head)
        sums = gradient_sums(head, needs, head.dtype)
        losses, auxes = [], []
        for rows in spans(hidden.shape[0], chunks.rows):
            part = part_of(head, rows)
            selected = _select_chunk(part, chunks, ids[rows], tail=tail, entropy=entropy, student_topk=student_topk)
            loss, aux, upstream = run_loss(loss_fn, selected, tuple(extra[rows] for extra in extras), any(needs))
            losses.append(loss)
            auxes.append(aux)
            if upstream is not None:
                _add_chunk(sums, part, chunks, rows, ids[rows], selected, upstream)
        reduce_hidden_gradient(sums.hidden, options.process_group)
        total = torch.stack(losses).sum()
    return attach(total, sums, hidden, weight, options.bias), {name: torch.cat([aux[name] for aux in auxes]) for name in auxes[0]}


def _select_chunk(head: Projection, chunks: RowChunks, ids: Tensor, *, tail: bool, entropy: bool, student_topk: int) -> SelectedLogprobs:
    """Leaves the chunk's logits in scratch."""
    tokens, group, everyone = head.hidden.shape[0], head.options.process_group, slice(0, head.hidden.shape[0])
    where = place(ids, head, tile_rows=tokens, tile_columns=chunks.columns)
    rows_x = chunks.logits.view(0, tokens, head.columns)
    sums = empty_sums(tokens, rows_x)
    maxima = []
    selected = rows_x.new_zeros(ids.numel())
    for j, columns in enumerate(spans(head.columns, chunks.columns)):
        x, shape = rows_x[:, columns], (tokens, columns.stop - columns.start)
        logits_into(x, head, everyone, head.weight_tile(columns.start, columns.stop), columns.start)
        if student_topk:
            maxima.append(block_maxima(x))
        chosen = where.tile(0, j)
        selected[chosen.entry] = x[chosen.row, chosen.column]
        x[chosen.row, chosen.column] = float("-inf")
        accumulate(x, sums, chunks.tiles.view(0, *shape), chunks.tiles.view(1, *shape) if entropy else None)
    rows_x[where.row, where.column] = selected[where.entry]
    topk_values, topk_ids = _topk_of_ranks(head, rows_x, student_topk, maxima) if student_topk else (None, None)
    selected = collect_selected(selected.view(ids.shape), owned_ids(ids, head), group)
    logp, tail_logp, logz, entropy_C = finalize(selected, ids, combine_sums(sums, group))
    return SelectedLogprobs(
        logp=logp,
        tail_logp=tail_logp if tail else None,
        logz=logz,
        entropy=entropy_C if entropy else None,
        topk_ids=topk_ids,
        topk_logp=None if topk_values is None else topk_values - logz[:, None],
    )


def run_loss(
    loss_fn: LossFn, selected: SelectedLogprobs, extras: tuple[Tensor, ...], differentiate: bool
) -> tuple[Tensor, dict[str, Tensor], Upstream | None]:
    """Runs a closure on one chunk: (loss, aux, gradients of the loss at the chunk's outputs). Raises ValueError for a malformed result."""
    names = ("logp", "tail_logp", "logz", "entropy")
    leaves = {name: getattr(selected, name) for name in names if getattr(selected, name) is not None}
    with torch.set_grad_enabled(differentiate):
        leaves = {name: leaf.detach().requires_grad_(differentiate) for name, leaf in leaves.items()}
        loss, aux = loss_fn(replace(selected, **leaves), *extras)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise ValueError(f"loss_fn returned a loss of shape {list(getattr(loss, 'shape', []))}; return the sum over the chunk, a scalar tensor")
    for name, value in aux.items():
        if value.dim() == 0 or value.shape[0] != selected.logz.shape[0]:
            raise ValueError(f"loss_fn's aux[{name!r}] has shape {list(value.shape)}; return one value a token")
    grads: dict[str, Tensor | None] = dict.fromkeys(names)
    if differentiate and loss.requires_grad:
        grads.update(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    upstream = Upstream(**grads) if differentiate else None
    return loss.detach(), {name: value.detach() for name, value in aux.items()}, upstream


def _add_chunk(
    sums: GradientSums, head: Projection, chunks: RowChunks, rows: slice, ids: Tensor, selected: SelectedLogprobs, upstream: Upstream
) -> None:
    """Turns the chunk's logits in scratch into gradients and adds up their products."""
    tokens = head.hidden.shape[0]
    rule = coefficients(upstream, ids, selected.logp, selected.tail_logp, selected.logz, selected.entropy, head.row_scale())
    where = place(ids, head, tile_rows=tokens, tile_columns=chunks.columns)
    rows_x = chunks.logits.view(0, tokens, head.columns)
    for j, columns in enumerate(spans(head.columns, chunks.columns)):
        x, shape, chosen = rows_x[:, columns], (tokens, columns.stop - columns.start), where.tile(0, j)
        slope = chunks.tiles.view(1, *shape) if head.options.softcap is not None else None
        dlogits_(x, head, slice(0, tokens), rule, chosen, chunks.tiles.view(0, *shape), slope)
        block = None if sums.weight is None else sums.weight[columns]
        add_tile(sums, x, head.hidden, head.weight_tile(columns.start, columns.stop), rows, columns, block)
