"""Which tensors a piece of code allocates: the largest one, and the most bytes alive at a time; and what the system counts."""

import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts storages that appear in the results of operations, those of `known` tensors left out."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: dict[int, int] = {}
        self.largest_bytes = 0
        self.peak_bytes = 0

    @property
    def alive_bytes(self) -> int:
        return sum(self._alive.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or pointer in self._known or pointer in self._alive:
            return
        self._alive[pointer] = size
        weakref.finalize(storage, self._alive.pop, pointer, None)
        self.largest_bytes = max(self.largest_bytes, size)
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)


def allocations_of(work: Callable[[], object], *known: torch.Tensor) -> Allocations:
    with Allocations(*known) as counted:
        work()
    return counted


def status_bytes(field: str) -> int:
    """A size that the system counts for this process, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))
