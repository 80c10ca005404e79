"""Sums over the ranks of a vocabulary split; every reduction runs in rank order, so that results repeat bitwise."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_kernels.selection import FLOOR, RunningSums

_NEG_INF = float("-inf")


def gather_ranks(tensor: Tensor, group: Any) -> Tensor:
    """[world, ...] of equally shaped tensors, in rank order."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def combine_sums(sums: RunningSums, group: Any) -> RunningSums:
    """Running sums over the columns of all ranks."""
    if group is None:
        return sums
    m, l, t = gather_ranks(torch.stack([sums.m, sums.l, sums.t]), group).unbind(dim=1)  # noqa: E741
    top = m.amax(dim=0)
    offset = torch.where(m == _NEG_INF, FLOOR, m - torch.where(top == _NEG_INF, 0.0, top))
    weight = offset.exp()
    return RunningSums(m=top, l=(l * weight).sum(dim=0), t=(weight * (t + torch.where(l == 0, 0.0, offset * l))).sum(dim=0))


def sum_ranks(tensor: Tensor, group: Any) -> Tensor:
    """Sum over ranks, in rank order; for small tensors."""
    return tensor if group is None else gather_ranks(tensor, group).sum(dim=0)


def collect_selected(selected: Tensor, owned: Tensor, group: Any) -> Tensor:
    """Logits [N, K] of which each rank holds those it owns; -inf where no rank does."""
    if group is None:
        return torch.where(owned, selected, _NEG_INF)
    values, owners = gather_ranks(torch.stack([torch.where(owned, selected, 0.0), owned.to(selected.dtype)]), group).sum(dim=0)
    return torch.where(owners > 0, values, _NEG_INF)


def reduce_hidden_gradient(gradient: Tensor | None, group: Any) -> None:
    """Adds up the ranks' shares of the hidden states' gradient, in place."""
    if gradient is not None and group is not None:
        dist.all_reduce(gradient, group=group)


def any_over_ranks(flag: bool, group: Any, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    return flag if group is None else smallest_over_ranks(0 if flag else 1, group, device) == 0


def smallest_over_ranks(count: int, group: Any, device: torch.device) -> int:
    """The smallest of the ranks' counts: chunk sizes must agree where collectives run once a chunk."""
    if group is None:
        return count
    agreed = torch.tensor([count], device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
    return int(agreed.item())
