"""Triton row kernels of the sparse operations, over an fp32 tile of products z [C, columns] that a matrix product has just written.

No kernel here multiplies matrices, uses atomics or needs a launch-time search; every one runs under TRITON_INTERPRET=1. A launcher
takes tensors and launches. The tile's row stride may exceed its columns: what lies between is padding, read but never used.

Letters: C rows, K chosen ids a row, x = softcap(logit_scale * (z + bias)) / temperature. A z of -inf is a removed column: x is -inf.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_kernels.selection import Coefficients, RunningSums


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Launch shapes: columns a program handles at a time, columns that share one maximum in the top-k, warps of a wide program."""

    block: int = 4096
    group: int = 128
    warps: int = 8


TILES = Tiles()


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConstants:
    """What turns a tile of products into logits: 1 / temperature per row, bias of its columns (fp32, or None), softcap, scale."""

    inverse_temperature: Tensor  # [C] fp32
    bias: Tensor | None = None  # [columns] fp32
    softcap: float | None = None
    logit_scale: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of every kernel that reads a tile."""
        return {
            "inverse_temperature_ptr": self.inverse_temperature,
            "bias_ptr": self.inverse_temperature if self.bias is None else self.bias,
            "softcap": 1.0 if self.softcap is None else self.softcap,
            "logit_scale": self.logit_scale,
            "HAS_BIAS": self.bias is not None,
            "HAS_SOFTCAP": self.softcap is not None,
        }


@triton.jit
def row_offset(row, stride):
    """Offset of a row's first element, in 64 bits: rows times columns passes 2^31 at 14,135 rows of 151,936."""
    return row.to(tl.int64) * stride


@triton.jit
def bounded_tanh(z):
    """tanh by way of exp(-2|z|), which neither overflows nor needs a device library."""
    decay = tl.exp(-2.0 * tl.abs(z))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(z < 0.0, -magnitude, magnitude)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """fp32 in another dtype; bfloat16 to nearest even by hand, because the interpreter's conversion cuts off."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value != value, value, nearest.to(tl.float32, bitcast=True))
    return value.to(dtype)


@triton.jit
def to_logits(z, column, valid, bias_ptr, inverse_temperature, softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Returns x and the softcap's slope; x is -inf where `valid` is false or the logit is -inf. The mask comes after the softcap."""
    scaled = tl.where(valid, z, 0.0)
    if HAS_BIAS:
        scaled += tl.load(bias_ptr + column, mask=valid, other=0.0)
    scaled *= logit_scale
    kept = valid & (z != float("-inf")) & (scaled != float("-inf"))
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        bent = bounded_tanh(scaled / softcap)
        scaled = softcap * bent
        slope = 1.0 - bent * bent
    x = tl.where(kept, scaled * inverse_temperature, float("-inf"))
    return x, slope


@triton.jit
def fold(m, total, centred, x):
    """Adds a block of logits to the running (max, sum of exp(x - max), sum of exp(x - max) * (x - max)).

    The centred sum keeps the entropy's accuracy where one logit dominates. A NaN logit makes the sums NaN.
    """
    new_m = tl.maximum(m, tl.max(x, axis=0))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)
    shift = tl.where(m == float("-inf"), 0.0, m - base)
    scale = tl.exp(shift)
    weight = tl.exp(x - base)
    spread = tl.where(x == float("-inf"), 0.0, x - base)
    new_total = total * scale + tl.sum(weight, axis=0)
    new_centred = scale * (centred + shift * total) + tl.sum(weight * spread, axis=0)
    return new_m, new_total, new_centred


