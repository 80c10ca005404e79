"""What the Triton backend does with a chunk of whole rows: products, chosen logits, sums over the rest, exact top-k; and its scratch."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.distributed import smallest_over_ranks
from opd_kernels.dlogits import GradientSums
from opd_kernels.products import Projection, product_into, projection
from opd_kernels.row_kernels import TILES, TileConstants, Tiles, row_sums, take
from opd_kernels.running import accumulate, empty_sums
from opd_kernels.selection import RunningSums
from opd_kernels.tiling import spans
from opd_kernels.topk import merge
from opd_kernels.triton_topk import TopColumns, group_size, top_columns
from opd_kernels.types import LogitOptions, chunk_budget

ALIGNMENT = 64  # columns: rows of a scratch tile start at multiples of 256 bytes, for wide loads and cuBLAS's fast paths
MAX_ROWS = 16384  # of a backward tile: more would narrow it, fewer would repeat the traffic of the weight's gradient
REDO_ELEMENTS = 1 << 24  # logits that are sorted whole at a time
NO_COLUMN = 2**31 - 1  # larger than any column, as `topk.merge` wants it
_NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowHead:
    """A projection with its constants as the kernels read them."""

    head: Projection
    inverse_temperature: Tensor  # [N] fp32
    bias: Tensor | None  # [V] fp32
    gradient_dtype: torch.dtype  # of dz: half precision where hidden is

    def products(self, tokens: Tensor) -> Tensor:
        """Products of the tokens with the given numbers [R] and all columns, in memory of their own."""
        columns = self.head.columns
        z = TileScratch(len(tokens), columns, tokens.device).tile(len(tokens), columns)
        return project(z, self.head, tokens, padded_tile(self.head, slice(0, columns)))

    def constants(self, rows: slice, columns: slice) -> TileConstants:
        """Of the tile of those rows and columns."""
        options = self.head.options
        return TileConstants(
            inverse_temperature=self.inverse_temperature[rows],
            bias=None if self.bias is None else self.bias[columns],
            softcap=options.softcap,
            logit_scale=options.logit_scale,
        )


def row_head(hidden: Tensor, weight: Tensor, options: LogitOptions) -> RowHead:
    temperature = options.temperature
    tokens = hidden.shape[0]
    if isinstance(temperature, Tensor):
        inverse = temperature.reciprocal()
    else:
        inverse = torch.full((tokens,), 1.0 / temperature, dtype=torch.float32, device=hidden.device)
    return RowHead(
        head=projection(hidden, weight, options),
        inverse_temperature=inverse,
        bias=None if options.bias is None else options.bias.detach().float().contiguous(),
        gradient_dtype=hidden.dtype,
    )


@contextlib.contextmanager
def kernels_on(hidden: Tensor) -> Iterator[None]:
    """Autocast off, and launches on the device of hidden, which need not be the current one."""
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        yield


def padded(columns: int) -> int:
    """Row stride of a scratch tile."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


class TileScratch:
    """One flat fp32 buffer, viewed as tiles [rows, columns] with an aligned row stride and used again for every tile."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._flat = torch.empty(rows * padded(columns), dtype=torch.float32, device=device)

    def tile(self, rows: int, columns: int) -> Tensor:
        stride = padded(columns)
        return self._flat[: rows * stride].view(rows, stride)[:, :columns]

    def over(self, tile: Tensor, dtype: torch.dtype, columns: int | None = None) -> Tensor:
        """A tile of another dtype, of at most 4 bytes, over the memory of `tile`: each row begins where the other's does.

        columns: more than the tile's, into the padding of its rows.
        """
        rows, own = tile.shape
        return self._flat[: rows * padded(own)].view(dtype).view(rows, -1)[:, : own if columns is None else columns]


def rows_in_budget(tokens: int, row_bytes: int, budget: int) -> int:
    """Rows of a whole-row chunk: what the budget holds, in multiples of 128 where it holds more, at least one."""
    rows = max(1, budget // max(1, row_bytes))
    return min(tokens, rows if rows < 128 else rows - rows % 128)


def tile_in_budget(tokens: int, columns: int, entry_bytes: int, column_bytes: int, budget: int) -> tuple[int, int]:
    """(rows, columns) of a backward tile with as many rows as can be; `column_bytes` are needed a column whatever the rows."""
    least = min(128, padded(columns))
    rows = max(1, min(tokens, MAX_ROWS, (budget - least * column_bytes) // max(1, least * entry_bytes)))
    width = budget // (rows * entry_bytes + column_bytes)
    return rows, max(1, least, min(columns, width - width % 128))


def weight_block(sums: GradientSums, head: RowHead, width: int) -> Tensor | None:
    """fp32 room for a block of the weight's gradient, where it cannot be added up in place."""
    if sums.weight is None or sums.weight.dtype == torch.float32:
        return None
    return torch.empty((padded(width), head.head.weight.shape[1]), dtype=torch.float32, device=sums.weight.device)


