"""A prototype that a measurement must justify: the product hidden @ weight.T and the top-k's group statistics in one Triton kernel.

It computes what a cuBLAS product followed by `triton_topk.group_sums` computes, reading no logit back: the statistics are formed while a
tile of products is still in registers. `gpu_fused_product.py` measures it. Nothing in opd_kernels uses it; in the scorer the chosen
column of a row is removed before the statistics, so there the group of that column would have to be summed again.

One program a tile, in an order in which `swath` tiles of rows meet a tile of the weight while it is in the L2 cache. A persistent grid
that goes on loading through a tile's statistics (`tl.range(..., flatten=True)`) compiles, but ptxas of CUDA 12.8 and 13.4 then runs the
tensor core's instructions one after another (its note C7515). Where two programs fit an SM, one multiplies while the other sums.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from opd_kernels.row_kernels import TileConstants, row_offset, to_logits
from opd_kernels.triton_topk import GroupSums, order_code
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_OF_E = tl.constexpr(1.4426950408889634)
NO_SPREAD = tl.constexpr(-1e4)  # stands for -inf, whose weight is 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchShape:
    """Launch shape of the fused product, all counts; `rows` x `columns` products are a program's tile, `depth` of hidden a step."""

    rows: int
    columns: int
    depth: int = 64
    warps: int = 8
    stages: int  # steps whose operands are in shared memory
    swath: int = 16  # tiles of rows that share a tile of the weight

    def name(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}, {self.warps} warps, {self.stages} stages, swath {self.swath}"


SHAPES = (
    LaunchShape(rows=128, columns=256, stages=3),
    LaunchShape(rows=128, columns=256, stages=4),
    LaunchShape(rows=128, columns=256, stages=4, swath=8),
    LaunchShape(rows=128, columns=256, depth=128, stages=2),
    LaunchShape(rows=256, columns=128, stages=3),
    LaunchShape(rows=256, columns=128, stages=4),
    LaunchShape(rows=128, columns=128, stages=3),  # two programs fit an SM, as of the next
    LaunchShape(rows=128, columns=128, warps=4, stages=3),
)


