"""Exact top-k of rows, descending, ties to the lowest id.

A row's blocks of 64 columns are ranked by (maximum, lowest index first). Every element outside the first k blocks is beaten by one
element in each of those k blocks, so only k * 64 columns are looked at; the same again with blocks of 8 among them. Equal values are
settled by keys that hold value and id. On the CPU, where looking costs little, that is done only where they leave open which are the k
largest; elsewhere any groups of columns will do in the place of blocks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_kernels.distributed import gather_ranks
from opd_kernels.tiling import spans

BLOCK = 64
FINE = 8
_GROUP = 4
_CANDIDATES_CPU = 1 << 21  # looked at together
_CANDIDATES_CUDA = 1 << 24
_NEG_INF = float("-inf")
_NO_ID = 2**31 - 1  # stands for "no column" in a merge; larger than any id


def topk_of(x: Tensor, k: int, block_max: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(values, ids) [C, k] of rows x [C, V]; k must not exceed V. `block_max` [C, ceil(V / 64)] saves a pass."""
    candidates = max(1, min(x.shape[1], k * BLOCK))
    step = max(1, (_CANDIDATES_CUDA if x.is_cuda else _CANDIDATES_CPU) // candidates)
    parts = [_topk_of_rows(x[rows], k, None if block_max is None else block_max[rows]) for rows in spans(x.shape[0], step)]
    values, ids = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(ids)


def _topk_of_rows(x: Tensor, k: int, block_max: Tensor | None) -> tuple[Tensor, Tensor]:
    columns = x.shape[1]
    if -(-columns // FINE) <= k or x.dtype == torch.float64:
        return merge(x, torch.arange(columns, device=x.device).expand_as(x), k)
    blocks = -(-columns // BLOCK)
    if blocks > k:
        block_max = block_maxima(x) if block_max is None else block_max
        _, chosen = merge(block_max, torch.arange(blocks, device=x.device).expand_as(block_max), k)
        values = _values(x, chosen, BLOCK)
        largest = None if x.is_cuda else _largest(values, k)
        if largest is not None:
            return merge(values.gather(1, largest), chosen.gather(1, largest // BLOCK) * BLOCK + largest % BLOCK, k)
        fine = _inside(chosen, BLOCK // FINE)
    else:
        fine = torch.arange(-(-columns // FINE), device=x.device).expand(x.shape[0], -1)
        values = _values(x, fine, FINE)
    _, chosen = merge(values.unflatten(1, (-1, FINE)).amax(dim=2), fine, k)
    ids = _inside(chosen, FINE)
    return merge(_values(x, chosen, FINE), ids if columns % BLOCK == 0 else ids.masked_fill(ids >= columns, _NO_ID), k)


def _inside(blocks: Tensor, size: int) -> Tensor:
    """[C, B * size] indices of what lies in blocks [C, B] of `size`."""
    return (blocks[:, :, None] * size + torch.arange(size, device=blocks.device)).flatten(1)


def _values(x: Tensor, blocks: Tensor, size: int) -> Tensor:
    """x [C, V] at what lies in blocks [C, B] of `size`, -inf beyond the last column: [C, B * size].

    On the CPU whole blocks are copied where rows divide into them: twice as fast as one by one.
    """
    rows, columns = x.shape
    if columns % BLOCK == 0 and x.is_contiguous() and not x.is_cuda:
        first = torch.arange(rows).unsqueeze(1) * (columns // size)
        return x.view(-1, size).index_select(0, (first + blocks).flatten()).view(rows, -1)
    ids = _inside(blocks, size)
    if columns % BLOCK == 0:
        return x.gather(1, ids)
    return x.gather(1, ids.clamp(max=columns - 1)).masked_fill_(ids >= columns, _NEG_INF)


def block_maxima(x: Tensor) -> Tensor:
    """[C, ceil(V / 64)] maxima of consecutive blocks of 64 columns."""
    columns = x.shape[1]
    whole = columns - columns % BLOCK
    maxima = x[:, :whole].unflatten(1, (-1, BLOCK)).amax(dim=2) if whole else x.new_empty(x.shape[0], 0)
    return maxima if whole == columns else torch.cat([maxima, x[:, whole:].amax(dim=1, keepdim=True)], dim=1)


def merge(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of (value, id) pairs [C, M] by value, then by lowest id; ids below 2^31, in any order."""
    if not values.is_cuda:
        if values.shape[1] > k and (largest := _largest(values, k)) is not None:
            values, ids = values.gather(1, largest), ids.gather(1, largest)
        if values.shape[1] == k and bool((values[:, :-1] > values[:, 1:]).all()):
            return values, ids
    if values.dtype == torch.float64:
        by_id = ids.argsort(dim=1, stable=True)
        order = by_id.gather(1, values.gather(1, by_id).argsort(dim=1, stable=True, descending=True)[:, :k])
    else:
        order = _sort_keys(values, ids).topk(k, dim=1).indices
    return values.gather(1, order), ids.gather(1, order)


def _largest(values: Tensor, k: int) -> Tensor | None:
    """Positions [C, k] of the k < M largest of [C, M], descending, or None where equal values (or NaN) leave open which those are.

    A search takes time by the values that it looks at: the k best of M / 4 groups come first, by their maxima, and then those inside them.
    """
    groups, positions = values.shape[1] // _GROUP, None
    if groups > k and 3 * groups * _GROUP > 2 * (groups + _GROUP * k):
        whole = groups * _GROUP
        best = _largest(values[:, :whole].unflatten(1, (_GROUP, groups)).amax(dim=1), k)
        if best is None:
            return None
        positions = (best.unsqueeze(1) + groups * torch.arange(_GROUP).unsqueeze(1)).flatten(1)
        if whole < values.shape[1]:
            positions = torch.cat([positions, torch.arange(whole, values.shape[1]).expand(values.shape[0], -1)], dim=1)
        values = values.gather(1, positions)
    top = values.topk(k + 1, dim=1)
    if not bool((top.values[:, k - 1] > top.values[:, k]).all()):
        return None
    best = top.indices[:, :k]
    return best if positions is None else positions.gather(1, best)


def _sort_keys(values: Tensor, ids: Tensor) -> Tensor:
    """Distinct int64 keys whose order is (value ascending, id descending); +0 and -0 are equal values."""
    bits = (values + 0.0).view(torch.int32)
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) + (_NO_ID - ids)


class RunningTopk:
    """The k best columns seen so far of each token."""

    def __init__(self, tokens: int, k: int, like: Tensor) -> None:
        self._values = like.new_full((tokens, k), _NEG_INF)
        self._ids = torch.full((tokens, k), _NO_ID, dtype=torch.int64, device=like.device)

    def add(self, x: Tensor, rows: slice, start: int, block_max: Tensor | None = None) -> None:
        """Offers columns x [C, cv], whose first has the global id `start`."""
        k = self._values.shape[1]
        values, ids = topk_of(x, min(k, x.shape[1]), block_max)
        values, ids = torch.cat([self._values[rows], values], dim=1), torch.cat([self._ids[rows], ids + start], dim=1)
        self._values[rows], self._ids[rows] = merge(values, ids, k)

    def result(self, group: Any) -> tuple[Tensor, Tensor]:
        """(values, ids) [N, k] over the columns of all ranks; -1 where there are fewer than k columns."""
        return best_of_ranks(self._values, self._ids, self._values.shape[1], group)


def best_of_ranks(values: Tensor, ids: Tensor, k: int, group: Any) -> tuple[Tensor, Tensor]:
    """(values, ids) [N, k] from the ranks' at most k best [N, *], descending; -1 where there are fewer than k columns."""
    missing = (0, k - values.shape[1])
    values, ids = F.pad(values, missing, value=_NEG_INF), F.pad(ids, missing, value=_NO_ID)
    if group is not None:
        values, ids = (gather_ranks(part, group).permute(1, 0, 2).flatten(1) for part in (values, ids))
        values, ids = merge(values, ids, k)
    return values, torch.where(ids == _NO_ID, -1, ids)
