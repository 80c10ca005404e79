"""Gradients with respect to a tile of products, and their two matrix products."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.exponentials import base_of_log2, log2_into
from opd_kernels.placement import TileIds
from opd_kernels.products import Projection, add_product, product_into, softcap_slope
from opd_kernels.selection import FLOOR, Coefficients


def dlogits_(
    x: Tensor, head: Projection, rows: slice, coefficients: Coefficients, chosen: TileIds, mass: Tensor | None, slope: Tensor | None
) -> Tensor:
    """Turns logits x [C, cv] into gradients of the products, in place; the chosen columns are overwritten with exact values.

    `mass` is scratch needed with an entropy gradient, `slope` with a softcap.
    """
    if slope is not None:
        softcap_slope(x, head, rows, out=slope)
    base, excess = base_of_log2(coefficients.reference[rows])
    log2_into(x, base, out=x)
    distance = excess * -math.log(2.0)
    factor = distance.exp()
    if coefficients.slope is None:
        x.exp2_().mul_((coefficients.scale[rows] * factor)[:, None])
    else:
        assert mass is not None
        torch.exp2(x.clamp_(min=FLOOR), out=mass)
        slope_C = coefficients.slope[rows] * factor
        x.mul_((slope_C * math.log(2.0))[:, None]).add_((coefficients.scale[rows] * factor + slope_C * distance)[:, None]).mul_(mass)
    if slope is not None:
        x.mul_(slope)
    values = coefficients.selected.flatten()[chosen.entry]
    if slope is not None:
        values = values * slope[chosen.row, chosen.column]
    x[chosen.row, chosen.column] = values
    return x


def dlogits_of_mass_(e: Tensor, top: Tensor, rows: slice, coefficients: Coefficients, chosen: TileIds, scratch: Tensor | None) -> Tensor:
    """The same from e = exp(x - top) [C, V] as `running.accumulate` forms it; top [C] is at least every x outside the chosen columns.

    `scratch` is needed with an entropy gradient.
    """
    dead = top == float("-inf")
    excess = base_of_log2(top.masked_fill(dead, 0.0))[1]
    distance = torch.where(dead, FLOOR, top - coefficients.reference[rows] - excess * math.log(2.0))
    factor = distance.exp()
    if coefficients.slope is None:
        e.mul_((coefficients.scale[rows] * factor)[:, None])
    else:
        assert scratch is not None
        torch.log(e, out=scratch).add_(distance[:, None]).clamp_(min=FLOOR)
        scratch.mul_((coefficients.slope[rows] * factor)[:, None]).add_((coefficients.scale[rows] * factor)[:, None])
        e.mul_(scratch)
    e[chosen.row, chosen.column] = coefficients.selected.flatten()[chosen.entry]
    return e


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSums:
    """Gradients of a head's inputs as they are added up, in the accumulation dtype but for weight; None where an input takes none."""

    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H], zero beyond the valid columns
    bias: Tensor | None  # [V]


def gradient_sums(head: Projection, needs: tuple[bool, ...], weight_dtype: torch.dtype, room: Tensor | None = None) -> GradientSums:
    """Buffers for the gradients that are asked for; the valid rows of weight, in `room` where that is given, are left to be written."""
    hidden, weight = head.hidden, head.weight
    weight_sum = None
    if needs[1]:
        weight_sum = torch.empty(weight.shape, dtype=weight_dtype, device=weight.device) if room is None else room
        weight_sum[head.columns :].zero_()
    return GradientSums(
        hidden=torch.zeros(hidden.shape, dtype=head.dtype, device=hidden.device) if needs[0] else None,
        weight=weight_sum,
        bias=torch.zeros(weight.shape[0], dtype=head.dtype, device=weight.device) if needs[2] else None,
    )


def add_tile(
    sums: GradientSums, dlogits: Tensor, hidden: Tensor, weight_tile: Tensor, rows: slice, columns: slice, block: Tensor | None
) -> None:
    """Adds a tile's share, hidden [C, H] being its tokens; `block` is where the share of weight goes, first written, then added to."""
    if sums.bias is not None:
        sums.bias[columns] += dlogits.sum(dim=0, dtype=sums.bias.dtype)
    dlogits = dlogits.to(weight_tile.dtype)
    if sums.hidden is not None:
        add_product(sums.hidden[rows], dlogits, weight_tile)
    if block is not None:
        combine = product_into if rows.start == 0 else add_product
        combine(block, dlogits.T, hidden)