def backward_shape(head: RowHead, copies: int) -> tuple[int, int]:
    """(rows, columns) of a backward tile with `copies` of the products, over one of which their gradient is written."""
    projection = head.head
    budget = chunk_budget(projection.options, projection.hidden.device, row_sets=0)
    return tile_in_budget(projection.hidden.shape[0], projection.columns, 4 * copies, 4 * projection.hidden.shape[1], budget)


def row_chunk(head: RowHead, copies: int) -> int:
    """Rows of a chunk that holds `copies` of whole rows of products, over one of which a gradient may be written; equal on all ranks."""
    projection = head.head
    device, options = projection.hidden.device, projection.options
    row_bytes = padded(projection.columns) * 4 * copies
    rows = rows_in_budget(projection.hidden.shape[0], row_bytes, chunk_budget(options, device, row_sets=1))
    return smallest_over_ranks(rows, options.process_group, device)


def padded_tile(head: Projection, columns: slice) -> Tensor:
    """Rows of the weight for some columns, and for as much of the padding of a scratch tile's rows as the weight has rows for.

    cuBLAS takes a kernel three times slower where the number of columns is odd, as valid vocabularies are. What the padding holds is never
    read, and its gradients are zeros.
    """
    stop = min(head.weight.shape[0], columns.start + padded(columns.stop - columns.start))
    return head.weight_tile(columns.start, max(columns.stop, stop))


def project(z: Tensor, head: Projection, rows: slice | Tensor, weight_tile: Tensor) -> Tensor:
    """Writes the products of some rows with a weight tile (see `padded_tile`) into z."""
    wide = z.as_strided((z.shape[0], weight_tile.shape[0]), z.stride())
    product_into(wide, head.hidden[rows], weight_tile.T)
    return z


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScan:
    """What one pass over whole rows of this rank's columns found; afterwards the chosen columns of z are -inf."""

    selected: Tensor  # [C, K] logits at the chosen ids; -inf where this rank holds none
    sums: RunningSums  # over the columns not chosen, and with a top-k neither among the best of those
    best_x: Tensor | None  # [C, k] the largest logits not chosen, in order; -inf where there are fewer
    best_ids: Tensor | None  # [C, k] int64 global ids; NO_COLUMN where there are fewer
    redo: Tensor | None = None  # [C] bool: rows whose best and sums are to be found by sorting, see `sort_flagged`
    redo_rows: int = 1  # as many of them at a time


