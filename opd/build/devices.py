"""What torch finds to compute on."""

from typing import Any

import torch


def device_facts() -> dict[str, Any]:
    """The manifest's part that only torch knows: GPUs by name, the CUDA version, threads of a process."""
    return {
        "accelerators": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda or "",
        "threads": torch.get_num_threads(),
    }
