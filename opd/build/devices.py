"""What torch finds to compute on."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from opd.config.recipe import Recipe

MEBIBYTE = 1 << 20
CHUNK_BYTES = {"cpu": (64, 64 * MEBIBYTE, 320 * MEBIBYTE), "cuda": (32, 64 * MEBIBYTE, 2560 * MEBIBYTE)}
"""One part in so many of the free memory, at least and at most. More makes nothing faster: 320 MiB are 512 rows of 151,936 columns."""


def compute_device() -> torch.device:
    """Where a process's models live: its current GPU, or the CPU where there is none or DeepSpeed is told to stay there."""
    has_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")


def visible_gpus() -> tuple[str, ...]:
    """GPUs of this process, as CUDA_VISIBLE_DEVICES of a child names them."""
    count, given = torch.cuda.device_count(), [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    return tuple(given[:count]) if given else tuple(map(str, range(count)))


def device_facts(recipe: Recipe) -> dict[str, Any]:
    """The manifest's part that only torch knows: GPUs by name, the CUDA version, threads of a process, the head's budget of bytes."""
    return {
        "accelerators": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda or "",
        "threads": torch.get_num_threads(),
        "chunk_bytes": chunk_bytes_of(recipe),
    }


def chunk_bytes_from(free_bytes: int, device_type: str) -> int:
    """The budget of logits held at once, in whole 64 MiB, where the recipe leaves it open."""
    share, least, most = CHUNK_BYTES[device_type]
    return min(most, max(least, free_bytes // share // least * least))


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses: of a GPU, or what this machine's processes could still get."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if Path("/proc/meminfo").is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def chunk_bytes_of(recipe: Recipe) -> int:
    """learner.chunk_bytes as a number."""
    asked, device = recipe.learner.chunk_bytes, compute_device()
    return chunk_bytes_from(free_bytes(device), device.type) if asked == "auto" else asked


def with_chunk_bytes(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a number for learner.chunk_bytes: its own, the one that the run in `folder` began with, or what fits now.

    Last bits of sums over the vocabulary depend on it, so a run that goes on keeps its number.
    """
    chosen, resolved = chunk_bytes_of(recipe), folder / "resolved.json"
    if recipe.learner.chunk_bytes == "auto" and resolved.is_file():
        chosen = recorded_chunk_bytes(json.loads(resolved.read_text(encoding="utf-8"))) or chosen
    return recipe.model_copy(update={"learner": recipe.learner.model_copy(update={"chunk_bytes": chosen})})


def recorded_chunk_bytes(resolved: dict[str, Any]) -> int:
    """What the run of a resolved.json used; 0 where it does not say."""
    asked = resolved["recipe"].get("learner", {}).get("chunk_bytes", 0)
    return resolved.get("chunk_bytes", 0) if asked == "auto" else asked
