"""Dense divergences of the Triton backend: two heads projected into scratch, three row passes over it, no [N, V] tensor."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_kernels.distributed import combine_sums, reduce_hidden_gradient, sum_ranks
from opd_kernels.dlogits import GradientSums, add_tile, gradient_sums
from opd_kernels.first_order import first_order
from opd_kernels.precomputed import attach, needs_gradient
from opd_kernels.row_kernels import TILES, Tiles, row_sums, scaled
from opd_kernels.tiling import spans
from opd_kernels.triton_divergence import ProductTile, divergence_dz, divergence_rows
from opd_kernels.triton_rows import RowHead, TileScratch, backward_shape, kernels_on, padded_tile, project, row_chunk, row_head, weight_block
from opd_kernels.types import Divergence, HeadInputs, LogitOptions


def divergence_of_heads(
    student: HeadInputs, teacher: HeadInputs, divergence: Divergence, *, token_weight: Tensor | None, tiles: Tiles = TILES
) -> Tensor:
    """See `opd_kernels.dense_divergence`."""
    hidden, weight, bias = student.hidden, student.weight, student.options.bias
    if token_weight is None:
        options = replace(student.options, bias=None)
        return _Dense.apply(hidden, weight, bias, options, teacher, divergence, tiles)
    needs = needs_gradient(hidden, weight, bias)
    with torch.no_grad(), kernels_on(hidden):
        heads = [row_head(side.hidden, side.weight, side.options) for side in (student, teacher)]
        sums = gradient_sums(heads[0].head, needs, torch.float32)
        value, _, _, _ = _dense_rows(heads, divergence, tiles, sums if any(needs) else None, token_weight)
        reduce_hidden_gradient(sums.hidden, student.options.process_group)
    return attach(value, sums, hidden, weight, bias, token_weight, scaled)


class _Dense(torch.autograd.Function):
    """Keeps three numbers a token and projects both heads again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: LogitOptions,
        teacher: HeadInputs,
        divergence: Divergence,
        tiles: Tiles,
    ) -> Tensor:
        with kernels_on(hidden):
            heads = [row_head(hidden, weight, replace(options, bias=bias)), row_head(teacher.hidden, teacher.weight, teacher.options)]
            value, slope, logz_s, logz_t = _dense_rows(heads, divergence, tiles)
        ctx.save_for_backward(hidden, weight, bias, teacher.hidden, teacher.weight, teacher.options.bias, slope, logz_s, logz_t)
        ctx.options, ctx.divergence, ctx.tiles = (options, replace(teacher.options, bias=None)), divergence, tiles
        return value

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, hidden_t, weight_t, bias_t, slope, logz_s, logz_t = ctx.saved_tensors
        options_s, options_t = ctx.options
        with kernels_on(hidden):
            student = row_head(hidden, weight, replace(options_s, bias=bias))
            heads = [student, row_head(hidden_t, weight_t, replace(options_t, bias=bias_t))]
            scale = upstream.float() * options_s.logit_scale * student.inverse_temperature
            sums = _dense_backward(heads, ctx.divergence, (logz_s, logz_t), slope, scale, ctx.needs_input_grad[:3], ctx.tiles)
        d_hidden = None if sums.hidden is None else sums.hidden.to(hidden.dtype)
        d_bias = None if sums.bias is None else sums.bias.to(bias.dtype)
        return d_hidden, sums.weight, d_bias, None, None, None, None


def _dense_rows(
    heads: list[RowHead], divergence: Divergence, tiles: Tiles, sums: GradientSums | None = None, token_weight: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(D, sum of slopes, both log-normalisers), [N] each; with `sums`, adds the gradients of sum(token_weight * D) to them."""
    student = heads[0].head
    tokens, device, columns = student.hidden.shape[0], student.hidden.device, slice(0, student.columns)
    group = student.options.process_group
    chunk = row_chunk(heads[0], 2)
    scratches = [TileScratch(chunk, columns.stop, device) for _ in heads]
    weight_tiles = [padded_tile(head.head, columns) for head in heads]
    written = slice(0, len(weight_tiles[0]))
    parts = []
    for rows in spans(tokens, chunk):
        pair = []
        for head, scratch, weight_tile in zip(heads, scratches, weight_tiles, strict=True):
            z = project(scratch.tile(rows.stop - rows.start, columns.stop), head.head, rows, weight_tile)
            constants = head.constants(rows, columns)
            total = combine_sums(row_sums(z, constants, tiles), group)
            pair.append(ProductTile(z=z, constants=constants, logz=(total.m + total.l.log()).contiguous()))
        value, slope = (sum_ranks(part, group) for part in divergence_rows(pair[0], pair[1], divergence, tiles))
        parts.append((value, slope, pair[0].logz, pair[1].logz))
        if sums is not None:
            dz = scratches[0].over(pair[0].z, heads[0].gradient_dtype)
            scale = token_weight[rows] * student.options.logit_scale * heads[0].inverse_temperature[rows]
            divergence_dz(pair[0], pair[1], divergence, slope, scale, dz, tiles)
            wide = scratches[0].over(pair[0].z, heads[0].gradient_dtype, written.stop)
            add_tile(sums, wide, student.hidden[rows], weight_tiles[0], rows, written, None if sums.weight is None else sums.weight[written])
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _dense_backward(
    heads: list[RowHead],
    divergence: Divergence,
    logz: tuple[Tensor, Tensor],
    slope: Tensor,
    scale: Tensor,
    needs: tuple[bool, ...],
    tiles: Tiles,
) -> GradientSums:
    student, device = heads[0].head, slope.device
    height, width = backward_shape(heads[0], 2)
    scratches = [TileScratch(height, width, device) for _ in heads]
    sums = gradient_sums(student, needs, student.weight.dtype)
    room = weight_block(sums, heads[0], width)
    for columns in spans(student.columns, width):
        shape = columns.stop - columns.start
        weight_tiles = [padded_tile(head.head, columns) for head in heads]
        written = slice(columns.start, columns.start + len(weight_tiles[0]))
        block = None if sums.weight is None else sums.weight[written] if room is None else room[: len(weight_tiles[0])]
        for rows in spans(slope.shape[0], height):
            pair = [
                ProductTile(
                    z=project(scratch.tile(rows.stop - rows.start, shape), head.head, rows, weight_tile),
                    constants=head.constants(rows, columns),
                    logz=logz_N[rows],
                )
                for head, scratch, weight_tile, logz_N in zip(heads, scratches, weight_tiles, logz, strict=True)
            ]
            dz = scratches[0].over(pair[0].z, heads[0].gradient_dtype)
            divergence_dz(pair[0], pair[1], divergence, slope[rows], scale[rows], dz, tiles)
            wide = scratches[0].over(pair[0].z, heads[0].gradient_dtype, len(weight_tiles[0]))
            add_tile(sums, wide, student.hidden[rows], weight_tiles[0], rows, written, block)
        if room is not None:
            sums.weight[written] = block
    reduce_hidden_gradient(sums.hidden, student.options.process_group)
    return sums