@triton.jit
def larger(left, right):
    """The larger of two numbers; NaN is the largest."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def logits_of_tile(
    z, column, num_columns, inverse_temperature, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """x of a tile of products, the bits of `to_logits`; -inf beyond the last column."""
    WIDTH: tl.constexpr = z.shape[1]
    columns = (column + tl.arange(0, WIDTH))[None, :]
    if HAS_BIAS or HAS_SOFTCAP or HAS_SCALE:
        x, _ = to_logits(
            z, columns, columns < num_columns, bias_ptr, inverse_temperature, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP
        )  # fmt: skip
    else:
        if column + WIDTH > num_columns:  # only the last tiles pay for the mask
            z = tl.where(columns < num_columns, z, float("-inf"))
        x = z * inverse_temperature
    return x


@triton.jit
def finish_groups(
    z_tile, z, row, column, code_ptr, total_ptr, centred_ptr, num_rows, num_columns, num_groups, inverse_temperature, bias_ptr,
    softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, STORE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Stores products and statistics of the groups of a tile, one after another: each needs registers and shared memory of its own."""
    HEIGHT: tl.constexpr = z.shape[0]
    WIDTH: tl.constexpr = z.shape[1]
    if WIDTH > GROUP:
        left, right = tl.split(tl.permute(tl.reshape(z, [HEIGHT, 2, WIDTH // 2]), (0, 2, 1)))
        finish_groups(
            z_tile, left, row, column, code_ptr, total_ptr, centred_ptr, num_rows, num_columns, num_groups, inverse_temperature, bias_ptr,
            softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP, HAS_SCALE, STORE, GROUP,
        )  # fmt: skip
        finish_groups(
            z_tile, right, row, column + WIDTH // 2, code_ptr, total_ptr, centred_ptr, num_rows, num_columns, num_groups,
            inverse_temperature, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP, HAS_SCALE, STORE, GROUP,
        )  # fmt: skip
    else:
        if STORE:
            upper, lower = tl.split(tl.permute(tl.reshape(z, [HEIGHT, 2, GROUP // 2]), (0, 2, 1)))  # in halves: less shared memory
            z_tile.store([row, column], upper)
            z_tile.store([row, column + GROUP // 2], lower)
        x = logits_of_tile(
            z, column, num_columns, inverse_temperature[:, None], bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP, HAS_SCALE
        )  # fmt: skip
        m = tl.reduce(x, 1, larger)
        spread = x - tl.where(m == float("-inf"), 0.0, m)[:, None]
        weight = tl.exp2(spread * LOG2_OF_E)  # exp takes five instructions, for results below 2^-126
        spread = tl.maximum(spread, NO_SPREAD)
        rows = row + tl.arange(0, HEIGHT)
        place = row_offset(rows, num_groups) + column // GROUP
        held = rows < tl.where(column < num_columns, num_rows, 0)
        tl.store(code_ptr + place, order_code(m), mask=held)
        tl.store(total_ptr + place, tl.sum(weight, axis=1), mask=held)
        tl.store(centred_ptr + place, tl.sum(weight * spread, axis=1), mask=held)


@triton.jit
def fused_product_kernel(
    hidden_tile, weight_tile, z_tile, code_ptr, total_ptr, centred_ptr, num_rows, num_columns, num_groups,
    inverse_temperature_ptr, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, STORE: tl.constexpr, WIDEN: tl.constexpr,
    HIDDEN: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, SWATH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles_in_swath = SWATH * tl.cdiv(num_columns, WIDTH)
    first = tile // tiles_in_swath * SWATH
    height_of_swath = min(tl.cdiv(num_rows, HEIGHT) - first, SWATH)
    row = (first + tile % tiles_in_swath % height_of_swath) * HEIGHT
    column = tile % tiles_in_swath // height_of_swath * WIDTH
    z = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for depth in range(0, HIDDEN, DEPTH):
        left, right = hidden_tile.load([row, depth]), weight_tile.load([column, depth])
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        z = tl.dot(left, right.T, z)
    rows = row + tl.arange(0, HEIGHT)
    inverse_temperature = tl.load(inverse_temperature_ptr + rows, mask=rows < num_rows, other=1.0)
    finish_groups(
        z_tile, z, row, column, code_ptr, total_ptr, centred_ptr, num_rows, num_columns, num_groups, inverse_temperature, bias_ptr,
        softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP, HAS_SCALE, STORE, GROUP,
    )  # fmt: skip


def fused_product(
    hidden: Tensor, weight: Tensor, z: Tensor, sums: GroupSums, group: int, constants: TileConstants, shape: LaunchShape, *, store: bool = True
) -> None:
    """Writes hidden [C, H] @ weight [V, H].T into z [C, V] fp32 and the statistics of its logits, by groups of columns, into `sums`.

    hidden and weight are of one half precision and contiguous, H a multiple of 8 and z's row stride of 4: TMA moves 16 bytes at least.
    Without `store` z stays as it is, which shows what storing costs.
    """
    (num_rows, hidden_size), num_columns = hidden.shape, z.shape[1]
    assert hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16) and weight.shape == (num_columns, hidden_size)
    assert shape.columns % group == 0 and sums.code.is_contiguous()
    tiles = triton.cdiv(num_rows, shape.rows) * triton.cdiv(num_columns, shape.columns)
    fused_product_kernel[(tiles,)](
        TensorDescriptor.from_tensor(hidden, [shape.rows, shape.depth]), TensorDescriptor.from_tensor(weight, [shape.columns, shape.depth]),
        TensorDescriptor.from_tensor(z, [shape.rows, group // 2]), sums.code, sums.total, sums.centred,
        num_rows, num_columns, sums.code.shape[1], **constants.arguments(), HAS_SCALE=constants.logit_scale != 1.0,
        STORE=store, WIDEN=triton.knobs.runtime.interpret, HIDDEN=hidden_size, GROUP=group, HEIGHT=shape.rows, WIDTH=shape.columns,
        DEPTH=shape.depth, SWATH=shape.swath, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
