"""Runs a function on several gloo ranks of this machine."""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

DEADLINE_SECONDS = 180.0


def launch(function: Callable[..., None], world: int, folder: Path, *args: object) -> None:
    """Calls function(rank, world, *args) in `world` new processes with a gloo group; the first failure is raised here."""
    context = torch.multiprocessing.spawn(_enter, (function, world, str(folder), args), nprocs=world, join=False)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} on {world} ranks did not end within {DEADLINE_SECONDS:.0f} s")


def _enter(rank: int, function: Callable[..., None], world: int, folder: str, args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        function(rank, world, *args)
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the interpreter's own end races with threads that a collective's libraries leave: seen once as SIGABRT under load
