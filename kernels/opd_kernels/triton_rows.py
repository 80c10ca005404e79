"""What the Triton backend does with a chunk of whole rows: products, chosen logits, sums over the rest, exact top-k; and its scratch."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.distributed import smallest_over_ranks
from opd_kernels.dlogits import GradientSums
from opd_kernels.products import Projection, product_into, projection
from opd_kernels.row_kernels import TILES, TileConstants, Tiles, gather, overwrite, row_sums
from opd_kernels.running import accumulate, empty_sums
from opd_kernels.selection import RunningSums
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
    """One flat buffer, viewed as tiles [rows, columns] with an aligned row stride and used again for every tile."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(rows * padded(columns), dtype=dtype, device=device)

    def tile(self, rows: int, columns: int) -> Tensor:
        stride = padded(columns)
        return self._flat[: rows * stride].view(rows, stride)[:, :columns]


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
    return torch.empty((width, head.head.weight.shape[1]), dtype=torch.float32, device=sums.weight.device)


def backward_shape(head: RowHead, copies: int) -> tuple[int, int]:
    """(rows, columns) of a backward tile with `copies` of the products and one of their gradient."""
    projection = head.head
    budget = chunk_budget(projection.options, projection.hidden.device, row_sets=0)
    entry_bytes = 4 * copies + head.gradient_dtype.itemsize
    return tile_in_budget(projection.hidden.shape[0], projection.columns, entry_bytes, 4 * projection.hidden.shape[1], budget)


def row_chunk(head: RowHead, copies: int, *, differentiate: bool) -> int:
    """Rows of a chunk that holds `copies` of whole rows of products and, to differentiate, one of their gradient; equal on all ranks."""
    projection = head.head
    device, options = projection.hidden.device, projection.options
    row_bytes = padded(projection.columns) * (4 * copies + (head.gradient_dtype.itemsize if differentiate else 0))
    rows = rows_in_budget(projection.hidden.shape[0], row_bytes, chunk_budget(options, device, row_sets=1))
    return smallest_over_ranks(rows, options.process_group, device)


def project(z: Tensor, head: Projection, rows: slice, weight_tile: Tensor) -> Tensor:
    """Writes the products of some rows with a weight tile into z."""
    product_into(z, head.hidden[rows], weight_tile.T)
    return z


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScan:
    """What one pass over whole rows of this rank's columns found; afterwards the chosen columns of z are -inf."""

    selected: Tensor  # [C, K] logits at the chosen ids; -inf where this rank holds none
    sums: RunningSums  # over the columns not chosen, and with a top-k neither among the best of those
    best_x: Tensor | None  # [C, k] the largest logits not chosen, in order; -inf where there are fewer
    best_ids: Tensor | None  # [C, k] int64 global ids; NO_COLUMN where there are fewer


def scan_rows(z: Tensor, ids: Tensor, constants: TileConstants, vocab_start: int, k: int, tiles: Tiles = TILES) -> RowScan:
    """Reads the logits at ids [C, K] off the products z, removes them, and sums the rest; with k > 0 sets the k largest apart."""
    selected = torch.full(ids.shape, _NEG_INF, dtype=torch.float32, device=z.device)
    removed = selected.clone()
    gather(z, ids, selected, constants, vocab_start)
    overwrite(z, ids, removed, vocab_start)
    if k == 0:
        return RowScan(selected=selected, sums=row_sums(z, constants, tiles), best_x=None, best_ids=None)
    best = best_columns(z, ids - vocab_start, k, constants, tiles)
    best_ids = torch.where(best.columns < 0, NO_COLUMN, best.columns + vocab_start)
    return RowScan(selected=selected, sums=best.rest, best_x=best.x, best_ids=best_ids)


def best_columns(z: Tensor, removed: Tensor, k: int, constants: TileConstants, tiles: Tiles = TILES) -> TopColumns:
    """The k largest columns of each row but for the `removed` ones, exact; rows that the kernels decline are sorted whole."""
    group = group_size(z.shape[1], k, tiles)
    if group is None:
        everything = torch.arange(z.shape[0], device=z.device)
        best = TopColumns(
            x=z.new_empty((z.shape[0], k)),
            columns=removed.new_empty((z.shape[0], k)),
            rest=empty_sums(z.shape[0], z),
            redo=torch.ones_like(everything, dtype=torch.bool),
        )
        rows = everything
    else:
        best = top_columns(z, k, group, constants, tiles)
        rows = best.redo.nonzero().squeeze(1)
    for part in rows.split(max(1, REDO_ELEMENTS // max(1, z.shape[1]))) if len(rows) else ():
        again = sorted_columns(logits_of(z[part], part, constants), removed[part], k)
        best.x[part], best.columns[part] = again.x, again.columns
        best.rest.m[part], best.rest.l[part], best.rest.t[part] = again.rest.m, again.rest.l, again.rest.t
    return best


def sorted_columns(x: Tensor, removed: Tensor, k: int) -> TopColumns:
    """`best_columns` of logits x [R, V] by one sort of all their keys; `removed` holds columns, or anything out of range."""
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
