"""Chunked PyTorch: no [N, V] tensor, on any device, bitwise repeatable. The default on the CPU, and on CUDA without Triton.

The composable operation makes one [C, cv] tile of logits at a time, in both passes vocabulary-outer: a weight tile is cast once, and
each block of rows of the weight's gradient comes from one sum over tokens and is written once. Four products, where autograd over whole
logits needs three and the [N, V] memory; on the CPU backward walks the tiles the other way and starts with those that forward left in
the scratch (`resident`). The fused loss (`chunked_rows`) keeps whole rows of a few tokens and needs three.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_kernels.chunked_dense import dense_divergence
from opd_kernels.chunked_rows import fused_sparse_loss, topk_logprobs
from opd_kernels.distributed import collect_selected, combine_sums, reduce_hidden_gradient
from opd_kernels.dlogits import GradientSums, add_tile, dlogits_, dlogits_of_mass_, gradient_sums
from opd_kernels.first_order import first_order
from opd_kernels.placement import owned_ids
from opd_kernels.precomputed import needs_gradient
from opd_kernels.products import Projection, Scratch, logits_into, projection
from opd_kernels.resident import Grid, Tiles, kept_tiles, new_tiles, tile_grid
from opd_kernels.running import accumulate, empty_sums, exp_below_
from opd_kernels.selection import Coefficients, RunningSums, Upstream, coefficients, finalize
from opd_kernels.tiling import spans
from opd_kernels.topk import RunningTopk
from opd_kernels.types import LogitOptions, SelectedLogprobs

__all__ = ["dense_divergence", "fused_sparse_loss", "selected_logprobs", "topk_logprobs"]


def selected_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, options: LogitOptions, tail: bool, entropy: bool, student_topk: int
) -> SelectedLogprobs:
    """See `opd_kernels.selected_logprobs`."""
    differentiate = any(needs_gradient(hidden, weight, options.bias))
    logp, tail_logp, logz, entropy_N, topk_ids, topk_logp = _Selected.apply(
        hidden, weight, options.bias, ids, options, entropy, student_topk, differentiate
    )
    return SelectedLogprobs(
        logp=logp,
        tail_logp=tail_logp if tail else None,
        logz=logz,
        entropy=entropy_N,
        topk_ids=topk_ids,
        topk_logp=topk_logp,
    )


class _Selected(torch.autograd.Function):
    """Saves the Parameter objects themselves, so that a runtime which frees and gathers them between the passes is served.

    The tiles that wait for backward are saved tensors too: checkpointing drops them with the others and forms them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        options: LogitOptions,
        entropy: bool,
        topk: int,
        differentiate: bool,
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = projection(hidden, weight, options)
            grid = tile_grid(head, ids, entropy=entropy)
            keep = differentiate and hidden.device.type == "cpu"
            tiles = new_tiles(head, grid, keep=keep, borrow=ctx.needs_input_grad[1] and options.chunk_bytes is None)
            selected, sums, topk_values, topk_ids = _forward_tiles(head, ids, grid, tiles, topk)
            logp, tail_logp, logz, entropy_N = finalize(selected, ids, sums)
        ctx.save_for_backward(hidden, weight, bias, ids, logp, tail_logp, logz, entropy_N, *tiles.saved())
        ctx.options, ctx.entropy, ctx.used = replace(options, bias=None), entropy, False
        ctx.set_materialize_grads(False)
        topk_logp = None if topk_values is None else topk_values - logz[:, None]
        if topk_values is not None:
            ctx.mark_non_differentiable(topk_ids, topk_logp)
        return logp, tail_logp, logz, entropy_N if entropy else None, topk_ids, topk_logp

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, logp, tail_logp, logz, entropy_N, top, loan, address, *own = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            head = projection(hidden, weight, replace(ctx.options, bias=bias))
            grid = tile_grid(head, ids, entropy=ctx.entropy)
            tiles = kept_tiles(head, grid, top, loan, address, own, used=ctx.used)
            ctx.used = True  # before the first tile is overwritten: a second pass over a retained graph forms them again
            wanted = Upstream(logp=upstream[0], tail_logp=upstream[1], logz=upstream[2], entropy=upstream[3])
            rows = coefficients(wanted, ids, logp, tail_logp, logz, entropy_N, head.row_scale())
            grads = _backward_tiles(head, grid, tiles, rows, needs)
        d_hidden = None if grads.hidden is None else grads.hidden.to(hidden.dtype)
        d_bias = None if grads.bias is None else grads.bias.to(bias.dtype)
        return d_hidden, grads.weight, d_bias, None, None, None, None, None


