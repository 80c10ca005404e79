"""Chunked PyTorch: no [N, V] tensor, on any device, bitwise repeatable. The default on the CPU, and on CUDA without Triton.

The composable operation keeps one [C, cv] tile of logits at a time, in both passes vocabulary-outer: a weight tile is cast once, and
each block of rows of the weight's gradient comes from one sum over tokens and is written once. Four products, where autograd over whole
logits needs three and the [N, V] memory. The fused loss (`chunked_rows`) keeps whole rows of a few tokens and needs three.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_kernels.chunked_dense import dense_divergence
from opd_kernels.chunked_rows import fused_sparse_loss, topk_logprobs
from opd_kernels.distributed import collect_selected, combine_sums, reduce_hidden_gradient
from opd_kernels.dlogits import GradientSums, add_tile, dlogits_, gradient_sums
from opd_kernels.first_order import first_order
from opd_kernels.placement import Placement, owned_ids, place
from opd_kernels.products import Projection, Scratch, logits_into, projection
from opd_kernels.running import accumulate, empty_sums
from opd_kernels.selection import Coefficients, RunningSums, Upstream, coefficients, finalize
from opd_kernels.tiling import spans, tile_shape
from opd_kernels.topk import RunningTopk
from opd_kernels.types import LogitOptions, SelectedLogprobs, chunk_budget

__all__ = ["dense_divergence", "fused_sparse_loss", "selected_logprobs", "topk_logprobs"]


def selected_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, options: LogitOptions, tail: bool, entropy: bool, student_topk: int
) -> SelectedLogprobs:
    """See `opd_kernels.selected_logprobs`."""
    logp, tail_logp, logz, entropy_N, topk_ids, topk_logp = _Selected.apply(
        hidden, weight, options.bias, ids, options, entropy, student_topk
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
    """Saves the Parameter objects themselves, so that a runtime which frees and gathers them between the passes is served."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, options: LogitOptions, entropy: bool, topk: int
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = projection(hidden, weight, options)
            selected, sums, topk_values, topk_ids = _forward_tiles(head, ids, entropy, topk)
            logp, tail_logp, logz, entropy_N = finalize(selected, ids, sums)
        ctx.save_for_backward(hidden, weight, bias, ids, logp, tail_logp, logz, entropy_N)
        ctx.options = replace(options, bias=None)
        ctx.set_materialize_grads(False)
        topk_logp = None if topk_values is None else topk_values - logz[:, None]
        if topk_values is not None:
            ctx.mark_non_differentiable(topk_ids, topk_logp)
        return logp, tail_logp, logz, entropy_N if entropy else None, topk_ids, topk_logp

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, logp, tail_logp, logz, entropy_N = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            head = projection(hidden, weight, replace(ctx.options, bias=bias))
            wanted = Upstream(logp=upstream[0], tail_logp=upstream[1], logz=upstream[2], entropy=upstream[3])
            rows = coefficients(wanted, ids, logp, tail_logp, logz, entropy_N, head.row_scale())
            grads = _backward_tiles(head, ids, rows, needs)
        d_hidden = None if grads.hidden is None else grads.hidden.to(hidden.dtype)
        d_bias = None if grads.bias is None else grads.bias.to(bias.dtype)
        return d_hidden, grads.weight, d_bias, None, None, None, None


def _grid(head: Projection, ids: Tensor, parts: int) -> tuple[Placement, Scratch]:
    tokens, device = head.hidden.shape[0], head.hidden.device
    elements = chunk_budget(head.options, device, row_sets=0) // (parts * head.dtype.itemsize)
    tile_rows, tile_columns = tile_shape(tokens, head.columns, head.hidden.shape[1], elements, device)
    where = place(ids, head, tile_rows=tile_rows, tile_columns=tile_columns)
    return where, Scratch(tile_rows * tile_columns, parts, head)


def _forward_tiles(head: Projection, ids: Tensor, entropy: bool, topk: int) -> tuple[Tensor, RunningSums, Tensor | None, Tensor | None]:
    """Logits at ids, running sums over the columns outside them, and the top k; over the columns of all ranks."""
    where, scratch = _grid(head, ids, 2 if entropy else 1)
    tokens = head.hidden.shape[0]
    sums = empty_sums(tokens, scratch.view(0, 1, 1))
    selected = sums.m.new_full((ids.numel(),), float("-inf"))
    best = RunningTopk(tokens, topk, sums.m) if topk else None
    for j, columns in enumerate(spans(head.columns, where.tile_columns)):
        weight_tile = head.weight_tile(columns.start, columns.stop)
        for i, rows in enumerate(spans(tokens, where.tile_rows)):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            x = scratch.view(0, *shape)
            logits_into(x, head, rows, weight_tile, columns.start)
            if best is not None:
                best.add(x, rows, head.options.vocab_start + columns.start)
            chosen = where.tile(i, j)
            selected[chosen.entry] = x[chosen.row, chosen.column]
            x[chosen.row, chosen.column] = float("-inf")
            part = RunningSums(m=sums.m[rows], l=sums.l[rows], t=sums.t[rows])
            accumulate(x, part, x, scratch.view(1, *shape) if entropy else None)
    group = head.options.process_group
    selected = collect_selected(selected.view(ids.shape), owned_ids(ids, head), group)
    topk_values, topk_ids = best.result(group) if best is not None else (None, None)
    return selected, combine_sums(sums, group), topk_values, topk_ids


def _backward_tiles(head: Projection, ids: Tensor, coefficients: Coefficients, needs: tuple[bool, ...]) -> GradientSums:
    with_mass, with_softcap = coefficients.slope is not None, head.options.softcap is not None
    where, scratch = _grid(head, ids, 1 + with_mass + with_softcap)
    sums = gradient_sums(head, needs, head.weight.dtype)
    direct = sums.weight is None or sums.weight.dtype == head.dtype
    block = None if direct else torch.empty(where.tile_columns, head.weight.shape[1], dtype=head.dtype, device=head.weight.device)
    for j, columns in enumerate(spans(head.columns, where.tile_columns)):
        weight_tile = head.weight_tile(columns.start, columns.stop)
        target = None if sums.weight is None else sums.weight[columns] if block is None else block[: columns.stop - columns.start]
        for i, rows in enumerate(spans(head.hidden.shape[0], where.tile_rows)):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            x = scratch.view(0, *shape)
            logits_into(x, head, rows, weight_tile, columns.start)
            mass = scratch.view(1, *shape) if with_mass else None
            slope = scratch.view(1 + with_mass, *shape) if with_softcap else None
            dlogits_(x, head, rows, coefficients, where.tile(i, j), mass, slope)
            add_tile(sums, x, head.hidden[rows], weight_tile, rows, columns, target)
        if block is not None:
            sums.weight[columns] = target
    reduce_hidden_gradient(sums.hidden, head.options.process_group)
    return sums
