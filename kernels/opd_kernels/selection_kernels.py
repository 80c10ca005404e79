"""`selection` as two Triton kernels, a program a row: what would be a hundred small launches a chunk becomes one each.

Letters: C rows, K chosen ids a row. Equal ids are found by looping over the row's ids, so that sums over them run in one fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_kernels.row_kernels import lanes_of, row_offset, row_vector, warps_of
from opd_kernels.selection import Coefficients, RunningSums, Upstream
from opd_kernels.triton_divergence import exp_minus_1, log_of_1_plus

MOST_IDS = 512  # a row; with more the loops over ids take longer than the launches that they save
PAD = tl.constexpr(-1e4)  # types.PAD_LOGP, and selection.FLOOR


@triton.jit
def is_first(ids_row, ids, lane, num_ids):
    """True at the first of equal ids of a row, False at pads."""
    seen = ids < 0
    for other in range(0, num_ids):
        seen = seen | ((tl.load(ids_row + other) == ids) & (lane > other))
    return seen == 0


@triton.jit
def finalize_kernel(
    selected_ptr, ids_ptr, m_ptr, l_ptr, t_ptr, logp_ptr, tail_ptr, logz_ptr, entropy_ptr, num_ids, LANES: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    place = row_offset(row, num_ids) + lane
    held = lane < num_ids
    ids = tl.load(ids_ptr + place, mask=held, other=-1)
    selected = tl.load(selected_ptr + place, mask=held, other=float("-inf"))
    m = tl.load(m_ptr + row)
    first = is_first(ids_ptr + row_offset(row, num_ids), ids, lane, num_ids) & held
    chosen = tl.where(first, selected, float("-inf"))
    spoilt = (tl.sum(tl.where(chosen != chosen, 1, 0), axis=0) > 0) | (m != m)  # the maxima below pass over a NaN
    chosen_max = tl.max(chosen, axis=0)
    top = tl.maximum(m, chosen_max)
    dead = (top == float("-inf")) & (spoilt == 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    offset = tl.where(m == float("-inf"), PAD, m - top)
    decay = tl.exp(offset)
    outside = tl.load(l_ptr + row) * decay
    shifted = chosen - top
    mass = tl.exp(shifted)
    largest = tl.min(tl.where(chosen == chosen_max, lane, LANES), axis=0)
    total = tl.sum(mass, axis=0)
    rest = outside + tl.sum(tl.where(lane == largest, 0.0, mass), axis=0)
    log_normalizer = tl.where(chosen_max >= m, log_of_1_plus(rest), tl.log(outside + total))
    log_normalizer = tl.where(dead, 0.0, log_normalizer)
    log_normalizer = tl.where(spoilt, float("nan"), log_normalizer)
    moment = tl.where(outside == 0.0, 0.0, decay * tl.load(t_ptr + row) + outside * offset)
    moment += tl.sum(mass * tl.where(shifted < PAD, PAD, shifted), axis=0)
    tl.store(logp_ptr + place, tl.where(ids < 0, PAD, (selected - top) - log_normalizer), mask=held)
    tl.store(tail_ptr + row, tl.where(m == float("-inf"), float("-inf"), m - top) + tl.log(tl.load(l_ptr + row)) - log_normalizer)
    tl.store(logz_ptr + row, tl.where(dead, float("-inf"), top + log_normalizer))
    tl.store(entropy_ptr + row, tl.where(dead, 0.0, log_normalizer - moment / (outside + total)))


def finalize_rows(selected: Tensor, ids: Tensor, sums: RunningSums) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`selection.finalize`."""
    selected, ids = selected.contiguous(), ids.contiguous()
    logp, tail_logp, logz, entropy = torch.empty_like(selected), row_vector(selected), row_vector(selected), row_vector(selected)
    finalize_kernel[(ids.shape[0],)](
        selected, ids, sums.m, sums.l, sums.t, logp, tail_logp, logz, entropy, ids.shape[1], LANES=lanes_of(ids), num_warps=warps_of(ids)
    )
    return logp, tail_logp, logz, entropy


