"""Values whose gradients were formed in the forward pass, joined to autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_kernels.dlogits import GradientSums
from opd_kernels.first_order import first_order

_SLICE_BYTES = 64 << 20


def needs_gradient(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Whether each input takes a gradient here: False under no_grad, for constants and for None."""
    return tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors)


def attach(
    value: Tensor,
    gradients: GradientSums,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None = None,
    scale: Callable[[Tensor, Tensor, torch.dtype], Tensor] | None = None,
) -> Tensor:
    """`value` with the given gradients: of a scalar, or of sum(token_weight * value) for value [N]. `scale`: does what `scaled` does.

    In the second case backward raises ValueError (a device-side assert on CUDA) unless the upstream gradient is proportional to
    token_weight.
    """
    if not any(needs_gradient(hidden, weight, bias)):
        return value
    return _Precomputed.apply(value, scale or scaled, token_weight, gradients.hidden, gradients.weight, gradients.bias, hidden, weight, bias)


class _Precomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        scale: Callable[[Tensor, Tensor, torch.dtype], Tensor],
        token_weight: Tensor | None,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(token_weight, d_hidden, d_weight, d_bias)
        ctx.scale = scale
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return value.view_as(value)

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        token_weight, *saved = ctx.saved_tensors
        factor = upstream if token_weight is None else _proportion(upstream, token_weight)
        grads = [None if grad is None else ctx.scale(grad, factor, dtype) for grad, dtype in zip(saved, ctx.dtypes, strict=True)]
        return (None, None, None, None, None, None, *grads)


def _proportion(upstream: Tensor, token_weight: Tensor) -> Tensor:
    norm = token_weight.square().sum()
    factor = (upstream * token_weight).sum() / torch.where(norm == 0, 1.0, norm)
    deviation = (upstream - factor * token_weight).abs().max()
    holds = ~(deviation > 1e-4 * upstream.abs().max())
    if upstream.is_cuda:
        torch._assert_async(holds, "the upstream gradient of dense_divergence is not proportional to token_weight")
    elif not bool(holds):
        raise ValueError(
            "the upstream gradient of dense_divergence is not proportional to token_weight; weigh D with the same token_weight, "
            "or leave token_weight out"
        )
    return factor


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`, rounded once, without a second full-size copy in the accumulation dtype."""
    if not factor.is_cuda and dtype == gradient.dtype and factor.item() == 1.0:
        return gradient
    out = torch.empty_like(gradient, dtype=dtype)
    flat_out, flat_in = out.flatten(), gradient.flatten()
    step = _SLICE_BYTES // gradient.element_size()
    for start in range(0, flat_in.numel(), step):
        torch.mul(flat_in[start : start + step], factor, out=flat_out[start : start + step])
    return out