@triton.jit
def take_kernel(
    z_ptr, z_stride, ids_ptr, x_ptr, num_ids, first_column, num_columns,
    inverse_temperature_ptr, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    place = row_offset(row, num_ids) + lane
    column = tl.load(ids_ptr + place, mask=lane < num_ids, other=-1) - first_column
    held = (lane < num_ids) & (column >= 0) & (column < num_columns)
    column = tl.where(held, column, 0)
    target = z_ptr + row_offset(row, z_stride) + column
    z = tl.load(target, mask=held, other=0.0)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    x, _ = to_logits(z, column, held, bias_ptr, inverse_temperature, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    tl.store(x_ptr + place, x, mask=lane < num_ids)
    tl.debug_barrier()  # equal ids: all have read before any removes
    tl.store(target, float("-inf"), mask=held)


def take(z: Tensor, ids: Tensor, constants: TileConstants, first_column: int) -> Tensor:
    """The logits [C, K] at ids [C, K], -inf for ids outside z's columns; those columns of z become -inf."""
    x = torch.empty(ids.shape, dtype=torch.float32, device=z.device)
    take_kernel[(z.shape[0],)](
        z, z.stride(0), ids, x, ids.shape[1], first_column, z.shape[1],
        **constants.arguments(), LANES=lanes_of(ids), num_warps=warps_of(ids),
    )  # fmt: skip
    return x


@triton.jit
def overwrite_kernel(tile_ptr, tile_stride, ids_ptr, values_ptr, num_ids, first_column, num_columns, LANES: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    place = row_offset(row, num_ids) + lane
    column = tl.load(ids_ptr + place, mask=lane < num_ids, other=-1) - first_column
    held = (lane < num_ids) & (column >= 0) & (column < num_columns)
    value = tl.load(values_ptr + place, mask=held, other=0.0)
    target = tile_ptr + row_offset(row, tile_stride) + tl.where(held, column, 0)
    tl.store(target, rounded(value, tile_ptr.dtype.element_ty), mask=held)


def overwrite(tile: Tensor, ids: Tensor, values: Tensor, first_column: int) -> None:
    """Stores fp32 values [C, K] at the columns of ids in a tile, rounded once to its dtype; values at equal ids must be equal.

    Chosen entries of dz are stored over the dense part, never added to it: the sum of two rounded parts loses a confident token's
    gradient. With values of -inf it removes columns.
    """
    overwrite_kernel[(tile.shape[0],)](
        tile, tile.stride(0), ids, values, ids.shape[1], first_column, tile.shape[1], LANES=lanes_of(ids), num_warps=warps_of(ids)
    )


@triton.jit
def add_block(m, totals, centreds, x):
    """Adds a block of logits to a running maximum and to each lane's own sums, as `fold` does to a row's."""
    new_m = tl.maximum(m, tl.max(x, axis=0))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)
    shift = tl.where(m == float("-inf"), 0.0, m - base)
    scale = tl.exp(shift)
    spread = x - base
    weight = tl.exp(spread)
    spread = tl.where(spread < -1e4, -1e4, spread)  # -inf, whose weight is 0
    centreds = scale * (centreds + shift * totals) + weight * spread
    return new_m, totals * scale + weight, centreds


@triton.jit
def row_sums_kernel(
    z_ptr, z_stride, m_ptr, total_ptr, centred_ptr, num_columns, inverse_temperature_ptr, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z_row = z_ptr + row_offset(row, z_stride)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    m = float("-inf")
    totals = tl.zeros([BLOCK], tl.float32)  # added up once at the end: a reduction a block costs more than its loads
    centreds = tl.zeros([BLOCK], tl.float32)
    whole = num_columns - num_columns % BLOCK
    for start in range(0, whole, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + column)
        if HAS_BIAS or HAS_SOFTCAP:
            x, _ = to_logits(z, column, column < num_columns, bias_ptr, inverse_temperature, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
        else:
            x = tl.where(z == float("-inf"), z, z * (logit_scale * inverse_temperature))
        m, totals, centreds = add_block(m, totals, centreds, x)
    for start in range(whole, num_columns, BLOCK):  # the last block, where it is not whole
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + column, mask=column < z_stride, other=0.0)
        x, _ = to_logits(z, column, column < num_columns, bias_ptr, inverse_temperature, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
        m, totals, centreds = add_block(m, totals, centreds, x)
    tl.store(m_ptr + row, m)
    tl.store(total_ptr + row, tl.sum(totals, axis=0))
    tl.store(centred_ptr + row, tl.sum(centreds, axis=0))


def row_sums(z: Tensor, constants: TileConstants, tiles: Tiles = TILES) -> RunningSums:
    """Sums of each row of z over the columns that were not removed."""
    sums = RunningSums(m=row_vector(z), l=row_vector(z), t=row_vector(z))
    row_sums_kernel[(z.shape[0],)](
        z, z.stride(0), sums.m, sums.l, sums.t, z.shape[1], **constants.arguments(), BLOCK=tiles.block, num_warps=tiles.warps
    )
    return sums


@triton.jit
def dense_dz_kernel(
    z_ptr, z_stride, dz_ptr, dz_stride, num_columns, reference_ptr, scale_ptr, slope_ptr,
    inverse_temperature_ptr, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SLOPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z_row = z_ptr + row_offset(row, z_stride)
    dz_row = dz_ptr + row_offset(row, dz_stride)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    reference = tl.load(reference_ptr + row)
    scale = tl.load(scale_ptr + row)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + column, mask=column < z_stride, other=0.0)
        x, bend = to_logits(z, column, column < num_columns, bias_ptr, inverse_temperature, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
        kept = x != float("-inf")
        offset = tl.where(kept, x - reference, 0.0)
        offset = tl.where(offset > 0.0, 0.0, offset)  # only chosen columns, soon overwritten, can lie above the reference
        factor = scale
        if HAS_SLOPE:
            factor += tl.load(slope_ptr + row) * offset
        dz = tl.where(kept, tl.exp(offset) * factor * bend, 0.0)
        tl.debug_barrier()  # dz may lie over z, never ahead of it: a block is read whole before any of it is written
        tl.store(dz_row + column, rounded(dz, dz_ptr.dtype.element_ty), mask=column < z_stride)


def dense_dz(z: Tensor, dz: Tensor, coefficients: Coefficients, constants: TileConstants, tiles: Tiles = TILES) -> None:
    """Writes the loss's derivative by z into dz as if no column were chosen, rounded once to dz's dtype; the padding becomes 0.

    dz may be a view of z's own memory, whose rows begin where z's do.
    """
    slope = coefficients.slope
    dense_dz_kernel[(z.shape[0],)](
        z, z.stride(0), dz, dz.stride(0), z.shape[1],
        coefficients.reference, coefficients.scale, coefficients.scale if slope is None else slope,
        **constants.arguments(), HAS_SLOPE=slope is not None, BLOCK=tiles.block, num_warps=tiles.warps,
    )  # fmt: skip


@triton.jit
def scale_kernel(in_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr):
    place = row_offset(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
    value = tl.load(in_ptr + place, mask=place < size, other=0.0) * tl.load(factor_ptr)
    tl.store(out_ptr + place, rounded(value, out_ptr.dtype.element_ty), mask=place < size)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor (a tensor of one element) in `dtype`, rounded once, in one pass."""
    out = torch.empty_like(gradient, dtype=dtype)
    block = 4096
    scale_kernel[(triton.cdiv(gradient.numel(), block),)](gradient, factor.float(), out, gradient.numel(), BLOCK=block, num_warps=8)
    return out


def row_vector(z: Tensor) -> Tensor:
    """Uninitialised fp32 [C]."""
    return torch.empty(z.shape[0], dtype=torch.float32, device=z.device)


def lanes_of(ids: Tensor) -> int:
    """Lanes of a program that holds one row of ids."""
    return triton.next_power_of_2(max(ids.shape[1], 2))


def warps_of(ids: Tensor) -> int:
    """Warps of a program that holds one row of ids."""
    return min(8, max(1, lanes_of(ids) // 64))
