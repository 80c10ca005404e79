"""Backward passes that have no derivative of their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a backward pass raise RuntimeError under create_graph=True.

    torch's once_differentiable raises only where the upstream gradient itself requires one, and is silently constant elsewhere.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("opd_kernels gives first derivatives only; call backward without create_graph=True")
        return backward(ctx, *upstream)

    return checked
