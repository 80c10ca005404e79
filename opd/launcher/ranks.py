"""This process among the learner's ranks: small values that all of them agree on.

Every method is collective: all ranks call the same ones in the same order. An error of one rank takes the place of its value in the next
exchange and is raised on all of them, so that nobody waits for a rank that has given up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd.errors import Preempted
from opd.types import Meter

VALUE, STOP, INPUT = "value", "stop", "input"
TOTALS = "tokens/"  # meters that count: their sums over the ranks are one count, not a mean of several


class Ranks:
    """`rank` of `count`. exchange(value) -> the values of all ranks, in rank order.

    beside: the same ranks for another thread, whose exchanges have an order of their own; this object where there is none.
    """

    def __init__(
        self, *, rank: int = 0, count: int = 1, exchange: Callable[[Any], list[Any]] | None = None, beside: "Ranks | None" = None
    ) -> None:
        assert (count == 1) == (exchange is None)
        self.rank, self.count, self._exchange, self._raised = rank, count, exchange, False
        self.beside = beside or self

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order. Raises what another rank has announced instead of its value."""
        self._raised = False
        if self._exchange is None:
            return [value]
        said = self._exchange((VALUE, value))
        self._raised = any(kind != VALUE for kind, _ in said)
        for rank, (kind, text) in enumerate(said):
            if kind == INPUT:
                raise ValueError(f"rank {rank}: {text}")
        for kind, text in said:
            if kind == STOP:
                raise Preempted(text)
        return [found for _, found in said]

    def announce(self, error: Preempted | ValueError) -> None:
        """Let the other ranks raise this error in their next exchange; nothing where they have raised it already."""
        if self._exchange is not None and not self._raised:
            self._exchange((STOP if isinstance(error, Preempted) else INPUT, str(error)))
        self._raised = False

    @contextmanager
    def announcing(self) -> Iterator[None]:
        """Announces the error of a block whose only collectives are those of this object."""
        try:
            yield
        except (Preempted, ValueError) as error:
            self.announce(error)
            raise

    def first(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather(value)[0]

    def wait(self) -> None:
        """Returns when every rank is here."""
        self.gather(None)

    def pool(self, values: Tensor) -> Tensor:
        """[n] -> [n over all ranks], joined in rank order; see opd/pooling.py."""
        return values if self.count == 1 else torch.cat(self.gather(values))

    def summed(self, meters: Mapping[str, Meter]) -> dict[str, Meter]:
        """Sums and counts over the ranks, by name; a total (tokens/...) stays one count."""
        if self.count == 1:
            return dict(meters)
        total: dict[str, Meter] = {}
        for found in self.gather(dict(meters)):
            for name, meter in found.items():
                before = total.get(name, Meter(sum=0.0, count=0.0))
                count = 1.0 if name.startswith(TOTALS) else before.count + meter.count
                total[name] = Meter(sum=before.sum + meter.sum, count=count)
        return total


ALONE = Ranks()


def dealt(items: Sequence[Any], wanted: Sequence[int], rank: int) -> list[Any]:
    """This rank's part of `items`, dealt one by one in rank order to every rank that still wants some."""
    assert len(items) == sum(wanted)
    left, owners = list(wanted), []
    while len(owners) < len(items):
        for owner, still in enumerate(left):
            if still:
                owners.append(owner)
                left[owner] -= 1
    return [item for item, owner in zip(items, owners, strict=True) if owner == rank]


def join_ranks(
    rendezvous: str, rank: int, count: int, deadline_seconds: float, waiting: Callable[[bool], None], *, backend: str, threads: int = 1
) -> Ranks:
    """Start torch's process group over all ranks, and a second one for small values, whose exchanges are reported to `waiting`.

    rendezvous: file:///PATH on one machine, tcp://HOST:PORT over several. backend: of the learner's own collectives, gloo or nccl.
    threads: 2 for `beside`.
    """
    timeout = timedelta(seconds=deadline_seconds)
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=count, timeout=timeout)
    if count == 1:
        return Ranks()

    def exchange_over(group: Any, waiting: Callable[[bool], None], value: Any) -> list[Any]:
        values: list[Any] = [None] * count
        waiting(True)
        dist.all_gather_object(values, value, group=group)
        waiting(False)
        return values

    def over(waiting: Callable[[bool], None], beside: Ranks | None) -> Ranks:
        group = dist.new_group(backend="gloo", timeout=timeout)
        return Ranks(rank=rank, count=count, exchange=partial(exchange_over, group, waiting), beside=beside)

    return over(waiting, over(lambda is_waiting: None, None) if threads > 1 else None)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or did not come in time."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("gloo/", "Connection closed", "Connection reset"))
