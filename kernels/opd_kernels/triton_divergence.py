"""Triton row kernels of the dense divergences, over the fp32 product tiles of a student and a teacher [C, columns].

With p = exp(lp) the student and q = exp(lq) the teacher, D = sum of value(lp, lq) and u = d value / d lp, a row's gradient is
dx = u - p * sum(u). Log-ratios to a mixture come from d = lq - lp, so that they keep their digits where the two distributions agree.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from opd_kernels.row_kernels import TILES, TileConstants, Tiles, rounded, row_offset, row_vector, to_logits
from opd_kernels.types import Divergence

KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_forward_kl": 3, "skew_reverse_kl": 4}
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
SKEW_FORWARD_KL = tl.constexpr(3)
FLOOR = tl.constexpr(-1e4)  # least log-probability
LOG2_OF_E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693145751953125)  # few bits: its products with exponents are exact
LN2_LOW = tl.constexpr(1.42860677e-06)
ROOT_OF_HALF_BITS = tl.constexpr(0x3F3504F3)
EXPONENT_MASK = tl.constexpr(-8388608)  # all but the 23 bits of the mantissa
PER_EXPONENT = tl.constexpr(1.1920928955078125e-07)  # 2^-23
MAX_RATIO = tl.constexpr(80.0)  # exp of more overflows; the smaller probability is below 1e-34 there


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductTile:
    """One model's products, what turns them into logits, and its log-normaliser."""

    z: Tensor  # [C, columns] fp32
    constants: TileConstants
    logz: Tensor  # [C]

    def arguments(self, suffix: str) -> dict[str, Any]:
        values = self.constants.arguments()
        temperature = values.pop("inverse_temperature_ptr")
        values |= {"z_ptr": self.z, "z_stride": self.z.stride(0), "logz_ptr": self.logz}
        return {_suffixed(name, suffix): value for name, value in values.items()} | {"inverse_temperature_ptr": temperature}


def _suffixed(name: str, suffix: str) -> str:
    return f"{name}_{suffix.upper()}" if name.isupper() else f"{name}_{suffix}"


@triton.jit
def log_probability(x, logz):
    logp = x - logz
    return tl.where(logp < FLOOR, FLOOR, logp)


@triton.jit
def exponential(x):
    """exp(x) in two instructions on a GPU where tl.exp takes five, for results below 2^-126."""
    return tl.exp2(x * LOG2_OF_E)


@triton.jit
def exp_minus_1(d):
    """exp(d) - 1 with its relative accuracy near 0 (Taylor to the sixth power, 2e-8 at 1/4); no device library."""
    series = d * (1.0 + d * (1.0 / 2 + d * (1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120 + d * (1.0 / 720))))))
    return tl.where(tl.abs(d) < 0.25, series, exponential(d) - 1.0)


@triton.jit
def reciprocal(d):
    """1 / d for d in [1, 4]: the square of its reciprocal root, which is one instruction, and a step of Newton's."""
    root = tl.rsqrt(d)
    first = root * root
    return first * (2.0 - d * first)


@triton.jit
def log_of_1_plus(y):
    """log(1 + y) for finite y >= -1 with its relative accuracy near 0: 2 atanh(g / (2 + g)) for 1 + g the mantissa of 1 + y, 3e-7.

    tl.log is a function of 27 instructions on a GPU, and would still lose the digits near 0.
    """
    bits = (1.0 + y).to(tl.int32, bitcast=True)
    exponent = (bits - ROOT_OF_HALF_BITS) & EXPONENT_MASK
    mantissa = (bits - exponent).to(tl.float32, bitcast=True)
    g = tl.where(exponent == 0, y, mantissa - 1.0)  # in [-0.3, 0.42]
    s = g * reciprocal(2.0 + g)
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7 + s2 * (1.0 / 9)))))
    power = exponent.to(tl.float32) * PER_EXPONENT
    return power * LN2_HIGH + (power * LN2_LOW + series) + (y - y)  # y - y: NaN stays NaN


