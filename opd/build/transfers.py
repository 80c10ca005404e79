"""Which way the learner's weights take to the vLLM actors, and why."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from opd_rollout.vllm_cluster import own_address, places
from opd_rollout.vllm_types import Place
from opd_rollout.weight_sync import SharedMemoryParcels, Transfer

from opd.build.devices import compute_device
from opd.config.recipe import Recipe
from opd.launcher.ranks import Ranks

SHARED_MEMORY, NCCL, IPC = "shared_memory", "nccl", "ipc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """backend: of vLLM's workers, by its name there. route: a sentence for people."""

    transfer: Transfer
    backend: str
    route: str


def make_transfer(recipe: Recipe, actors: Sequence[tuple[str, Any]], exchange: Path, attempt: str, ranks: Ranks, trainable: int) -> Sending:
    """How this rank takes part in sending. attempt: a word that all ranks of one start share. trainable: parameters that learn.

    Raises ValueError, on all ranks, where the recipe's way cannot work.
    """
    e, colocated = recipe.engine, recipe.engine.placement == "colocated"
    found = ranks.first(_places(actors, exchange, e.deadline_seconds) if ranks.leads else [])  # another machine's ranks may not see the folder
    if colocated and not any(place.is_open for place in found):  # those of an earlier start of the ranks have their memory already
        check_shared_gpu(e.memory_share, ranks.gather(torch.cuda.mem_get_info()), moment_bytes(recipe, trainable, ranks.count))
    can_share = colocated and e.num_gpus == ranks.count and recipe.launch.nodes == 1
    on_gpus = compute_device().type == "cuda"
    way, why = chosen_transfer(e.transfer, found, exchange, on_gpus=on_gpus, colocated=colocated, can_share=can_share, whole=e.lora == "merged")
    made: dict[str, tuple[str, str, Callable[[], Transfer]]] = {
        SHARED_MEMORY: ("opd_shared_memory", "a file in shared memory", partial(SharedMemoryParcels, exchange, attempt, leads=ranks.leads)),
        NCCL: ("nccl", "NCCL", partial(_nccl, ranks.rank, [place.address for place in found], e.tensor_parallel, attempt)),
        IPC: ("opd_ipc", "CUDA IPC", partial(_ipc, ranks.rank, e.tensor_parallel, attempt)),
    }
    backend, name, make = made[way]
    return Sending(transfer=make(), backend=backend, route=f"weights reach {len(actors)} vLLM actor{'s' * (len(actors) > 1)} by {name} ({why})")


def _places(actors: Sequence[tuple[str, Any]], exchange: Path, deadline_seconds: float) -> list[Place]:
    with tempfile.NamedTemporaryFile(dir=exchange, prefix="opd-probe-") as probe:
        return places(actors, probe.name, deadline_seconds)


def _nccl(rank: int, actors_at: Sequence[str], workers: int, attempt: str) -> Transfer:
    """vLLM is imported only here: a learner that writes files need not wait for it."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    return import_module("opd_rollout.vllm_nccl").nccl_broadcast(rank, own_address(), actors_at, workers, attempt)


def _ipc(rank: int, workers: int, attempt: str) -> Transfer:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    return import_module("opd_rollout.vllm_ipc").cuda_ipc(rank, workers, attempt)


def chosen_transfer(
    asked: str, places: Sequence[Place], exchange: Path, *, on_gpus: bool, colocated: bool, can_share: bool = False, whole: bool = True
) -> tuple[str, str]:
    """(shared_memory, nccl or ipc, the reason in words). places: where the actors are, and whether they see `exchange`.

    can_share: every learner rank shares its GPU with one worker. whole: whole weights travel, not LoRA factors alone.
    Raises ValueError where `asked` (auto, shared_memory, nccl or ipc) cannot work.
    """
    apart = sorted({place.address for place in places if not place.sees})
    where = f"the actors at {', '.join(apart)} do not see the learner's {exchange}"
    if asked in (NCCL, IPC):
        return asked, f"engine.transfer={asked}"
    if asked == "auto" and on_gpus and colocated and can_share and whole:
        return IPC, "every rank shares its GPU with one of the actors' workers"
    if not apart:
        return SHARED_MEMORY, f"all actors see {exchange}" if asked == "auto" else "engine.transfer=shared_memory"
    folder = "a folder that all machines share (engine.exchange=FOLDER)"
    if asked == SHARED_MEMORY:
        raise ValueError(f"engine.transfer=shared_memory: {where}: use {folder}{' or engine.transfer=nccl' if on_gpus and not colocated else ''}")
    if not whole:
        raise ValueError(f"engine.lora=adapters sends factors as a file, and {where}: use {folder}, or engine.lora=merged")
    if not on_gpus or colocated:
        kind = "colocated actors share the learner's GPU, on which NCCL cannot have two members" if colocated else "here is no GPU for NCCL"
        raise ValueError(f"engine.transfer: {where}, and {kind}: use {folder}")
    return NCCL, where


def moment_bytes(recipe: Recipe, trainable: int, ranks: int) -> int:
    """Adam's two moments in fp32 on one rank's GPU, which come with the first step; see opd.preflight.memory.learner_memory."""
    sharded = recipe.learner.zero_stage >= 1 or recipe.model.dtype != "float32"
    return 0 if recipe.learner.offload else 8 * trainable // (ranks if sharded else 1)


def check_shared_gpu(memory_share: float, gpus: Sequence[tuple[int, int]], coming: int = 0) -> None:
    """Raises ValueError where a colocated actor does not fit beside the learner. gpus: (free, total) bytes of every rank's GPU; coming: bytes
    that the learner takes later and keeps."""
    free, total = min(gpus, key=lambda gpu: gpu[0] / gpu[1])
    left = free - coming
    if left < memory_share * total:
        fits = f"engine.memory_share={left / total - 0.02:.2f} or less, " if left / total > 0.03 else ""
        kept = f", {coming / 2**30:.1f} GiB kept for its moments" if coming else ""
        raise ValueError(
            f"engine.memory_share={memory_share:g}: a colocated actor wants {memory_share * total / 2**30:.1f} GiB, and beside the learner "
            f"{max(0, left) / 2**30:.1f} of {total / 2**30:.1f} GiB are free{kept}: use {fits}"
            "learner.offload=true with ZeRO, or engine.placement=separate"
        )
