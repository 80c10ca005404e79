"""A prototype that a measurement must justify: `triton_topk.group_sums` with fewer instructions a logit, which bound the library's pass.

It takes the order code of a group's maximum instead of the maximum of codes, exp2 for exp (one instruction for four), no mask where all
columns exist, and has 8 lanes share a group instead of 32: fewer shuffles. `gpu_fused_product.py` measures it beside the fused product.
"""

import triton
import triton.language as tl
from fused_product import LOG2_OF_E, NO_SPREAD, larger
from opd_kernels.row_kernels import TILES, TileConstants, Tiles, row_offset, to_logits
from opd_kernels.triton_topk import GroupSums, empty_groups, order_code
from torch import Tensor

PART = 32  # columns that 8 lanes load at 16 bytes each


@triton.jit
def joined_parts(start, WIDTH: tl.constexpr, PART: tl.constexpr):
    """Columns [groups, WIDTH] of the groups that begin at `start` [groups, 1], in an order in which a lane keeps one of each part."""
    if WIDTH == PART:
        columns = start + tl.arange(0, PART)[None, :]
    else:
        left, right = joined_parts(start, WIDTH // 2, PART), joined_parts(start + WIDTH // 2, WIDTH // 2, PART)
        columns = tl.reshape(tl.join(left, right), [start.shape[0], WIDTH])
    return columns


@triton.jit
def load_parts(z_row, start, num_columns, MASKED: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
    """Products at `joined_parts`, loaded a part at a time; -inf beyond the last column where MASKED."""
    if WIDTH == PART:
        columns = start + tl.arange(0, PART)[None, :]
        if MASKED:
            z = tl.load(z_row + columns, mask=columns < num_columns, other=float("-inf"))
        else:
            z = tl.load(z_row + columns)
    else:
        left = load_parts(z_row, start, num_columns, MASKED, WIDTH // 2, PART)
        right = load_parts(z_row, start + WIDTH // 2, num_columns, MASKED, WIDTH // 2, PART)
        z = tl.reshape(tl.join(left, right), [start.shape[0], WIDTH])
    return z


@triton.jit
def lean_group_sums_kernel(
    z_ptr, z_stride, code_ptr, total_ptr, centred_ptr, num_columns, num_groups, inverse_temperature_ptr, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0), tl.program_id(1) * GROUPS
    group = first + tl.arange(0, GROUPS)
    start = group[:, None] * GROUP
    z_row = z_ptr + row_offset(row, z_stride)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    if (first + GROUPS) * GROUP > num_columns:
        z = load_parts(z_row, start, num_columns, True, GROUP, PART)
    else:
        z = load_parts(z_row, start, num_columns, False, GROUP, PART)
    if HAS_BIAS or HAS_SOFTCAP or HAS_SCALE:
        column = joined_parts(start, GROUP, PART)
        x, _ = to_logits(z, column, column < num_columns, bias_ptr, inverse_temperature, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    else:
        x = z * inverse_temperature
    m = tl.reduce(x, 1, larger)
    spread = x - tl.where(m == float("-inf"), 0.0, m)[:, None]
    weight = tl.exp2(spread * LOG2_OF_E)
    spread = tl.maximum(spread, NO_SPREAD)
    place = row_offset(row, num_groups) + group
    held = group < num_groups
    tl.store(code_ptr + place, order_code(m), mask=held)
    tl.store(total_ptr + place, tl.sum(weight, axis=1), mask=held)
    tl.store(centred_ptr + place, tl.sum(weight * spread, axis=1), mask=held)


def lean_group_sums(z: Tensor, group: int, constants: TileConstants, tiles: Tiles = TILES) -> GroupSums:
    """As `triton_topk.group_sums`: the same codes, sums in another order."""
    sums, groups = empty_groups(z, group), max(1, tiles.block // group)
    num_groups = sums.code.shape[1]
    lean_group_sums_kernel[(z.shape[0], triton.cdiv(num_groups, groups))](
        z, z.stride(0), sums.code, sums.total, sums.centred, z.shape[1], num_groups, **constants.arguments(),
        HAS_SCALE=constants.logit_scale != 1.0, GROUP=group, GROUPS=groups, PART=min(PART, group), num_warps=tiles.warps,
    )  # fmt: skip
    return sums
