"""Sizes of tiles and chunks under a scratch budget."""

from collections.abc import Iterator

import torch

_ALIGNMENT = 64
_CPU_WIDTH = 1024  # columns of a product: wider ones pack more of the weight than the caches hold, and run 5 to 15 % slower


def spans(total: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover range(total); the last may be shorter."""
    return (slice(start, min(total, start + step)) for start in range(0, total, step))


def tile_shape(tokens: int, columns: int, hidden_size: int, element_budget: int, device: torch.device) -> tuple[int, int]:
    """(rows, columns) of a tile of at most element_budget elements, such that a [columns, hidden] weight tile also fits it."""
    rows = min(tokens, 8192 if device.type == "cuda" else 4096, max(1, element_budget // _ALIGNMENT))
    width = max(1, element_budget // max(rows, hidden_size))
    return rows, _aligned(min(width, product_columns(columns, device)))


def product_columns(columns: int, device: torch.device) -> int:
    """Columns of logits that one product should make."""
    return max(1, columns if device.type == "cuda" else min(columns, _CPU_WIDTH))


def chunk_rows(tokens: int, columns: int, element_budget: int) -> int:
    """Whole rows of `columns` logits that fit the budget: a power of two where more than one fits."""
    fitting = max(1, element_budget // max(1, columns))
    return min(tokens, 1 << (fitting.bit_length() - 1))


def resident_rows(device: torch.device) -> int | None:
    """Whole rows of one head held at a time at most: on the CPU products run at full speed from here on, and more only touch new memory."""
    return None if device.type == "cuda" else 512


def inner_rows(columns: int, copies: int, element_budget: int, device: torch.device) -> int:
    """Whole rows that are worked on together: on the CPU as many as the last cache holds with `copies` of them at hand.

    A quarter of that would also stay in the caches before it, and takes four times as many calls: slower, most of all for wide vocabularies.
    It is what small budgets get, of which the work's own scratch would otherwise take too much.
    """
    elements = 1 << 24 if device.type == "cuda" else min(1 << 21, max(1 << 19, element_budget // 32))
    return max(1, elements // (copies * max(1, columns)))


def cast_columns(columns: int, hidden_size: int, device: torch.device) -> int:
    """Rows of a weight that are cast together where operands need another dtype than the weight's."""
    elements = 1 << (24 if device.type == "cuda" else 20)
    return _aligned(min(max(_ALIGNMENT, elements // hidden_size), max(1, columns)))


def _aligned(width: int) -> int:
    return width if width < _ALIGNMENT else width - width % _ALIGNMENT
