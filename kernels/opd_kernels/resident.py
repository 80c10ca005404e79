"""Tiles of logits in an order of their own, and those that stay in memory between a forward and its backward pass.

Forward ends with tiles that backward begins with. The last ones that fit are kept, as exp(x - top) where forward has formed that (with a
softcap as x), and need no second product: 4 - kept / all products instead of 4, and 3 where all of them fit. They take the budget, and
where none was given also the memory that the weight's gradient will: it is allocated in forward, tiles wait from its beginning on, and
backward writes it from its end, never over a tile that still waits.

One call at a time has such a loan, the newest: of several that wait for backward together the others give theirs up (`recall`), and
backward forms those tiles again, to the same bits.
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
_waiting: list[tuple[int, weakref.ref[Tensor]]] = []  # the loan that waits for backward, with its address; one at most


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

    def fitting(self) -> int:
        """Tiles that the budget holds beside what the work takes."""
        return min(self.tiles, max(1, self.budget // self.elements - (self.parts - 1)))

    def lendable(self, weight: Tensor, itemsize: int) -> int:
        """Tiles, `itemsize` bytes an element, that can wait in the gradient of weight [V, H] while it is written.

        It is written a block of columns at a time, the last first, while the tiles of those and of earlier columns wait: all of them lie
        before the last block's place, and those of the first columns that wait, before the place of these.
        """
        tile, rows = self.elements * itemsize, self.where.row_tiles
        block = self.where.tile_columns * weight.shape[1] * weight.element_size()
        most = (self.tiles // rows - 1) * block // tile
        return max(0, min(most, self.tiles - rows * -(-rows * tile // block)))

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
    own: int  # of the first areas: memory of the budget's; the others lie in the loan
    loan: Tensor | None  # like weight, to become its gradient
    top: Tensor  # [kept, tile_rows] the maximum below which a kept tile's exponentials stand
    first: int
    held: tuple[bool, ...]  # of the kept tiles: the area holds what forward left in it

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
        if self.first < number < self.first + self.own and self.formed(number):
            _empty(self.areas[number - self.first])
        elif number == 0:
            _empty(self.areas[0])

    def saved(self) -> list[Tensor | None]:
        """What `kept_tiles` takes. Ends forward: from here on another call may recall the loan."""
        address = None
        if self.loan is not None:
            address = torch.tensor(self.loan.data_ptr())  # saved with it: checkpointing puts what it has formed again in the place of both
            with _lock:
                _waiting[:] = [(self.loan.data_ptr(), weakref.ref(self.loan))]
        return [self.top, self.loan, address, *self.areas[: min(self.own, len(self.top))]]


def tile_grid(head: Projection, ids: Tensor, *, entropy: bool) -> Grid:
    """The same for both passes: it does not depend on which gradients are asked for."""
    tokens, device = head.hidden.shape[0], head.hidden.device
    parts = 1 + entropy + (head.options.softcap is not None)
    whole_bytes = tokens * head.columns * head.dtype.itemsize
    budget = chunk_budget(head.options, device, row_sets=0, whole_bytes=whole_bytes) // head.dtype.itemsize
    tile_rows, tile_columns = tile_shape(tokens, head.columns, head.hidden.shape[1], budget // parts, device)
    where = place(ids, head, tile_rows=tile_rows, tile_columns=tile_columns)
    tiles, elements = where.row_tiles * -(-head.columns // tile_columns), tile_rows * tile_columns
    return Grid(where=where, elements=elements, tiles=tiles, parts=parts, budget=budget, entropy=entropy)


def new_tiles(head: Projection, grid: Grid, *, keep: bool, borrow: bool) -> Tiles:
    """Memory for forward, of which backward gets the areas of kept tiles, those in the memory of weight's gradient with `borrow`."""
    own = grid.fitting() if keep else 0
    lent = min(grid.tiles - own, grid.lendable(head.weight, head.dtype.itemsize)) if keep and borrow else 0
    loan = None
    if lent:
        recall()
        loan = torch.empty(head.weight.shape, dtype=head.weight.dtype, device=head.weight.device)
    areas = [*(_area(head, grid) for _ in range(max(1, own))), *_areas_in(loan, lent, head, grid)]
    top = areas[0].new_zeros(own + lent, grid.where.tile_rows)
    first = grid.tiles - own - lent
    return Tiles(areas=areas, own=max(1, own), loan=loan, top=top, first=first, held=(False,) * (own + lent))


def kept_tiles(
    head: Projection, grid: Grid, top: Tensor, loan: Tensor | None, address: Tensor | None, own: list[Tensor], *, used: bool
) -> Tiles:
    """Memory for backward: what forward kept, and an area for the tiles whose memory is gone, recalled or used by a pass before this one.

    A loan elsewhere than at `address` is somebody's copy, by saved-tensor hooks, and not to become a gradient. Its storage must not be looked
    at from Python: autograd would take it for shared, and add gradients up in fresh memory. `.data`: overwriting what autograd saved is no
    mistake here, and must not count as one when a retained graph is walked again.
    """
    lent = len(top) - len(own)
    if loan is not None and address is not None:
        place = address.item()
        with _lock:
            _waiting[:] = [one for one in _waiting if one[0] != place]
        loan = loan.data if not used and loan.data_ptr() == place else None
    held = (*(not used and area.untyped_storage().nbytes() > 0 for area in own), *(loan is not None,) * lent)
    spare = [] if held and all(held) else [_area(head, grid)]
    areas = [area.data if holds else spare[0] for area, holds in zip(own, held, strict=False)]
    areas += spare * lent if loan is None else _areas_in(loan, lent, head, grid)
    return Tiles(areas=areas or spare, own=len(own), loan=loan, top=top, first=grid.tiles - len(top), held=held)


def recall() -> None:
    """Empties the loan of the call that waits for backward."""
    with _lock:
        waiting = [reference() for _, reference in _waiting]
        _waiting.clear()
        for loan in waiting:
            if loan is not None:
                _empty(loan)


def _areas_in(loan: Tensor | None, count: int, head: Projection, grid: Grid) -> list[Tensor]:
    """The first `count` areas of a tile's size in the memory of a tensor."""
    if loan is None:
        return []
    size = count * grid.elements * head.dtype.itemsize
    return list(loan.view(-1).view(torch.uint8)[:size].view(head.dtype).view(count, -1))


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
