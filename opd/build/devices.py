"""What torch finds to compute on."""

import os
from typing import Any

import torch


def compute_device() -> torch.device:
    """Where a process's models live: its current GPU, or the CPU where there is none or DeepSpeed is told to stay there."""
    has_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")


def device_facts() -> dict[str, Any]:
    """The manifest's part that only torch knows: GPUs by name, the CUDA version, threads of a process."""
    return {
        "accelerators": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda or "",
        "threads": torch.get_num_threads(),
    }