@triton.jit
def entry_of(lp, lq, mix, alpha, entry_clip, KIND: tl.constexpr, HAS_CLIP: tl.constexpr):
    """(value, slope) of each vocabulary entry, as in `divergence_maths`; a clipped entry counts entry_clip and has no slope.

    Without a clip the value carries a term that sums to zero over the row and the slope one that is a multiple of p: sums of small
    terms of one sign instead of large ones of both, which keeps the digits where student and teacher agree.
    """
    p = exponential(lp)
    q = exponential(lq)
    gap = p - q
    if KIND == FORWARD_KL:
        value = q * (lq - lp)
        slope = -q if HAS_CLIP else gap
        balance = gap
    elif KIND == REVERSE_KL:
        value = p * (lp - lq)
        slope = value + p if HAS_CLIP else value
        balance = -gap
    else:
        ratio = tl.where(lq - lp > MAX_RATIO, MAX_RATIO, lq - lp)
        excess = exp_minus_1(ratio)  # q / p - 1
        if KIND == JSD:
            log_share = log_of_1_plus(mix * excess)  # of m / p
            slope = -(1.0 - mix) * p * log_share
            value = mix * q * (ratio - log_share) + slope
            balance = tl.zeros_like(gap)
        elif KIND == SKEW_FORWARD_KL:
            value = q * (ratio - log_of_1_plus(alpha * excess))
            slope = (1.0 - alpha) * (-q if HAS_CLIP else (1.0 - alpha) * gap) / (1.0 + alpha * excess)
            balance = (1.0 - alpha) * gap
        else:
            share = 1.0 + (1.0 - alpha) * excess
            value = -p * log_of_1_plus((1.0 - alpha) * excess)
            slope = value + (1.0 - alpha) * (p * (1.0 + excess) if HAS_CLIP else -alpha * gap) / share
            balance = -(1.0 - alpha) * gap
    if HAS_CLIP:
        slope = tl.where(value > entry_clip, 0.0, slope)
        value = tl.where(value > entry_clip, entry_clip, value)
    else:
        value += balance
    return value, slope


