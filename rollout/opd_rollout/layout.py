"""Where every token of a batch of sequences lies: all index arithmetic of the project.

Legend: R rows, S tokens a row, N completion tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """Whole sequences (context then completion), padded on the right (positions run on through the pads) or packed into one row.

    input_ids, position_ids [R, S]; attention_mask [R, S] (1 for real tokens) or None when packed (positions restart at every sequence).
    predict_at [N]: flat row of the hidden states [R*S, D] that predicts completion token n. token, sequence, position [N] int64;
    sequence counts within this layout, position within the completion.

    Example: context (5, 6, 7), completion (8, 9, 2) ->
    input_ids [[5, 6, 7, 8, 9, 2]], predict_at [2, 3, 4], token [8, 9, 2], position [0, 1, 2].
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    predict_at: Tensor
    token: Tensor
    sequence: Tensor
    position: Tensor
    num_sequences: int


def lay_out(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int = 0, packed: bool) -> TokenLayout:
    """Lays (context ids, completion ids) pairs out in one batch, on the CPU; see TokenLayout for what each field means.

    A completion may be empty: it adds no rows. Raises ValueError for no sequences or an empty context, since nothing would predict
    the completion's first token.
    """
    if not sequences:
        raise ValueError("there are no sequences to lay out; pass at least one")
    for index, (context, _) in enumerate(sequences):
        if len(context) == 0:
            raise ValueError(f"sequence {index} has an empty context; it needs at least one token to predict from")
    lengths = [len(context) + len(completion) for context, completion in sequences]
    row_length = sum(lengths) if packed else max(lengths)
    starts = _packed_starts(lengths) if packed else [index * row_length for index in range(len(sequences))]
    if packed:
        rows = [list(chain.from_iterable(chain(context, completion) for context, completion in sequences))]
        positions = torch.tensor([list(chain.from_iterable(range(length) for length in lengths))])
        mask = None
    else:
        rows = [[*context, *completion, *[pad_id] * (row_length - len(context) - len(completion))] for context, completion in sequences]
        positions = torch.arange(row_length).repeat(len(sequences), 1)
        mask = (positions < torch.tensor(lengths).unsqueeze(1)).to(torch.int64)
    counts = torch.tensor([len(completion) for _, completion in sequences])
    sequence = torch.repeat_interleave(torch.arange(len(sequences)), counts)
    position = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts)[sequence]
    first_predictor = torch.tensor([start + len(context) - 1 for start, (context, _) in zip(starts, sequences, strict=True)])
    return TokenLayout(
        input_ids=torch.tensor(rows, dtype=torch.int64),
        position_ids=positions,
        attention_mask=mask,
        predict_at=first_predictor[sequence] + position,
        token=torch.tensor(list(chain.from_iterable(completion for _, completion in sequences)), dtype=torch.int64),
        sequence=sequence,
        position=position,
        num_sequences=len(sequences),
    )


def _packed_starts(lengths: Sequence[int]) -> list[int]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [0, *ends[:-1]]


def to_device(layout: TokenLayout, device: torch.device) -> TokenLayout:
    """The same layout with every tensor on `device`."""
    values: dict[str, Any] = {field.name: getattr(layout, field.name) for field in fields(layout)}
    return TokenLayout(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()})


PASS_TOKENS = 128
"""What a forward pass costs beyond its tokens, counted in tokens: a padded batch is cut where that saves more padding than this."""


def split_by_budget(lengths: Sequence[int], token_budget: int, *, pass_tokens: int | None = None) -> list[list[int]]:
    """Indices of sequences grouped into batches whose padded size (rows x longest, in tokens) stays within the budget.

    Deterministic: sequences are taken from the longest to the shortest, equal lengths in the given order. A sequence longer than the
    budget stands alone. With `pass_tokens` (the cost of one more batch) the cuts minimise padded tokens + pass_tokens x batches;
    without, there are as few batches as the budget allows. Raises ValueError for a budget below 1.

    Example: lengths [3, 9, 4, 4], budget 9 -> [[1], [2, 3], [0]].
    """
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}; it must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    ends = [len(order)] if pass_tokens is None else _cheapest_cuts([lengths[index] for index in order], token_budget, pass_tokens)
    return [batch for start, end in pairwise([0, *ends]) for batch in _filled(order[start:end], lengths, token_budget)]


def _filled(order: Sequence[int], lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    start = 0
    while start < len(order):
        rows = max(1, token_budget // max(1, lengths[order[start]]))
        yield list(order[start : start + rows])
        start += rows


def _cheapest_cuts(falling: Sequence[int], token_budget: int, pass_tokens: int) -> list[int]:
    """Where to cut lengths in falling order: ends of the segments that cost least, a segment being padded to its first length."""
    starts = [0, *(index for index in range(1, len(falling)) if falling[index] < falling[index - 1])]
    if len(starts) < 2:
        return [len(falling)]
    begin, longest = torch.tensor(starts), torch.tensor([max(1, falling[index]) for index in starts])
    rows_a_pass = (token_budget // longest).clamp_min(1)
    best, came_from = torch.zeros(len(starts) + 1, dtype=torch.int64), [0]
    for segment, end in enumerate([*starts[1:], len(falling)], start=1):
        rows = end - begin[:segment]
        passes = (rows + rows_a_pass[:segment] - 1) // rows_a_pass[:segment]
        cost = best[:segment] + rows * longest[:segment] + pass_tokens * passes
        came_from.append(int(cost.argmin()))
        best[segment] = cost[came_from[-1]]
    ends, segment = [], len(starts)
    while segment:
        ends.append(len(falling) if segment == len(starts) else starts[segment])
        segment = came_from[segment]
    return ends[::-1]