def scan_rows(z: Tensor, ids: Tensor, constants: TileConstants, vocab_start: int, k: int, tiles: Tiles = TILES) -> RowScan:
    """Reads the logits at ids [C, K] off the products z, removes them, and sums the rest; with k > 0 sets the k largest apart.

    With k > 0 some rows may be left flagged: nothing here waits for the device.
    """
    selected = take(z, ids, constants, vocab_start)
    if k == 0:
        return RowScan(selected=selected, sums=row_sums(z, constants, tiles), best_x=None, best_ids=None)
    group = group_size(z.shape[1], k, tiles)
    best = top_columns(z, k, group, constants, tiles) if group is not None else sorted_parts(z, ids - vocab_start, k, constants)
    best_ids = torch.where(best.columns < 0, NO_COLUMN, best.columns + vocab_start)
    flagged = {} if group is None else {"redo": best.redo, "redo_rows": max(1, REDO_ELEMENTS // z.shape[1])}
    return RowScan(selected=selected, sums=best.rest, best_x=best.x, best_ids=best_ids, **flagged)


def sort_flagged(scan: RowScan, products: Callable[[Tensor], Tensor], ids: Tensor, constants: TileConstants, vocab_start: int) -> bool:
    """Sorts the flagged rows of a scan whole, in place; whether there were any. Waits for the device.

    products: rows [R] -> their products [R, columns], made again; ids, constants: those of all the scan's rows.
    """
    rows = torch.zeros(0) if scan.redo is None else scan.redo.nonzero().squeeze(1)
    if not len(rows):
        return False
    for part in rows.split(scan.redo_rows):
        again = sorted_columns(logits_of(products(part), part, constants), ids[part] - vocab_start, scan.best_x.shape[1])
        scan.best_x[part] = again.x
        scan.best_ids[part] = torch.where(again.columns < 0, NO_COLUMN, again.columns + vocab_start)
        scan.sums.m[part], scan.sums.l[part], scan.sums.t[part] = again.rest.m, again.rest.l, again.rest.t
    return True


def sorted_parts(z: Tensor, removed: Tensor, k: int, constants: TileConstants) -> TopColumns:
    """`sorted_columns` of products, a few rows at a time."""
    step = max(1, REDO_ELEMENTS // max(1, z.shape[1]))
    parts = [
        sorted_columns(logits_of(z[rows], torch.arange(rows.start, rows.stop, device=z.device), constants), removed[rows], k)
        for rows in spans(z.shape[0], step)
    ]
    rest = RunningSums(**{name: torch.cat([getattr(part.rest, name) for part in parts]) for name in ("m", "l", "t")})
    x, columns, redo = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "columns", "redo"))
    return TopColumns(x=x, columns=columns, rest=rest, redo=redo)


def sorted_columns(x: Tensor, removed: Tensor, k: int) -> TopColumns:
    """The k largest columns of logits x [R, V] by one sort of all their keys; `removed` holds columns to leave out, or anything out of range."""
    count = x.shape[1]
    ids = torch.arange(count, device=x.device).repeat(x.shape[0], 1)
    held = (removed >= 0) & (removed < count)
    slots = torch.cat([ids, ids.new_zeros((x.shape[0], 1))], dim=1)
    ids = slots.scatter_(1, torch.where(held, removed, count), NO_COLUMN)[:, :count]
    values, chosen = merge(torch.where(ids == NO_COLUMN, _NEG_INF, x), ids, min(k, count))
    missing = chosen == NO_COLUMN
    rest = torch.cat([x, x.new_empty((x.shape[0], 1))], dim=1)
    rest = rest.scatter_(1, torch.where(missing, count, chosen), _NEG_INF)[:, :count]
    rest = torch.where(ids == NO_COLUMN, _NEG_INF, rest)
    sums = empty_sums(x.shape[0], x)
    accumulate(rest, sums, torch.empty_like(rest), torch.empty_like(rest))
    short = (0, k - values.shape[1])
    return TopColumns(
        x=torch.nn.functional.pad(values, short, value=_NEG_INF),
        columns=torch.nn.functional.pad(torch.where(missing, -1, chosen), short, value=-1),
        rest=sums,
        redo=missing.any(dim=1),
    )


def logits_of(z: Tensor, rows: Tensor, constants: TileConstants) -> Tensor:
    """x of products z [R, columns], which are the given rows of a tile."""
    x = z if constants.bias is None else z + constants.bias
    x = x * constants.logit_scale
    masked = (z == _NEG_INF) | (x == _NEG_INF)
    if constants.softcap is not None:
        x = constants.softcap * torch.tanh(x / constants.softcap)
    return (x * constants.inverse_temperature[rows, None]).masked_fill(masked, _NEG_INF)


def add_values(sums: RunningSums, x: Tensor) -> None:
    """Adds listed logits [C, k] to sums, in place; -inf stands for none."""
    accumulate(x, sums, torch.empty_like(x), torch.empty_like(x))