@triton.jit
def divergence_value_kernel(
    z_ptr_s, z_stride_s, logz_ptr_s, bias_ptr_s, softcap_s, logit_scale_s,
    z_ptr_t, z_stride_t, logz_ptr_t, bias_ptr_t, softcap_t, logit_scale_t,
    inverse_temperature_ptr, value_ptr, slope_ptr, num_columns, mix, alpha, entry_clip,
    HAS_BIAS_S: tl.constexpr, HAS_SOFTCAP_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_SOFTCAP_T: tl.constexpr,
    KIND: tl.constexpr, HAS_CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    logz_s = tl.load(logz_ptr_s + row)
    logz_t = tl.load(logz_ptr_t + row)
    row_s = z_ptr_s + row_offset(row, z_stride_s)
    row_t = z_ptr_t + row_offset(row, z_stride_t)
    total = 0.0
    total_slope = 0.0
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        valid = column < num_columns
        z_s = tl.load(row_s + column, mask=column < z_stride_s, other=0.0)
        z_t = tl.load(row_t + column, mask=column < z_stride_t, other=0.0)
        x_s, _ = to_logits(z_s, column, valid, bias_ptr_s, inverse_temperature, softcap_s, logit_scale_s, HAS_BIAS_S, HAS_SOFTCAP_S)
        x_t, _ = to_logits(z_t, column, valid, bias_ptr_t, inverse_temperature, softcap_t, logit_scale_t, HAS_BIAS_T, HAS_SOFTCAP_T)
        lp, lq = log_probability(x_s, logz_s), log_probability(x_t, logz_t)
        value, slope = entry_of(lp, lq, mix, alpha, entry_clip, KIND, HAS_CLIP)
        total += tl.sum(tl.where(valid, value, 0.0), axis=0)
        total_slope += tl.sum(tl.where(valid, slope, 0.0), axis=0)
    tl.store(value_ptr + row, total)
    tl.store(slope_ptr + row, total_slope)


@triton.jit
def divergence_dz_kernel(
    z_ptr_s, z_stride_s, logz_ptr_s, bias_ptr_s, softcap_s, logit_scale_s,
    z_ptr_t, z_stride_t, logz_ptr_t, bias_ptr_t, softcap_t, logit_scale_t,
    inverse_temperature_ptr, dz_ptr, dz_stride, slope_ptr, scale_ptr, num_columns, mix, alpha, entry_clip,
    HAS_BIAS_S: tl.constexpr, HAS_SOFTCAP_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_SOFTCAP_T: tl.constexpr,
    KIND: tl.constexpr, HAS_CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_s = z_ptr_s + row_offset(row, z_stride_s)
    row_t = z_ptr_t + row_offset(row, z_stride_t)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    logz_s = tl.load(logz_ptr_s + row)
    logz_t = tl.load(logz_ptr_t + row)
    row_slope = tl.load(slope_ptr + row)
    scale = tl.load(scale_ptr + row)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        valid = column < num_columns
        z_s = tl.load(row_s + column, mask=column < z_stride_s, other=0.0)
        z_t = tl.load(row_t + column, mask=column < z_stride_t, other=0.0)
        x_s, bend = to_logits(z_s, column, valid, bias_ptr_s, inverse_temperature, softcap_s, logit_scale_s, HAS_BIAS_S, HAS_SOFTCAP_S)
        x_t, _ = to_logits(z_t, column, valid, bias_ptr_t, inverse_temperature, softcap_t, logit_scale_t, HAS_BIAS_T, HAS_SOFTCAP_T)
        lp, lq = log_probability(x_s, logz_s), log_probability(x_t, logz_t)
        _, slope = entry_of(lp, lq, mix, alpha, entry_clip, KIND, HAS_CLIP)
        dz = tl.where(x_s == float("-inf"), 0.0, (slope - exponential(lp) * row_slope) * scale * bend)
        tl.debug_barrier()  # dz may lie over z_s, as in `row_kernels.dense_dz`
        target = dz_ptr + row_offset(row, dz_stride) + column
        tl.store(target, rounded(dz, dz_ptr.dtype.element_ty), mask=column < z_stride_s)


def divergence_rows(student: ProductTile, teacher: ProductTile, divergence: Divergence, tiles: Tiles = TILES) -> tuple[Tensor, Tensor]:
    """(D, sum of the slopes) of each row over the tiles' columns, [C] fp32 each."""
    value, slope = row_vector(student.z), row_vector(student.z)
    divergence_value_kernel[(student.z.shape[0],)](
        **student.arguments("s"), **_teacher(teacher), value_ptr=value, slope_ptr=slope, num_columns=student.z.shape[1],
        **_rule(divergence), BLOCK=tiles.block, num_warps=tiles.warps,
    )  # fmt: skip
    return value, slope


def divergence_dz(
    student: ProductTile, teacher: ProductTile, divergence: Divergence, slope: Tensor, scale: Tensor, dz: Tensor, tiles: Tiles = TILES
) -> None:
    """Writes scale * d D / d z of the student into dz, rounded once to its dtype; `slope` [C] is the row's sum over all columns.

    dz may be a view of the student's z, whose rows begin where its do.
    """
    divergence_dz_kernel[(student.z.shape[0],)](
        **student.arguments("s"), **_teacher(teacher), dz_ptr=dz, dz_stride=dz.stride(0), slope_ptr=slope, scale_ptr=scale,
        num_columns=student.z.shape[1], **_rule(divergence), BLOCK=tiles.block, num_warps=tiles.warps,
    )  # fmt: skip


def _teacher(teacher: ProductTile) -> dict[str, Any]:
    values = teacher.arguments("t")
    del values["inverse_temperature_ptr"]  # one temperature for both, passed with the student's
    return values


def _rule(divergence: Divergence) -> dict[str, Any]:
    """The kernels' keywords for a divergence; a skew of 0 is the plain divergence, which has no bounded ratio."""
    name = divergence.name.removeprefix("skew_") if divergence.alpha == 0.0 else divergence.name
    return {
        "mix": divergence.mix,
        "alpha": divergence.alpha,
        "entry_clip": 0.0 if divergence.entry_clip is None else divergence.entry_clip,
        "KIND": KINDS[name],
        "HAS_CLIP": divergence.entry_clip is not None,
    }
