"""Triton kernels of the exact top-k of a row, and of the sums over what it leaves out, over an fp32 tile z [C, columns].

Columns are taken in groups. The k groups of largest maxima (ties to the lower group) contain the k largest columns (ties to the lower
column): each group before them holds an element before any of theirs. So one pass over z keeps three numbers a group, and the selection
visits k groups instead of the row. Values and positions travel as one int64 key whose descending order is the wanted one; keys differ,
so that the order is total and the result deterministic. Each step is its own launch: no program reads what it has written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_kernels.row_kernels import TILES, TileConstants, Tiles, fold, row_offset, row_vector, to_logits
from opd_kernels.selection import RunningSums

NO_KEY = tl.constexpr(-(2**63) + 1)  # sorts after every key
NEGATIVE_INFINITY_CODE = tl.constexpr(-2139095041)
NAN_CODE = tl.constexpr(2143289344)
LOW_HALF = tl.constexpr(2**32 - 1)
LEAST_GROUP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TopColumns:
    """The k largest columns of each row, in order, and the sums over all others."""

    x: Tensor  # [C, k] fp32; -inf where a row has fewer columns
    columns: Tensor  # [C, k] int64; -1 where a row has fewer columns
    rest: RunningSums
    redo: Tensor  # [C] bool: too many equal logits, or fewer than k finite ones; the row's other entries are not to be used


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSums:
    """What one pass over a tile keeps of each group of columns, [C, groups] each."""

    code: Tensor  # int32, `order_code` of the largest logit
    total: Tensor  # fp32 sum of exp(x - largest)
    centred: Tensor  # fp32 sum of exp(x - largest) * (x - largest)


@triton.jit
def order_code(x):
    """int32 whose order is that of x; both zeros are equal and every NaN is the largest."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == 0.0, 0, bits)
    bits = tl.where(x != x, NAN_CODE, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_of(code, position):
    return (code.to(tl.int64) << 32) | (position.to(tl.int64) ^ LOW_HALF)


@triton.jit
def value_of(code):
    return (code ^ ((code >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def group_sums_kernel(
    z_ptr, z_stride, code_ptr, total_ptr, centred_ptr, num_columns, num_groups,
    inverse_temperature_ptr, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    z = tl.load(z_ptr + row_offset(row, z_stride) + column, mask=column < z_stride, other=0.0)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    x, _ = to_logits(z, column, column < num_columns, bias_ptr, inverse_temperature, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    code = tl.max(order_code(x), axis=1)
    m = value_of(code)
    spread = x - tl.where(m == float("-inf"), 0.0, m)[:, None]
    weight = tl.exp(spread)
    spread = tl.where(x == float("-inf"), 0.0, spread)
    place = row_offset(row, num_groups) + group
    tl.store(code_ptr + place, code, mask=group < num_groups)
    tl.store(total_ptr + place, tl.sum(weight, axis=1), mask=group < num_groups)
    tl.store(centred_ptr + place, tl.sum(weight * spread, axis=1), mask=group < num_groups)


@triton.jit
def top_groups_kernel(code_ptr, group_ptr, cut_ptr, num_groups, k, LANES: tl.constexpr, TOP: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    code = tl.load(code_ptr + row_offset(row, num_groups) + lane, mask=lane < num_groups, other=0)
    key = tl.where(lane < num_groups, key_of(code, lane), NO_KEY)
    top = tl.topk(key, TOP)
    rank = tl.arange(0, TOP)
    tl.store(group_ptr + row_offset(row, k) + rank, ((top & LOW_HALF) ^ LOW_HALF).to(tl.int32), mask=rank < k)
    tl.store(cut_ptr + row, tl.sum(tl.where(rank == k - 1, top, 0), axis=0))


@triton.jit
def compact_kernel(
    z_ptr, z_stride, group_ptr, cut_ptr, key_ptr, count_ptr, num_columns, k,
    inverse_temperature_ptr, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    least_code = (tl.load(cut_ptr + row) >> 32).to(tl.int32)
    count = 0
    for start in range(0, k, GROUPS):
        slot = start + tl.arange(0, GROUPS)
        group = tl.load(group_ptr + row_offset(row, k) + slot, mask=slot < k, other=0)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        valid = (slot < k)[:, None] & (column < num_columns)
        z = tl.load(z_ptr + row_offset(row, z_stride) + column, mask=valid, other=0.0)
        x, _ = to_logits(z, column, valid, bias_ptr, inverse_temperature, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
        code = order_code(x)
        kept = tl.reshape(valid & (code >= least_code), [GROUPS * GROUP]).to(tl.int32)
        key = tl.reshape(key_of(code, column), [GROUPS * GROUP])
        place = count + tl.cumsum(kept, axis=0) - kept
        tl.store(key_ptr + row_offset(row, ROOM) + place, key, mask=(kept > 0) & (place < ROOM))
        count += tl.sum(kept, axis=0)
    tl.store(count_ptr + row, count)


@triton.jit
def top_columns_kernel(key_ptr, count_ptr, x_ptr, column_ptr, last_ptr, redo_ptr, k, ROOM: tl.constexpr, TOP: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, ROOM)
    count = tl.load(count_ptr + row)
    key = tl.load(key_ptr + row_offset(row, ROOM) + lane, mask=lane < count, other=NO_KEY)
    top = tl.topk(key, TOP)
    rank = tl.arange(0, TOP)
    place = row_offset(row, k) + rank
    tl.store(x_ptr + place, value_of((top >> 32).to(tl.int32)), mask=rank < k)
    tl.store(column_ptr + place, (top & LOW_HALF) ^ LOW_HALF, mask=rank < k)
    last = tl.sum(tl.where(rank == k - 1, top, 0), axis=0)
    tl.store(last_ptr + row, last)
    redo = (count > ROOM) | ((last >> 32) <= NEGATIVE_INFINITY_CODE)
    tl.store(redo_ptr + row, redo.to(tl.int32))


@triton.jit
def rest_sums_kernel(
    z_ptr, z_stride, code_ptr, total_ptr, centred_ptr, group_ptr, cut_ptr, last_ptr, rest_m_ptr, rest_total_ptr, rest_centred_ptr,
    num_columns, num_groups, k, inverse_temperature_ptr, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    lane = tl.arange(0, LANES)
    place = row_offset(row, num_groups) + lane
    code = tl.load(code_ptr + place, mask=lane < num_groups, other=0)
    unvisited = (lane < num_groups) & (key_of(code, lane) < tl.load(cut_ptr + row))
    group_m = tl.where(unvisited, value_of(code), float("-inf"))
    group_total = tl.load(total_ptr + place, mask=unvisited, other=0.0)
    group_centred = tl.load(centred_ptr + place, mask=unvisited, other=0.0)
    m = tl.max(group_m, axis=0)
    shift = tl.where(group_m == float("-inf"), 0.0, group_m - tl.where(m == float("-inf"), 0.0, m))
    scale = tl.exp(shift)
    total = tl.sum(group_total * scale, axis=0)
    centred = tl.sum((group_centred + shift * group_total) * scale, axis=0)
    last = tl.load(last_ptr + row)
    for start in range(0, k, GROUPS):
        slot = start + tl.arange(0, GROUPS)
        group = tl.load(group_ptr + row_offset(row, k) + slot, mask=slot < k, other=0)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        valid = (slot < k)[:, None] & (column < num_columns)
        z = tl.load(z_ptr + row_offset(row, z_stride) + column, mask=valid, other=0.0)
        x, _ = to_logits(z, column, valid, bias_ptr, inverse_temperature, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
        x = tl.where(key_of(order_code(x), column) < last, x, float("-inf"))
        m, total, centred = fold(m, total, centred, tl.reshape(x, [GROUPS * GROUP]))
    tl.store(rest_m_ptr + row, m)
    tl.store(rest_total_ptr + row, total)
    tl.store(rest_centred_ptr + row, centred)


def group_size(num_columns: int, k: int, tiles: Tiles = TILES) -> int | None:
    """Columns of a group for a top-k, so that at least 2 k groups exist; None where no size allows that."""
    size = tiles.group
    while size > LEAST_GROUP and triton.cdiv(num_columns, size) < 2 * k:
        size //= 2
    return size if triton.cdiv(num_columns, size) >= 2 * k else None


def empty_groups(z: Tensor, group: int) -> GroupSums:
    """Uninitialised, for groups of `group` columns of z."""
    shape = (z.shape[0], triton.cdiv(z.shape[1], group))
    return GroupSums(code=z.new_empty(shape, dtype=torch.int32), total=z.new_empty(shape), centred=z.new_empty(shape))


def group_sums(z: Tensor, group: int, constants: TileConstants, tiles: Tiles = TILES) -> GroupSums:
    """Statistics of the logits of each row of z by groups of `group` columns (see `group_size`)."""
    sums, groups = empty_groups(z, group), max(1, tiles.block // group)
    num_groups = sums.code.shape[1]
    group_sums_kernel[(z.shape[0], triton.cdiv(num_groups, groups))](
        z, z.stride(0), sums.code, sums.total, sums.centred, z.shape[1], num_groups, **constants.arguments(),
        GROUP=group, GROUPS=groups, num_warps=tiles.warps,
    )  # fmt: skip
    return sums


def top_columns(z: Tensor, k: int, group: int, constants: TileConstants, tiles: Tiles = TILES) -> TopColumns:
    """The k largest columns of each row of z and the sums over the others, by groups of `group` columns (see `group_size`)."""
    return top_of_groups(z, group_sums(z, group, constants, tiles), k, group, constants, tiles)


def top_of_groups(z: Tensor, sums: GroupSums, k: int, group: int, constants: TileConstants, tiles: Tiles = TILES) -> TopColumns:
    """`top_columns` from the statistics of z's groups; of z it reads k groups a row."""
    rows, num_columns = z.shape
    num_groups = sums.code.shape[1]
    lanes, top = triton.next_power_of_2(num_groups), triton.next_power_of_2(max(k, 2))
    room = 4 * top
    visit = max(1, min(top, tiles.block // (2 * group)))
    group_id, cut = z.new_empty((rows, k), dtype=torch.int32), z.new_empty(rows, dtype=torch.int64)
    keys, count = z.new_empty((rows, room), dtype=torch.int64), z.new_empty(rows, dtype=torch.int32)
    x, columns = z.new_empty((rows, k)), z.new_empty((rows, k), dtype=torch.int64)
    last, redo = z.new_empty(rows, dtype=torch.int64), z.new_empty(rows, dtype=torch.int32)
    rest = RunningSums(m=row_vector(z), l=row_vector(z), t=row_vector(z))
    shared = constants.arguments()
    grid = (rows,)
    top_groups_kernel[grid](sums.code, group_id, cut, num_groups, k, LANES=lanes, TOP=top, num_warps=tiles.warps)
    compact_kernel[grid](
        z, z.stride(0), group_id, cut, keys, count, num_columns, k, **shared, GROUP=group, GROUPS=visit, ROOM=room, num_warps=tiles.warps
    )
    top_columns_kernel[grid](keys, count, x, columns, last, redo, k, ROOM=room, TOP=top, num_warps=4)
    rest_sums_kernel[grid](
        z, z.stride(0), sums.code, sums.total, sums.centred, group_id, cut, last, rest.m, rest.l, rest.t, num_columns, num_groups, k,
        **shared, GROUP=group, GROUPS=visit, LANES=lanes, num_warps=tiles.warps,
    )  # fmt: skip
    return TopColumns(x=x, columns=columns, rest=rest, redo=redo.bool())
