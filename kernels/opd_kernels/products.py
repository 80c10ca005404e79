"""Matrix products with fp32 (or fp64) results, the transform from products to logits, and scratch that is used again.

On CUDA, half-precision operands stay half and only the result is fp32; elsewhere operands are cast a tile at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.types import LogitOptions, accumulation_dtype

_HALF = (torch.float16, torch.bfloat16)
_NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """One head ready for tiled products: hidden in the operands' dtype, and what to do with a product."""

    hidden: Tensor  # [N, H] in the operands' dtype
    weight: Tensor  # [V, H] as given
    options: LogitOptions
    dtype: torch.dtype  # of logits and sums

    @property
    def columns(self) -> int:
        return self.options.valid_columns

    def weight_tile(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        """Rows start to stop of weight in the operands' dtype; where they must be cast, in `room` [cv, H] if that is given."""
        rows = self.weight[start:stop]
        return rows.to(self.hidden.dtype) if room is None or rows.dtype == self.hidden.dtype else room[: stop - start].copy_(rows)

    def temperature_column(self, rows: slice) -> Tensor | float:
        temperature = self.options.temperature
        return temperature[rows, None] if isinstance(temperature, Tensor) else temperature

    def row_scale(self) -> Tensor | float:
        """d x / d product without the softcap's factor: a number or [N]."""
        return self.options.logit_scale / self.options.temperature


def projection(hidden: Tensor, weight: Tensor, options: LogitOptions) -> Projection:
    dtype = accumulation_dtype(hidden)
    operand = hidden.dtype if hidden.is_cuda and hidden.dtype in _HALF else dtype
    return Projection(hidden=hidden.to(operand), weight=weight, options=options, dtype=dtype)


def logits_into(out: Tensor, head: Projection, rows: slice, weight_tile: Tensor, start: int) -> None:
    """Writes x of `rows` and of the columns of weight_tile, which begin at column `start`, into out [C, cv]."""
    options = head.options
    hidden = head.hidden[rows]
    plain = options.bias is None and options.softcap is None and not isinstance(options.temperature, Tensor)
    scale = options.logit_scale / options.temperature if plain else 1.0
    if hidden.dtype == out.dtype:
        torch.addmm(out, hidden, weight_tile.T, beta=0, alpha=scale, out=out)
    else:
        torch.addmm(out, hidden, weight_tile.T, out_dtype=out.dtype, beta=0, alpha=scale, out=out)
    if plain:
        return
    if options.bias is not None:
        out.add_(options.bias[start : start + out.shape[1]].to(out.dtype))
    if options.logit_scale != 1.0:
        out.mul_(options.logit_scale)
    if options.softcap is not None:
        masked = out == _NEG_INF  # a masked column stays masked: tanh would make it -softcap
        out.div_(options.softcap).tanh_().mul_(options.softcap).masked_fill_(masked, _NEG_INF)
    out.div_(head.temperature_column(rows))


def softcap_slope(x: Tensor, head: Projection, rows: slice, out: Tensor | None = None) -> Tensor:
    """1 - tanh^2 at x [C, ...] (0 at -inf); the factor of the softcap in d x / d product."""
    cap = head.options.softcap
    assert cap is not None
    tanh = torch.mul(x, head.temperature_column(rows) / cap, out=out).clamp_(-1.0, 1.0)
    return tanh.square_().neg_().add_(1.0)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; left is rounded once to right's dtype."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left.to(right.dtype), right, out_dtype=total.dtype, out=total)


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right; left is rounded once to right's dtype."""
    if right.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left.to(right.dtype), right, out_dtype=out.dtype, out=out)


class Scratch:
    """One flat allocation, cut into `parts` equal areas that are viewed as [rows, columns]."""

    def __init__(self, elements: int, parts: int, like: Projection) -> None:
        flat = torch.empty(elements * parts, dtype=like.dtype, device=like.hidden.device)
        self._areas = flat.view(parts, elements)

    def view(self, part: int, rows: int, columns: int) -> Tensor:
        return self._areas[part, : rows * columns].view(rows, columns)
