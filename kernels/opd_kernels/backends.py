"""Choice of backend by name; the one place that imports a backend module late."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger("opd_kernels")

MODULES = {"reference": "opd_kernels.reference", "torch": "opd_kernels.chunked", "triton": "opd_kernels.triton_backend"}


def choose_backend(name: str, hidden: Tensor, *, torch_only: str | None = None) -> ModuleType:
    """The backend module for `name` (auto, reference, torch or triton); logs once which one was taken and why.

    `torch_only` says why Triton cannot serve this call, where it cannot. Raises ValueError for an unknown name, and for triton
    where it cannot run.
    """
    if name not in ("auto", *MODULES):
        raise ValueError(f"backend is {name!r}; it must be one of auto, {', '.join(MODULES)}")
    obstacle = torch_only or _triton_obstacle(hidden, interpreted=name == "triton" and os.environ.get("TRITON_INTERPRET") == "1")
    if name == "triton" and obstacle:
        raise ValueError(f"backend is 'triton', but {obstacle}; use backend='auto' or 'torch'")
    chosen, reason = (name, "asked for by name") if name != "auto" else ("torch", obstacle) if obstacle else ("triton", "CUDA tensors")
    _log_choice(chosen, reason)
    return importlib.import_module(MODULES[chosen])


def _triton_obstacle(hidden: Tensor, *, interpreted: bool) -> str | None:
    if hidden.dtype == torch.float64:
        return "fp64 needs the torch or reference backend"
    if not _triton_installed():
        return "triton is not installed"
    if not hidden.is_cuda and not interpreted:
        return f"the tensors are on {hidden.device.type} (TRITON_INTERPRET=1 runs it on the CPU, for tests)"
    return None


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _log_choice(chosen: str, reason: str) -> None:
    logger.info("opd_kernels backend %s: %s", chosen, reason)
