"""Every row kernel alone, in the interpreter: ragged shapes, stores in place, infinities, 64-bit offsets. Outputs start as NaN."""

import re
from dataclasses import replace
from pathlib import Path

import opd_kernels
import pytest
import torch
import triton
import triton.language as tl
from opd_kernels import divergences, row_kernels, triton_divergence, triton_rows, triton_topk
from opd_kernels.divergence_maths import entries
from opd_kernels.row_kernels import TileConstants
from opd_kernels.selection import Coefficients

from tests.kernels.triton_cases import TILES, Guarded, constants, logits

NEG_INF = float("-inf")
HEADS = {"plain": {}, "bias": {"bias": True}, "softcap": {"softcap": 4.0, "scale": 0.7}, "all": {"bias": True, "softcap": 9.0, "scale": -1.3}}
COLUMNS = (1, 63, 64, 65, 130)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN (or the largest integer), so that an entry no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def products(rows: int, columns: int, seed: int = 0, **guards) -> Guarded:
    guarded = Guarded(rows, columns, **guards)
    guarded.tile.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 6)
    return guarded


def chosen(rows: int, columns: int, count: int, first_column: int) -> torch.Tensor:
    """Ids inside and outside the tile, pads, a duplicate, and the tile's two edges."""
    ids = torch.randint(-1, first_column + columns + 9, (rows, count), generator=torch.Generator().manual_seed(1))
    ids[0, :2] = torch.tensor([first_column, first_column + columns - 1])
    ids[1, :2] = first_column + columns // 2
    ids[2, :2] = torch.tensor([first_column - 1, first_column + columns])
    return ids


def inside(ids: torch.Tensor, columns: int, first_column: int) -> torch.Tensor:
    return (ids >= first_column) & (ids < first_column + columns)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_take_reads_the_chosen_logits_and_removes_them_alone(columns, head):
    z, ids, with_ = products(4, columns), chosen(4, columns, 3, first_column=100), constants(4, columns, **HEADS[head])
    before, held = z.tile.clone(), inside(ids, columns, 100)
    wanted = logits(before, with_).gather(1, torch.where(held, ids - 100, 0))
    x = row_kernels.take(z.tile, ids, with_, 100)
    assert (x.double() - wanted)[held].abs().max() < 5e-6 and (x[~held] == NEG_INF).all()
    for row, slot in held.nonzero().tolist():
        before[row, ids[row, slot] - 100] = NEG_INF
    assert torch.equal(z.tile, before) and z.gaps_hold()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", COLUMNS)
