"""Tensors of one weight version in one shared-memory file: written once by the sender, mapped by every reader, removed after use.

A file is never written again: a reader that still maps it while a newer version is written must not see new bytes (nor a shorter file).
Its writer holds a lock on it, which the kernel gives back when the writer dies: a file that nobody holds is nobody's.
"""

import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from opd_rollout.types import WeightMetadata

ALIGNMENT = 64
MARGIN = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A finished file: where it is, and what it holds in order."""

    path: str
    metadata: WeightMetadata


def num_bytes(metadata: WeightMetadata) -> int:
    """Size of the file that holds these tensors."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in _sizes(metadata))


def write(path: Path, metadata: WeightMetadata, buckets: Iterable[Sequence[tuple[str, Tensor]]]) -> tuple[Written, int]:
    """Copy every bucket into a new file, each byte once; returns it and the descriptor that holds its lock, for `remove`.

    Raises ValueError for too little room, and AssertionError for tensors that metadata did not announce.
    """
    size = max(num_bytes(metadata), 1)
    lack = f"one version of the weights needs {size >> 20} MiB; enlarge it (docker run --shm-size=...), or name another folder with engine.exchange"
    free = shutil.disk_usage(path.parent).free
    if free < size + MARGIN:
        raise ValueError(f"{path.parent} has {free >> 20} MiB free, and {lack}")
    coming = path.with_suffix(".coming")  # until the lock is held, so that `remove_stale` of another run does not take it for a dead one's
    descriptor = os.open(coming, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.rename(coming, path)
        os.posix_fallocate(descriptor, 0, size)
        _fill(mmap.mmap(descriptor, size), metadata, buckets)
    except BaseException as error:
        coming.unlink(missing_ok=True)
        remove(path, descriptor)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"{path.parent} became full, and {lack}") from None
        raise
    return Written(path=str(path), metadata=metadata), descriptor


def remove(path: Path, descriptor: int) -> None:
    """The file and its lock."""
    path.unlink(missing_ok=True)
    os.close(descriptor)


def remove_stale(folder: Path, pattern: str) -> list[Path]:
    """Removes files whose writer is dead, and returns them; those of other users stay."""
    removed = []
    for path in folder.glob(pattern):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue  # gone a moment ago, or somebody else's
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path)
        except OSError:
            continue  # its writer lives
        finally:
            os.close(descriptor)
    return removed


def _fill(memory: mmap.mmap, metadata: WeightMetadata, buckets: Iterable[Sequence[tuple[str, Tensor]]]) -> None:
    expected, offset = iter(zip(metadata.names, metadata.shapes, metadata.dtypes, strict=True)), 0
    for bucket in buckets:
        for name, tensor in bucket:
            announced = next(expected, None)
            found = (name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            assert announced == found, f"metadata announced {announced}, the source sent {found}"
            target = _view(memory, offset, tensor.dtype, tuple(tensor.shape))
            target.copy_(tensor)
            offset += -(-target.nbytes // ALIGNMENT) * ALIGNMENT
    assert next(expected, None) is None, "the source sent fewer tensors than metadata announced"


def read(written: Written) -> list[tuple[str, Tensor]]:
    """(name, tensor) pairs over a private mapping of the file, which lives as long as a tensor does."""
    with open(written.path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    m, pairs, offset = written.metadata, [], 0
    for name, shape, dtype in zip(m.names, m.shapes, m.dtypes, strict=True):
        tensor = _view(memory, offset, getattr(torch, dtype), tuple(shape))
        pairs.append((name, tensor))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return pairs


def _view(memory: mmap.mmap, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=offset).view(shape)


def _sizes(metadata: WeightMetadata) -> list[int]:
    return [prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in zip(metadata.shapes, metadata.dtypes, strict=True)]
