"""Small launches for the interpreter, and buffers that show a store out of place."""

import functools

import torch
from opd_kernels import triton_backend
from opd_kernels.row_kernels import TileConstants, Tiles
from torch import Tensor

TILES = Tiles(block=64, group=16)
OPERATIONS = ("selected_logprobs", "fused_sparse_loss", "topk_logprobs", "dense_divergence")
GUARD = -77.0


def shrink_launches(setattr_=setattr) -> None:
    """Makes the Triton backend launch small blocks, so that few columns already fill several."""
    for name in OPERATIONS:
        setattr_(triton_backend, name, functools.partial(getattr(triton_backend, name), tiles=TILES))


class Guarded:
    """A tile [rows, columns] inside a larger buffer of guard values, with `gap` guard columns after each row."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype = torch.float32, gap: int = 5, band: int = 64) -> None:
        stride = columns + gap
        self.buffer = torch.full((rows * stride + 2 * band,), GUARD, dtype=dtype)
        self.tile = self.buffer[band : band + rows * stride].view(rows, stride)[:, :columns]
        self._inside = torch.zeros_like(self.buffer, dtype=torch.bool)
        self._inside[band : band + rows * stride].view(rows, stride)[:, :columns] = True
        self._gaps = torch.zeros_like(self._inside)
        self._gaps[band : band + rows * stride] = True

    def bands_hold(self) -> bool:
        """Nothing was stored before the first row or after the last."""
        return bool((self.buffer[~self._gaps] == GUARD).all())

    def gaps_hold(self) -> bool:
        """Nothing was stored outside the tile's columns."""
        return bool((self.buffer[~self._inside] == GUARD).all())


def constants(rows: int, columns: int, *, bias: bool = False, softcap: float | None = None, scale: float = 1.0, seed: int = 0) -> TileConstants:
    generator = torch.Generator().manual_seed(seed)
    return TileConstants(
        inverse_temperature=0.5 + torch.rand(rows, generator=generator),
        bias=torch.randn(columns, generator=generator) if bias else None,
        softcap=softcap,
        logit_scale=scale,
    )


def logits(z: Tensor, with_: TileConstants) -> Tensor:
    """x of products z, in fp64; -inf stays."""
    x = z.double() if with_.bias is None else z.double() + with_.bias.double()
    x = x * with_.logit_scale
    if with_.softcap is not None:
        x = with_.softcap * torch.tanh(x / with_.softcap)
    return (x * with_.inverse_temperature.double()[:, None]).masked_fill(z == float("-inf"), float("-inf"))