def _forward_tiles(head: Projection, ids: Tensor, grid: Grid, tiles: Tiles, topk: int) -> tuple[Tensor, RunningSums, Tensor | None, Tensor | None]:
    """Logits at ids, running sums over the columns outside them, and the top k; over the columns of all ranks."""
    tokens = head.hidden.shape[0]
    sums = empty_sums(tokens, tiles.top)
    selected = sums.m.new_full((ids.numel(),), float("-inf"))
    best = RunningTopk(tokens, topk, sums.m) if topk else None
    scratch, keep_logits = grid.scratch(head), head.options.softcap is not None
    for columns in spans(head.columns, grid.where.tile_columns):
        weight_tile = head.weight_tile(columns.start, columns.stop)
        for rows in reversed([*spans(tokens, grid.where.tile_rows)]):
            chosen, number = grid.chosen(rows, columns), grid.number(rows, columns)
            x = tiles.area(number, rows, columns)
            logits_into(x, head, rows, weight_tile, columns.start)
            if best is not None:
                best.add(x, rows, head.options.vocab_start + columns.start)
            values = selected[chosen.entry] = x[chosen.row, chosen.column]
            x[chosen.row, chosen.column] = float("-inf")
            part = RunningSums(m=sums.m[rows], l=sums.l[rows], t=sums.t[rows])
            work = [scratch.view(area, *x.shape) for area in range(grid.parts - 1)]
            work = work if keep_logits else [*work, x]
            accumulate(x, part, work[0], work[1] if grid.entropy else None)
            if keep_logits:
                x[chosen.row, chosen.column] = values
            if tiles.kept(number):
                tiles.top_of(number, rows).copy_(part.m)
    group = head.options.process_group
    selected = collect_selected(selected.view(ids.shape), owned_ids(ids, head), group)
    topk_values, topk_ids = best.result(group) if best is not None else (None, None)
    return selected, combine_sums(sums, group), topk_values, topk_ids


def _backward_tiles(head: Projection, grid: Grid, tiles: Tiles, coefficients: Coefficients, needs: tuple[bool, ...]) -> GradientSums:
    """Walks the tiles in the opposite order: first those that forward kept, each of which gives up its memory once used."""
    scratch = grid.scratch(head)
    sums = gradient_sums(head, needs, head.weight.dtype, tiles.loan)
    direct = sums.weight is None or sums.weight.dtype == head.dtype
    block = None if direct else head.hidden.new_empty(grid.where.tile_columns, head.weight.shape[1], dtype=head.dtype)
    # one room for all casts: fresh memory for each would be taken from what tiles have given up, and touch it again
    room = None if head.weight.dtype == head.hidden.dtype else head.hidden.new_empty(grid.where.tile_columns, head.weight.shape[1])
    for columns in reversed([*spans(head.columns, grid.where.tile_columns)]):
        weight_tile = head.weight_tile(columns.start, columns.stop, room)
        target = None if sums.weight is None else sums.weight[columns] if block is None else block[: columns.stop - columns.start]
        for rows in spans(head.hidden.shape[0], grid.where.tile_rows):
            number = grid.number(rows, columns)
            x = tiles.area(number, rows, columns)
            if not tiles.formed(number):
                logits_into(x, head, rows, weight_tile, columns.start)
            _dlogits_of_tile_(x, head, grid, tiles, coefficients, (rows, columns), scratch)
            add_tile(sums, x, head.hidden[rows], weight_tile, rows, columns, target)
            tiles.release(number)
        if block is not None:
            sums.weight[columns] = target
    reduce_hidden_gradient(sums.hidden, head.options.process_group)
    return sums


def _dlogits_of_tile_(
    x: Tensor, head: Projection, grid: Grid, tiles: Tiles, coefficients: Coefficients, place: tuple[slice, slice], scratch: Scratch
) -> None:
    """Turns x, logits or what forward kept of them, into gradients of the products, in place.

    A kept tile whose memory has been used passes through the same exponentials again, so that a second backward pass repeats the bits.
    """
    rows, number, chosen = place[0], grid.number(*place), grid.chosen(*place)
    with_mass, with_softcap = coefficients.slope is not None, head.options.softcap is not None
    mass = scratch.view(0, *x.shape) if with_mass else None
    if with_softcap or not tiles.kept(number):
        slope = scratch.view(int(with_mass), *x.shape) if with_softcap else None
        dlogits_(x, head, rows, coefficients, chosen, mass, slope)
        return
    top = tiles.top_of(number, rows)
    if not tiles.formed(number):
        x[chosen.row, chosen.column] = float("-inf")
        exp_below_(x, top)
    dlogits_of_mass_(x, top, rows, coefficients, chosen, mass)