def test_overwrite_stores_the_chosen_columns_alone_and_rounds_once(columns, dtype):
    tile, ids = Guarded(4, columns, dtype), chosen(4, columns, 3, first_column=100)
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    values = values[:, :1].expand(4, 3).contiguous()  # equal ids must have equal values
    row_kernels.overwrite(tile.tile, ids, values, 100)
    wanted = torch.full((4, columns), -77.0, dtype=dtype)
    for row, slot in inside(ids, columns, 100).nonzero().tolist():
        wanted[row, ids[row, slot] - 100] = values[row, slot].to(dtype)
    assert torch.equal(tile.tile, wanted) and tile.gaps_hold()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_row_sums(columns, head):
    z, with_ = products(5, columns), constants(5, columns, **HEADS[head])
    z.tile[0, : columns // 2] = NEG_INF
    z.tile[1] = NEG_INF
    before = z.buffer.clone()
    sums = row_kernels.row_sums(z.tile, with_, TILES)
    x = logits(z.tile, with_)
    m = x.amax(dim=1)
    spread = x - torch.where(m == NEG_INF, 0.0, m)[:, None]
    assert torch.equal(z.buffer, before)
    assert sums.m[1] == NEG_INF and sums.l[1] == 0 and sums.t[1] == 0
    rows = torch.arange(5) != 1
    assert (sums.m.double() - m)[rows].abs().max() < 5e-6
    torch.testing.assert_close(sums.l.double()[rows], spread.exp().sum(dim=1)[rows], rtol=1e-5, atol=0)
    centred = torch.where(spread == NEG_INF, 0.0, spread.exp() * spread).sum(dim=1)
    torch.testing.assert_close(sums.t.double()[rows], centred[rows], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("level", [-3e4, -300.0, 90.0, 3e4])
def test_row_sums_of_logits_far_from_zero(level):
    z = products(3, 130)
    z.tile.add_(level)
    sums = row_kernels.row_sums(z.tile, TileConstants(inverse_temperature=torch.ones(3)), TILES)
    assert torch.equal(sums.m, z.tile.amax(dim=1))
    torch.testing.assert_close(sums.m.double() + sums.l.double().log(), z.tile.double().logsumexp(dim=1), rtol=1e-7, atol=2e-6)


@pytest.mark.parametrize("place", [0, 70, 129])
def test_a_nan_logit_makes_its_row_nan(place):
    z = products(2, 130)
    z.tile[1, place] = float("nan")
    sums = row_kernels.row_sums(z.tile, TileConstants(inverse_temperature=torch.ones(2)), TILES)
    assert sums.l[1].isnan() and sums.t[1].isnan() and sums.l[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_dense_dz(columns, head, dtype):
    z, dz, with_ = products(4, columns), Guarded(4, columns, dtype), constants(4, columns, **HEADS[head])
    z.tile[0, columns // 3] = NEG_INF
    x = logits(z.tile, with_)
    reference = torch.where(x.amax(dim=1) == NEG_INF, 0.0, x.logsumexp(dim=1) + 0.1).float()
    generator = torch.Generator().manual_seed(3)
    scale, slope = torch.randn(4, generator=generator), torch.randn(4, generator=generator)
    for with_slope in (False, True):
        rule = Coefficients(reference=reference, scale=scale, slope=slope if with_slope else None, selected=torch.zeros(4, 1))
        row_kernels.dense_dz(z.tile, dz.tile, rule, with_, TILES)
        offset = x - reference[:, None].double()
        factor = scale[:, None] + (slope[:, None] * torch.where(x == NEG_INF, 0.0, offset) if with_slope else 0.0)
        if with_.softcap is not None:
            factor = factor * (1 - (x / with_.inverse_temperature[:, None] / with_.softcap).square()).nan_to_num()
        wanted = torch.where(x == NEG_INF, 0.0, offset.exp() * factor)
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8 + 1e-5
        assert ((dz.tile.double() - wanted).abs() <= tolerance * wanted.abs() + 2e-6).all() and dz.bands_hold()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", COLUMNS)
def test_gradients_may_be_written_over_the_products(columns, dtype):
    scratch = triton_rows.TileScratch(3, columns, torch.empty(0).device)
    z = scratch.tile(3, columns)
    z.copy_(products(3, columns).tile)
    with_, zeros = constants(3, columns), torch.zeros(3)
    rule = Coefficients(reference=zeros + 9, scale=zeros + 2, slope=None, selected=torch.zeros(3, 1))
    apart, over = torch.empty(3, columns, dtype=dtype), scratch.over(z, dtype)
    student = triton_divergence.ProductTile(z=z.clone(), constants=with_, logz=zeros + 20)
    pair = replace(student, z=z), replace(student, z=products(3, columns, 1).tile)
    row_kernels.dense_dz(z.clone(), apart, rule, with_, TILES)
    before = z.clone()
    row_kernels.dense_dz(z, over, rule, with_, TILES)
    assert torch.equal(over, apart)
    z.copy_(before)
    triton_divergence.divergence_dz(student, pair[1], divergences.jsd(0.3), zeros, zeros + 1, apart, TILES)
    triton_divergence.divergence_dz(*pair, divergences.jsd(0.3), zeros, zeros + 1, over, TILES)
    assert torch.equal(over, apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4095, 4097])
def test_scaled_rounds_once(size, dtype):
    gradient, factor = torch.randn(size, generator=torch.Generator().manual_seed(0)), torch.tensor(0.37)
    assert torch.equal(row_kernels.scaled(gradient, factor, dtype), (gradient * factor).to(dtype))


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_divergence_rows_and_gradients(kind, clip):
    shares = {"jsd": (0.3,), "skew_forward_kl": (0.1,), "skew_reverse_kl": (0.2,)}
    divergence = getattr(divergences, kind)(*shares.get(kind, ()), entry_clip=clip)
    rows, columns = 4, 130
    pair, logp = [], []
    for seed, head in ((5, "all"), (6, "softcap")):
        z, with_ = products(rows, columns, seed), constants(rows, columns, **HEADS[head])
        x = logits(z.tile, with_)
        logp.append(x.log_softmax(dim=1))
        pair.append(triton_divergence.ProductTile(z=z.tile, constants=with_, logz=x.logsumexp(dim=1).float()))
    value, slope = triton_divergence.divergence_rows(*pair, divergence, TILES)
    wanted_value, wanted_slope = entries(divergence, *logp, *(one.exp() for one in logp))
    assert (value - wanted_value.sum(dim=1)).abs().max() < 1e-5 and (slope - wanted_slope.sum(dim=1)).abs().max() < 1e-5
    dz, scale = Guarded(rows, columns), torch.tensor([1.0, -2.0, 0.0, 0.5])
    triton_divergence.divergence_dz(*pair, divergence, slope, scale, dz.tile, TILES)
    bend = 1 - (logits(pair[0].z, pair[0].constants) / pair[0].constants.inverse_temperature[:, None] / 9.0).square()
    wanted = (wanted_slope - logp[0].exp() * wanted_slope.sum(dim=1, keepdim=True)) * scale[:, None] * bend
    assert (dz.tile - wanted).abs().max() < 3e-6 and dz.bands_hold()


@triton.jit
def offset_kernel(row_ptr, stride, out_ptr):
    tl.store(out_ptr, row_kernels.row_offset(tl.load(row_ptr), stride))


def test_row_offsets_are_64_bit():
    out = torch.zeros(1, dtype=torch.int64)
    offset_kernel[(1,)](torch.tensor([70_000], dtype=torch.int32), 151_936, out)
    assert out.item() == 70_000 * 151_936 > 2**33


@pytest.mark.parametrize("module", ["row_kernels", "triton_topk", "triton_divergence"])
def test_no_kernel_multiplies_a_row_by_hand(module):
    source = (Path(opd_kernels.__file__).parent / f"{module}.py").read_text()
    assert source.count("row_offset(") > 3 and not re.search(r"\brow \*|\* row\b|program_id\(0\) \*|atomic_|autotune|libdevice", source)


@triton.jit
def tanh_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(out_ptr + lane, row_kernels.bounded_tanh(tl.load(x_ptr + lane)))


def test_tanh_is_accurate_and_bounded():
    x = torch.cat([torch.linspace(-12, 12, 252), torch.tensor([-1e30, 1e30, 1e-6, -0.0])])
    out = torch.empty_like(x)
    tanh_kernel[(1,)](x, out, SIZE=256)
    assert (out.double() - x.double().tanh()).abs().max() < 2e-7 and out.abs().max() <= 1.0


@triton.jit
def near_zero_kernel(x_ptr, log_ptr, exp_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    x = tl.load(x_ptr + lane)
    tl.store(log_ptr + lane, triton_divergence.log_of_1_plus(x))
    tl.store(exp_ptr + lane, triton_divergence.exp_minus_1(x))


def test_logarithm_and_exponential_keep_their_digits_near_zero():
    sizes = torch.logspace(-12, 0, 121)[:-1]
    edges = torch.tensor([0.5**0.5 - 1, 2**0.5 - 1, 1.0, 3.0, 0.25, -0.25])  # where the mantissa wraps, and where series end
    x = torch.cat([sizes, -sizes, edges, edges.nextafter(torch.tensor(9.0)), torch.tensor([1e3, 1e10, 5.5e34])])
    x = torch.cat([x, torch.zeros(511 - len(x)), torch.tensor([float("nan")])])
    log, exp = torch.empty(512), torch.empty(512)
    near_zero_kernel[(1,)](x, log, exp, SIZE=512)
    exact = x.double()[:-1]
    torch.testing.assert_close(log[:-1].double(), exact.log1p(), rtol=4e-7, atol=0)
    below = exact < 80.0  # of more the result overflows, and is not asked for
    torch.testing.assert_close(exp[:-1].double()[below], exact.expm1()[below], rtol=4e-7, atol=0)
    assert log[-1].isnan() and exp[-1].isnan()


@triton.jit
def code_kernel(x_ptr, code_ptr, value_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    code = triton_topk.order_code(tl.load(x_ptr + lane))
    tl.store(code_ptr + lane, code)
    tl.store(value_ptr + lane, triton_topk.value_of(code))


def test_order_codes_sort_like_values():
    x = torch.tensor([NEG_INF, -3.4e38, -1.0, -1e-42, -0.0, 0.0, 1e-42, 0.5, 1.0, 1.0000001, 3.4e38, float("inf"), float("nan"), -float("nan")])
    x = torch.cat([x, x[2:4]])
    code, value = torch.empty(16, dtype=torch.int32), torch.empty(16)
    code_kernel[(1,)](x, code, value, SIZE=16)
    steps = code[1:14].long() - code[:13].long()
    assert (steps[[3 + 1, 12]] == 0).all() and (steps[[0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]] > 0).all()
    torch.testing.assert_close(value, x, rtol=0, atol=0, equal_nan=True)
    assert code[0] == triton_topk.NEGATIVE_INFINITY_CODE.value and code[12] == triton_topk.NAN_CODE.value


@triton.jit
def round_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(out_ptr + lane, row_kernels.rounded(tl.load(x_ptr + lane), out_ptr.dtype.element_ty))


def test_bf16_is_rounded_to_nearest_even():
    x = torch.randn(512, generator=torch.Generator().manual_seed(0)).exp()
    x[:8] = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, float("inf"), float("nan"), 0.0, 255.9])
    x[8:10] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    out = torch.empty(512, dtype=torch.bfloat16)
    round_kernel[(1,)](x, out, SIZE=512)
    torch.testing.assert_close(out, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