@triton.jit
def coefficients_kernel(
    ids_ptr, logp_ptr, tail_ptr, logz_ptr, entropy_ptr, g_logp_ptr, g_tail_ptr, g_logz_ptr, g_entropy_ptr, row_scale_ptr,
    reference_ptr, scale_ptr, slope_ptr, selected_ptr, num_ids,
    HAS_LOGP: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_LOGZ: tl.constexpr, HAS_ENTROPY: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    start = row_offset(row, num_ids)
    held = lane < num_ids
    ids = tl.load(ids_ptr + start + lane, mask=held, other=-1)
    logp = tl.load(logp_ptr + start + lane, mask=held, other=PAD)
    logz = tl.load(logz_ptr + row)
    row_scale = tl.load(row_scale_ptr + row)
    dead = logz == float("-inf")
    direct = tl.zeros([LANES], tl.float32)
    a = 0.0
    if HAS_LOGP:
        g_logp = tl.load(g_logp_ptr + start + lane, mask=held, other=0.0)
        a -= tl.sum(tl.where(ids >= 0, g_logp, 0.0), axis=0)
        for other in range(0, num_ids):
            g_other = tl.load(g_logp_ptr + start + other)
            direct += tl.where(tl.load(ids_ptr + start + other) == ids, g_other, 0.0)
    if HAS_LOGZ:
        a += tl.load(g_logz_ptr + row)
    reference = logz
    g_tail = 0.0
    if HAS_TAIL:
        tail = tl.load(tail_ptr + row)
        g_tail = tl.where(tail != float("-inf"), tl.load(g_tail_ptr + row), 0.0)
        reference = tl.where(tail != float("-inf"), logz + tail, logz)
    reference = tl.where(dead, 0.0, reference)
    distance = tl.where(dead, 0.0, reference - logz)
    outside = tl.exp(distance)
    scale = a * outside
    p = tl.exp(logp)
    if HAS_TAIL:
        # g_tail * (1 - outside) by the chosen ids' own mass: the difference has no digits left where they hold little
        first = is_first(ids_ptr + start, ids, lane, num_ids) & held
        scale += g_tail * tl.sum(tl.where(first, p, 0.0), axis=0)
        a -= g_tail
    inside = tl.where(logp > -0.5, (direct + a) + a * exp_minus_1(logp), direct + a * p)
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        g_entropy = tl.load(g_entropy_ptr + row)
        slope = -g_entropy * outside
        scale += slope * (distance + entropy)
        inside -= g_entropy * p * (tl.where(logp < PAD, PAD, logp) + entropy)
        tl.store(slope_ptr + row, tl.where(dead, 0.0, slope) * row_scale)
    tl.store(reference_ptr + row, reference)
    tl.store(scale_ptr + row, tl.where(dead, 0.0, scale) * row_scale)
    tl.store(selected_ptr + start + lane, tl.where((ids >= 0) & (dead == 0), inside, 0.0) * row_scale, mask=held)


def coefficient_rows(
    upstream: Upstream, ids: Tensor, logp: Tensor, tail_logp: Tensor | None, logz: Tensor, entropy: Tensor | None, row_scale: Tensor
) -> Coefficients:
    """`selection.coefficients`, for a row_scale a token."""
    given = {name: getattr(upstream, name) for name in ("logp", "tail_logp", "logz", "entropy")}
    grads = {name: logz if grad is None else grad.float().contiguous() for name, grad in given.items()}
    reference, scale, slope = row_vector(logp), row_vector(logp), row_vector(logp)
    selected = torch.empty(logp.shape, dtype=torch.float32, device=logp.device)
    coefficients_kernel[(ids.shape[0],)](
        ids, logp, logz if tail_logp is None else tail_logp, logz, logz if entropy is None else entropy,
        grads["logp"], grads["tail_logp"], grads["logz"], grads["entropy"], row_scale, reference, scale, slope, selected, ids.shape[1],
        HAS_LOGP=given["logp"] is not None, HAS_TAIL=given["tail_logp"] is not None, HAS_LOGZ=given["logz"] is not None,
        HAS_ENTROPY=given["entropy"] is not None, LANES=lanes_of(ids), num_warps=warps_of(ids),
    )  # fmt: skip
    return Coefficients(reference=reference, scale=scale, slope=slope if given["entropy"] is not None else None, selected=selected)
