"""Tiles of logits in an order of their own, and those that stay in memory between a forward and its backward pass.

Forward ends with tiles that backward begins with. The last ones that fit are kept, as exp(x - top) where forward has formed that (with a
softcap as x), and need no second product: 4 - kept / all products instead of 4, and 3 where all of them fit. Where no budget was given
they take the default one and besides the memory that the weight's gradient will: that is written as tiles are given up.

One call at a time borrows from the gradient, the newest: of several that wait for backward together the others give up what they borrowed
(`recall`), and backward forms those tiles again, to the same bits.
"""

import ctypes
import functools
import mmap
import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.placement import Placement, TileIds, place
from opd_kernels.products import Projection, Scratch
from opd_kernels.tiling import tile_shape
from opd_kernels.types import chunk_budget

_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)  # Linux and BSD
_lock = threading.Lock()
_borrowed: dict[int, weakref.ref[Tensor]] = {}  # areas beyond a budget that wait for backward, by address


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

    areas: list[Tensor]  # flat; kept tiles that are to be formed again share one
    top: Tensor  # [kept, tile_rows] the maximum below which a kept tile's exponentials stand
    first: int
    held: tuple[bool, ...]  # of the kept tiles: the area holds what forward left in it
    borrowed: int = 0  # of the first areas, beyond the budget

    def area(self, number: int, rows: slice, columns: slice) -> Tensor:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        return self.areas[min(max(0, number - self.first), len(self.areas) - 1)][: shape[0] * shape[1]].view(shape)

    def kept(self, number: int) -> bool:
        return number >= self.first

    def formed(self, number: int) -> bool:
        return self.kept(number) and self.held[number - self.first]

    def top_of(self, number: int, rows: slice) -> Tensor:
        return self.top[number - self.first, : rows.stop - rows.start]

    def release(self, number: int) -> None:
        """Gives up a used tile's memory, although saved tensors still refer to it; the first area is needed until the last tile."""
        if number > self.first and self.formed(number):
            _empty(self.areas[number - self.first])
        elif number == 0:
            _empty(self.areas[0])

    def wait(self) -> None:
        """Ends forward: from here on another call may recall what this one borrowed."""
        with _lock:
            _borrowed.update((area.data_ptr(), weakref.ref(area)) for area in self.areas[: self.borrowed])


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
    borrowed = max(0, kept - grid.fitting(0))
    if borrowed:
        recall()
    areas = [_area(head, grid) for _ in range(max(1, kept))]
    top = areas[0].new_zeros(kept, grid.where.tile_rows)
    return Tiles(areas=areas, top=top, first=grid.tiles - kept, held=(False,) * kept, borrowed=borrowed)


def kept_tiles(head: Projection, grid: Grid, top: Tensor, areas: list[Tensor], *, used: bool) -> Tiles:
    """Memory for backward: what forward kept, and an area for the tiles whose memory is gone, recalled or used by a pass before this one.

    `.data`: overwriting what autograd saved is no mistake here, and must not count as one when a retained graph is walked again.
    """
    with _lock:
        for area in areas:
            _borrowed.pop(area.data_ptr(), None)
    held = tuple(not used and area.untyped_storage().nbytes() > 0 for area in areas)
    spare = [] if areas and all(held) else [_area(head, grid)]
    areas = [area.data if holds else spare[0] for area, holds in zip(areas, held, strict=True)]
    return Tiles(areas=areas or spare, top=top, first=grid.tiles - top.shape[0], held=held)


def recall() -> None:
    """Empties the areas that calls waiting for backward have borrowed."""
    with _lock:
        waiting = [reference() for reference in _borrowed.values()]
        _borrowed.clear()
        for area in waiting:
            if area is not None:
                _empty(area)


def _area(head: Projection, grid: Grid) -> Tensor:
    return torch.empty(grid.elements, dtype=head.dtype, device=head.hidden.device)


def _empty(area: Tensor) -> None:
    """Frees the memory of an area that is a storage of its own, as what saved-tensor hooks hand back need not be."""
    storage = area.untyped_storage()
    if storage.resizable() and storage.nbytes() == area.numel() * area.element_size():
        _give_back_pages(storage.data_ptr(), storage.nbytes())
        storage.resize_(0)


def _give_back_pages(address: int, size: int) -> None:
    """Gives whole pages back to the system: free() keeps what lies inside the heap, and the gradient would come on top of it."""
    if _DONTNEED is None:
        return
    start, stop = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONTNEED)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
