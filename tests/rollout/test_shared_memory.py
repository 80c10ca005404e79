"""A version of the weights as a file: the same bytes, one file at a time, none left by the dead, and a sentence where it does not fit."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from opd_rollout import shared_memory
from opd_rollout.shared_memory import read, remove_stale
from opd_rollout.types import ModuleWeights
from opd_rollout.weight_sync import SharedMemoryParcels


def weights(version=1):
    generator = torch.Generator().manual_seed(version)
    named = {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator).bfloat16(), "c": torch.arange(4)}
    return ModuleWeights(version=version, named=tuple(named.items()))


def test_a_version_is_read_as_it_was_sent_and_goes_when_the_next_is_in_place(tmp_path):
    parcels = SharedMemoryParcels(tmp_path)
    for version in (1, 2, 3):
        parcel = parcels.make(weights(version))
        assert parcel.version == version
        for (name, found), (sent_name, sent) in zip(read(parcel.written), weights(version).named, strict=True):
            assert name == sent_name and found.dtype == sent.dtype and torch.equal(found, sent)
        assert len(list(tmp_path.iterdir())) == min(version, 2), "the one before stays for an actor that restarts in mid-update"
        parcels.done()
        assert len(list(tmp_path.iterdir())) == 1
    parcels.close()
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import sys, time
from pathlib import Path
import torch
from opd_rollout.types import ModuleWeights
from opd_rollout.weight_sync import SharedMemoryParcels
made = SharedMemoryParcels(Path(sys.argv[1])).make(ModuleWeights(version=1, named=(("a", torch.ones(3)),)))
print(made.written.path, flush=True)
time.sleep(60)
"""


def test_files_of_killed_runs_are_removed_and_those_of_living_ones_stay(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    path = holder.stdout.readline().strip()
    try:
        own = SharedMemoryParcels(tmp_path)
        own.make(weights())
        assert os.path.exists(path) and remove_stale(tmp_path, "*") == [], "both writers live"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    SharedMemoryParcels(tmp_path, leads=False)
    assert os.path.exists(path), "one rank cleans, the one that writes"
    SharedMemoryParcels(tmp_path)
    assert not os.path.exists(path) and len(list(tmp_path.iterdir())) == 1
    own.close()


def test_too_little_room_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda path: usage._replace(free=1 << 19))
    with pytest.raises(ValueError, match="has 0 MiB free, and one version of the weights needs 0 MiB; enlarge it .* engine.exchange"):
        SharedMemoryParcels(tmp_path).make(weights())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared_memory.os, "posix_fallocate", full)
    with pytest.raises(ValueError, match="became full, and one version of the weights needs 0 MiB; enlarge it .* engine.exchange"):
        SharedMemoryParcels(tmp_path).make(weights())
    assert list(tmp_path.iterdir()) == []
