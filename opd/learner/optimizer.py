"""AdamW over named tensors, as both learners use it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd.learner.types import OptimizerSettings


def adamw(tensors: Mapping[str, Tensor], settings: OptimizerSettings) -> torch.optim.AdamW:
    """Weight decay on matrices only (not on biases, norms and other vectors). Raises ValueError when there is nothing to train."""
    if not tensors:
        raise ValueError("no parameter of the model takes a gradient; there is nothing to train")
    decayed = [tensor for tensor in tensors.values() if tensor.dim() >= 2]
    plain = [tensor for tensor in tensors.values() if tensor.dim() < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if settings.weight_decay == 0.0:
        groups = [{"params": list(tensors.values()), "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(tensors: Sequence[Tensor], largest: float) -> tuple[bool, float]:
    """Scales all gradients together to a global norm of at most `largest`: (all finite, norm before); leaves them alone if not finite."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    finite = bool(torch.isfinite(norm))
    if finite:
        torch.nn.utils.clip_grads_with_norm_(tensors, largest, norm)
    return finite, float(norm)
