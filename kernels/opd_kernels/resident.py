"""Tiles of logits in an order of their own, and those that stay in memory between a forward and its backward pass.

Forward ends with tiles that backward begins with. The last ones that fit are kept, as exp(x - top) where forward has formed that (with a
softcap as x), and need no second product: 4 - kept / all products instead of 4, and 3 where all of them fit. Where no budget was given
they take the default one and besides the memory that the gradients will: those are written as tiles are given up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.placement import Placement, TileIds, place
from opd_kernels.products import Projection, Scratch
from opd_kernels.tiling import tile_shape
from opd_kernels.types import chunk_budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Tiles [C, cv] over tokens and columns, numbered as forward makes them: columns ascending, and rows descending within them."""

    where: Placement
    elements: int  # of the largest tile
    tiles: int
    parts: int  # areas of a tile's size that the work on one takes, its own included
    budget: int  # elements of scratch
    entropy: bool

    def number(self, rows: slice, columns: slice) -> int:
        return self._column_tile(columns) * self.where.row_tiles + self.where.row_tiles - 1 - self._row_tile(rows)

    def chosen(self, rows: slice, columns: slice) -> TileIds:
        return self.where.tile(self._row_tile(rows), self._column_tile(columns))

    def fitting(self, lent: int) -> int:
        """Tiles that the budget and `lent` more elements hold beside what the work takes."""
        return min(self.tiles, max(1, (self.budget + lent) // self.elements - (self.parts - 1)))

    def scratch(self, head: Projection) -> Scratch:
        return Scratch(self.elements, self.parts - 1, head)

    def _row_tile(self, rows: slice) -> int:
        return rows.start // self.where.tile_rows

    def _column_tile(self, columns: slice) -> int:
        return columns.start // self.where.tile_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Memory of the tiles: one area for each kept tile, from number `first` on; the first area serves all tiles before it too."""

    areas: list[Tensor]  # flat
    top: Tensor  # [kept, tile_rows] the maximum below which a kept tile's exponentials stand
    first: int
    formed: bool  # the areas hold what forward left in them

    def area(self, number: int, rows: slice, columns: slice) -> Tensor:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        return self.areas[min(max(0, number - self.first), len(self.areas) - 1)][: shape[0] * shape[1]].view(shape)

    def kept(self, number: int) -> bool:
        return number >= self.first

    def top_of(self, number: int, rows: slice) -> Tensor:
        return self.top[number - self.first, : rows.stop - rows.start]

    def release(self, number: int) -> None:
        """Gives up a used tile's memory, although saved tensors still refer to it; the first area is needed until the last tile."""
        if len(self.areas) > 1 and number > self.first:
            _empty(self.areas[number - self.first])
        elif number == 0:
            _empty(self.areas[0])


def tile_grid(head: Projection, ids: Tensor, *, entropy: bool) -> Grid:
    """The same for both passes: it does not depend on which gradients are asked for."""
    tokens, device = head.hidden.shape[0], head.hidden.device
    parts = 1 + entropy + (head.options.softcap is not None)
    budget = chunk_budget(head.options, device, row_sets=0) // head.dtype.itemsize
    tile_rows, tile_columns = tile_shape(tokens, head.columns, head.hidden.shape[1], budget // parts, device)
    where = place(ids, head, tile_rows=tile_rows, tile_columns=tile_columns)
    tiles, elements = where.row_tiles * -(-head.columns // tile_columns), tile_rows * tile_columns
    return Grid(where=where, elements=elements, tiles=tiles, parts=parts, budget=budget, entropy=entropy)


def new_tiles(head: Projection, grid: Grid, *, lent: int | None) -> Tiles:
    """Memory for forward, of which backward gets the areas of kept tiles; `lent`: elements beyond the budget, or None to keep no tile."""
    kept = 0 if lent is None else grid.fitting(lent)
    areas = [_area(head, grid) for _ in range(max(1, kept))]
    return Tiles(areas=areas, top=areas[0].new_zeros(kept, grid.where.tile_rows), first=grid.tiles - kept, formed=False)


def kept_tiles(head: Projection, grid: Grid, top: Tensor, areas: list[Tensor], *, used: bool) -> Tiles:
    """Memory for backward: what forward kept, or one area if nothing was kept or a backward pass has overwritten it.

    `.data`: overwriting what autograd saved is no mistake here, and must not count as one when a retained graph is walked again.
    """
    formed = bool(areas) and not used
    areas = [area.data for area in areas] if formed else [_area(head, grid)]
    return Tiles(areas=areas, top=top, first=grid.tiles - top.shape[0], formed=formed)


def _area(head: Projection, grid: Grid) -> Tensor:
    return torch.empty(grid.elements, dtype=head.dtype, device=head.hidden.device)


def _empty(area: Tensor) -> None:
    storage = area.untyped_storage()
    if storage.resizable():  # one that saved-tensor hooks read back from a file is not
        storage.resize_(0)
