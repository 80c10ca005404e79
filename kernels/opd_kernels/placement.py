"""Where the chosen ids fall in a grid of tiles."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.products import Projection


@dataclass(frozen=True, slots=True, kw_only=True)
class TileIds:
    """The chosen ids inside one tile: which of the N*K entries they are, and their row and column in the tile."""

    entry: Tensor
    row: Tensor
    column: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Chosen ids sorted by tile, so that a tile touches its own ids and no others."""

    entry: Tensor  # [E] into the flat [N*K]
    row: Tensor  # [E] token
    column: Tensor  # [E] column of this rank's shard
    bounds: list[int]
    row_tiles: int
    tile_rows: int
    tile_columns: int

    def tile(self, row_tile: int, column_tile: int) -> TileIds:
        index = column_tile * self.row_tiles + row_tile
        part = slice(self.bounds[index], self.bounds[index + 1])
        return TileIds(
            entry=self.entry[part],
            row=self.row[part] - row_tile * self.tile_rows,
            column=self.column[part] - column_tile * self.tile_columns,
        )


def owned_ids(ids: Tensor, head: Projection) -> Tensor:
    """[N, K] bool: ids among the valid columns this rank holds."""
    local = ids - head.options.vocab_start
    return (ids >= 0) & (local >= 0) & (local < head.columns)


def place(ids: Tensor, head: Projection, *, tile_rows: int, tile_columns: int) -> Placement:
    """Sorts ids [N, K] by tile; ids of other ranks and pads fall in none. Reads the tiles' counts back to the host, once."""
    tokens, chosen = ids.shape
    columns = head.columns
    entry = torch.nonzero(owned_ids(ids, head).flatten()).squeeze(1)
    column = ids.flatten()[entry] - head.options.vocab_start
    row = entry // chosen
    row_tiles = -(-tokens // tile_rows)
    column_tiles = max(1, -(-columns // tile_columns))
    tile, order = ((column // tile_columns) * row_tiles + row // tile_rows).sort(stable=True)
    sizes = torch.bincount(tile, minlength=row_tiles * column_tiles)
    bounds = [0, *sizes.cumsum(0).tolist()]
    return Placement(
        entry=entry[order],
        row=row[order],
        column=column[order],
        bounds=bounds,
        row_tiles=row_tiles,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
    )
