"""Per-token columns -> meters whose sums add over micro-batches and ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from opd.objective.compose import EVERY_TOKEN
from opd.types import Meter, TokenRows


def meters(columns: Mapping[str, Tensor], rows: TokenRows, denominators: Mapping[str, float]) -> dict[str, Meter]:
    """A meter a column. loss/...: the mean over an optimiser step's micro-batches and ranks is the step's loss; others: token means.

    A loss column is already divided by its denominator; scaling by the step's tokens and counting this batch's makes the sums add up to
    the loss. Other columns count where they are not NaN. One transfer from the device.
    """
    names = [name for name, column in columns.items() if not name.startswith("loss/")]
    losses = [name for name in columns if name.startswith("loss/")]
    values = [columns[name].sum(dtype=torch.float64) for name in losses]
    values += [columns[name].nansum(dtype=torch.float64) for name in names]
    values += [(~columns[name].isnan()).sum(dtype=torch.float64) for name in names]
    values += [rows.loss_mask.sum(dtype=torch.float64)]
    numbers = torch.stack(values).tolist()
    tokens, every = numbers[-1], denominators[EVERY_TOKEN]
    found = {name: Meter(sum=number * every, count=tokens) for name, number in zip(losses, numbers, strict=False)}
    middle = len(losses) + len(names)
    for index, name in enumerate(names):
        found[name] = Meter(sum=numbers[len(losses) + index], count=numbers[middle + index])
    return found
