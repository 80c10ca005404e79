"""Liger's fused layers (norms, rotary embedding, gated MLP) in the place of a Hugging Face model's own: `model.liger`. Not run on a GPU so far."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from opd.build.devices import compute_device

ARGUMENTS = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # the head is ours
FIX = "or leave model.liger out"


def check_fused(model_type: str, *, planned: bool = False) -> None:
    """Raises ValueError where Liger is not installed, or has no layers for the family; unless it is only planned for, also without a GPU."""
    if not planned and compute_device().type == "cpu":
        raise ValueError(f"model.liger: Liger's layers are Triton kernels, which need a GPU, and here is none: run on a GPU, {FIX}")
    if find_spec("liger_kernel") is None:
        raise ValueError(f'model.liger needs liger-kernel, which is not installed: pip install "opd-train[gpu]", {FIX}')
    if not planned and model_type not in (known := patches()):
        raise ValueError(f"model.liger: Liger has no layers for the type {model_type!r}: leave model.liger out (it knows {', '.join(known)})")


def patches() -> dict[str, Any]:
    """Model type -> Liger's function that patches a model of it; imported when it is needed, because Liger asks Triton for a GPU."""
    return import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN


def fuse(model: torch.nn.Module) -> None:
    """Put Liger's layers into the model, weights as they are. Raises ValueError as check_fused."""
    check_fused(model.config.model_type)
    patches()[model.config.model_type](model=model, **ARGUMENTS)
