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

SHARED_MEMORY, NCCL = "shared_memory", "nccl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """backend: of vLLM's workers, by its name there. route: a sentence for people."""

    transfer: Transfer
    backend: str
    route: str


def make_transfer(recipe: Recipe, actors: Sequence[tuple[str, Any]], exchange: Path, attempt: str, ranks: Ranks) -> Sending:
    """How this rank takes part in sending. attempt: a word that all ranks of one start share.

    Raises ValueError, on all ranks, where the recipe's way cannot work.
    """
    e, colocated = recipe.engine, recipe.engine.placement == "colocated"
    with tempfile.NamedTemporaryFile(dir=exchange, prefix="opd-probe-") as probe:
        found = ranks.first(places(actors, probe.name, e.deadline_seconds) if ranks.leads else [])
    if colocated and not any(place.is_open for place in found):  # those of an earlier start of the ranks have their memory already
        check_shared_gpu(e.memory_share, ranks.gather(torch.cuda.mem_get_info()))
    way, why = chosen_transfer(e.transfer, found, exchange, on_gpus=compute_device().type == "cuda", colocated=colocated)
    made: dict[str, tuple[str, str, Callable[[], Transfer]]] = {
        SHARED_MEMORY: ("opd_shared_memory", "a file in shared memory", partial(SharedMemoryParcels, exchange, attempt, leads=ranks.leads)),
        NCCL: ("nccl", "NCCL", partial(_nccl, ranks.rank, [place.address for place in found], e.tensor_parallel, attempt)),
    }
    backend, name, make = made[way]
    return Sending(transfer=make(), backend=backend, route=f"weights reach {len(actors)} vLLM actor{'s' * (len(actors) > 1)} by {name} ({why})")


def _nccl(rank: int, actors_at: Sequence[str], workers: int, attempt: str) -> Transfer:
    """vLLM is imported only here: a learner that writes files need not wait for it."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    return import_module("opd_rollout.vllm_nccl").NcclBroadcast(rank, own_address(), actors_at, workers, attempt)


def chosen_transfer(asked: str, places: Sequence[Place], exchange: Path, *, on_gpus: bool, colocated: bool) -> tuple[str, str]:
    """(shared_memory or nccl, the reason in words). places: where the actors are, and whether they see `exchange`.

    Raises ValueError where `asked` (auto, shared_memory or nccl) cannot work.
    """
    apart = sorted({place.address for place in places if not place.sees})
    where = f"the actors at {', '.join(apart)} do not see the learner's {exchange}"
    if asked == NCCL:
        return NCCL, "engine.transfer=nccl"
    if not apart:
        return SHARED_MEMORY, f"all actors see {exchange}" if asked == "auto" else "engine.transfer=shared_memory"
    folder = "a folder that all machines share (engine.exchange=FOLDER)"
    if asked == SHARED_MEMORY:
        raise ValueError(f"engine.transfer=shared_memory: {where}: use {folder}{' or engine.transfer=nccl' if on_gpus and not colocated else ''}")
    if not on_gpus or colocated:
        kind = "colocated actors share the learner's GPU, on which NCCL cannot have two members" if colocated else "here is no GPU for NCCL"
        raise ValueError(f"engine.transfer: {where}, and {kind}: use {folder}")
    return NCCL, where


def check_shared_gpu(memory_share: float, gpus: Sequence[tuple[int, int]]) -> None:
    """Raises ValueError where a colocated actor does not fit beside the learner. gpus: (free, total) bytes of every rank's GPU."""
    free, total = min(gpus, key=lambda gpu: gpu[0] / gpu[1])
    if free < memory_share * total:
        raise ValueError(
            f"engine.memory_share={memory_share:g}: a colocated actor wants {memory_share * total / 2**30:.1f} GiB, and beside the learner "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free: use engine.memory_share={max(0.01, free / total - 0.02):.2f} or less, "
            "learner.offload=true with ZeRO, or engine.placement=separate"
        )
