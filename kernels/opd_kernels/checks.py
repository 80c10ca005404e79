"""Validation of what a caller passes: every mistake is a ValueError that names the argument, what it was and what it should be.

Values of CUDA tensors are checked by device-side asserts, so that no check waits for the device.
"""

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_kernels.divergences import checked as checked_divergence
from opd_kernels.types import Divergence, HeadConstants, LogitOptions, accumulation_dtype


def check_projection(hidden: Tensor, weight: Tensor, *, suffix: str = "") -> None:
    """Raises ValueError unless hidden [N, H] and weight [V, H] are floating, plain, on one device and fit together."""
    for name, tensor in (("hidden" + suffix, hidden), ("weight" + suffix, weight)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
        if hasattr(tensor, "full_tensor"):
            raise ValueError(f"{name} is a DTensor; call the operation inside opd_kernels.Head's forward, or pass {name}.full_tensor()")
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise ValueError(f"{name} has layout {kind}; it must be dense: pass {name}.to_{'padded_tensor(0.0)' if tensor.is_nested else 'dense()'}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must have two dimensions{_gather_hint(name, tensor)}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden{suffix} has shape {list(hidden.shape)} and weight{suffix} {list(weight.shape)}; "
            "their second dimensions (the hidden size) must be equal"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight{suffix} has shape {list(weight.shape)}; it must have at least one row and one column")
    if hidden.device != weight.device:
        raise ValueError(f"hidden{suffix} is on {hidden.device} and weight{suffix} on {weight.device}; they must be on one device")
    if hidden.device.type == "meta":
        raise ValueError(f"hidden{suffix} is on meta and has no values; it must be on the device that computes")
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(f"hidden{suffix} is {hidden.dtype} and weight{suffix} {weight.dtype}; fp64 needs both in fp64")


def _gather_hint(name: str, tensor: Tensor) -> str:
    partitioned = name.startswith("weight") and tensor.numel() == 0
    return " (it looks partitioned: call the operation inside opd_kernels.Head's forward)" if partitioned else ""


def check_ids(ids: Tensor, hidden: Tensor, total_columns: int | None) -> Tensor:
    """Returns ids [N, K] as contiguous int64; raises ValueError where they do not fit hidden or the vocabulary.

    K may exceed the vocabulary: ids of several scorers stand side by side, with pads and duplicates.
    """
    _check_index_tensor("ids", ids, hidden)
    if ids.dim() != 2 or ids.shape[0] != hidden.shape[0] or ids.shape[1] == 0:
        raise ValueError(f"ids has shape {list(ids.shape)}; it must be [{hidden.shape[0]}, K] with K at least 1")
    return _in_range("ids", ids, total_columns)


def check_included_ids(ids: Tensor, hidden: Tensor, total_columns: int | None) -> Tensor:
    """Returns always_include [N] as contiguous int64; raises ValueError where it does not fit."""
    _check_index_tensor("always_include", ids, hidden)
    if ids.dim() != 1 or ids.shape[0] != hidden.shape[0]:
        raise ValueError(f"always_include has shape {list(ids.shape)}; it must be [{hidden.shape[0]}]")
    return _in_range("always_include", ids, total_columns)


def _check_index_tensor(name: str, ids: Tensor, hidden: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {getattr(ids, 'dtype', type(ids).__name__)}; it must be an int32 or int64 tensor")
    if ids.layout != torch.strided:
        raise ValueError(f"{name} has layout {ids.layout}; it must be dense: pass {name}.to_dense()")
    if ids.device != hidden.device:
        raise ValueError(f"{name} is on {ids.device} and hidden on {hidden.device}; they must be on one device")


def _in_range(name: str, ids: Tensor, total_columns: int | None) -> Tensor:
    if ids.numel():
        upper = 2**62 if total_columns is None else total_columns
        _require_values((ids >= -1) & (ids < upper), name, ids, f"-1 (a pad) or an id from 0 to {upper - 1}, inside the valid vocabulary")
    return ids.to(torch.int64).contiguous()


def _require_values(holds: Tensor, name: str, values: Tensor, meaning: str) -> None:
    if holds.is_cuda:
        torch._assert_async(holds.all(), f"{name} holds a value that is not {meaning}")
    elif not bool(holds.all()):
        index = tuple(torch.nonzero(~holds)[0].tolist())
        raise ValueError(f"{name}{list(index)} is {values[index].item()}; it must be {meaning}")


def check_options(
    hidden: Tensor,
    weight: Tensor,
    constants: HeadConstants,
    *,
    temperature: float | Tensor,
    vocab_size: int | None,
    process_group: Any,
    vocab_start: int,
    chunk_bytes: int | None,
    suffix: str = "",
) -> LogitOptions:
    """Raises ValueError for options that do not fit the projection; `vocab_size` counts the valid columns of all ranks together."""
    rows = weight.shape[0]
    bias, softcap, logit_scale = constants.bias, constants.softcap, constants.logit_scale
    if bias is not None and not isinstance(bias, Tensor):
        raise ValueError(f"bias{suffix} is a {type(bias).__name__}; it must be a tensor [{rows}], or None")
    if bias is not None and bias.layout != torch.strided:
        raise ValueError(f"bias{suffix} has layout {bias.layout}; it must be dense: pass bias{suffix}.to_dense()")
    if bias is not None and (bias.shape != (rows,) or not bias.is_floating_point() or bias.device != weight.device):
        raise ValueError(
            f"bias{suffix} is {list(bias.shape)} {bias.dtype} on {bias.device}; it must be [{rows}], floating, on {weight.device}"
        )
    if softcap is not None and not (_is_finite(softcap) and softcap > 0):
        raise ValueError(f"softcap{suffix} is {softcap!r}; it must be a positive number, or None")
    if not _is_finite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale{suffix} is {logit_scale!r}; it must be a finite number other than 0")
    _check_group(process_group)
    if not _is_count(vocab_start) or vocab_start < 0:
        raise ValueError(f"vocab_start is {vocab_start!r}; it must be the global id of this rank's first row, at least 0")
    if process_group is None and vocab_start != 0:
        raise ValueError(f"vocab_start is {vocab_start} without a process_group; it must be 0 where one rank holds the whole vocabulary")
    if vocab_size is not None and (not _is_count(vocab_size) or vocab_size < 1 or (process_group is None and vocab_size > rows)):
        raise ValueError(f"vocab_size is {vocab_size!r}; it must be a whole number between 1 and weight{suffix}'s {rows} rows")
    if chunk_bytes is not None and (not _is_count(chunk_bytes) or chunk_bytes < 1):
        raise ValueError(f"chunk_bytes is {chunk_bytes!r}; it must be a positive whole number of bytes, or None for the default")
    valid_columns = rows if vocab_size is None else max(0, min(rows, vocab_size - vocab_start))
    return LogitOptions(
        temperature=_checked_temperature(temperature, hidden),
        bias=bias,
        softcap=None if softcap is None else float(softcap),
        logit_scale=float(logit_scale),
        valid_columns=valid_columns,
        vocab_start=vocab_start,
        process_group=process_group,
        chunk_bytes=chunk_bytes,
    )


def _checked_temperature(temperature: float | Tensor, hidden: Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        if not (_is_finite(temperature) and temperature > 0):
            raise ValueError(f"temperature is {temperature!r}; it must be a positive number, or a tensor [{hidden.shape[0]}]")
        return float(temperature)
    if temperature.shape != (hidden.shape[0],) or temperature.device != hidden.device:
        raise ValueError(
            f"temperature has shape {list(temperature.shape)} on {temperature.device}; "
            f"it must be a number or [{hidden.shape[0]}] on {hidden.device}"
        )
    if temperature.is_complex() or temperature.dtype == torch.bool:
        raise ValueError(f"temperature has dtype {temperature.dtype}; it must be a tensor of positive numbers")
    if temperature.requires_grad:
        raise ValueError("temperature requires a gradient; it is a constant here: pass temperature.detach()")
    temperature = temperature.to(accumulation_dtype(hidden)).contiguous()
    if temperature.numel():
        _require_values((temperature > 0) & temperature.isfinite(), "temperature", temperature, "a positive number")
    return temperature


def check_count(name: str, count: int, least: int, total_columns: int | None) -> None:
    """Raises ValueError unless `count` lies between `least` and the valid columns."""
    if not _is_count(count) or count < least or (total_columns is not None and count > total_columns):
        raise ValueError(f"{name} is {count!r}; it must be a whole number between {least} and the vocabulary's {total_columns} valid columns")


def check_flag(name: str, flag: Any) -> None:
    """Raises ValueError unless `flag` is True or False."""
    if not isinstance(flag, bool):
        raise ValueError(f"{name} is {flag!r}; it must be True or False")


def check_token_tensor(name: str, tensor: Tensor, hidden: Tensor) -> Tensor:
    """Returns a per-token constant [N] in the accumulation dtype; raises ValueError for another shape or device."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; it must be a tensor [{hidden.shape[0]}]")
    if tensor.shape != (hidden.shape[0],) or tensor.device != hidden.device:
        raise ValueError(f"{name} is {list(tensor.shape)} on {tensor.device}; it must be [{hidden.shape[0]}] on {hidden.device}")
    if tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient; it is a constant here: pass {name}.detach()")
    return tensor.to(accumulation_dtype(hidden)).contiguous()


def check_extras(extras: tuple[Tensor, ...], hidden: Tensor) -> None:
    """Raises ValueError unless every extra is a constant tensor whose first dimension counts tokens."""
    if not isinstance(extras, tuple):
        raise ValueError(f"extras is a {type(extras).__name__}; it must be a tuple of tensors")
    for index, extra in enumerate(extras):
        if not isinstance(extra, Tensor) or extra.dim() == 0 or extra.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"extras[{index}] is {list(getattr(extra, 'shape', [])) or type(extra).__name__}; "
                f"it must be a tensor whose first dimension is the {hidden.shape[0]} tokens"
            )
        if extra.device != hidden.device:
            raise ValueError(f"extras[{index}] is on {extra.device} and hidden on {hidden.device}; they must be on one device")
        if extra.requires_grad:
            raise ValueError(f"extras[{index}] requires a gradient, which would be lost; pass extras[{index}].detach()")


def check_loss_fn(loss_fn: Any, extras: tuple[Tensor, ...]) -> None:
    """Raises ValueError unless loss_fn can be called with (selected, *extras)."""
    if not isinstance(loss_fn, Callable):
        raise ValueError(f"loss_fn is a {type(loss_fn).__name__}; it must be a function (selected, *extras) -> (loss, aux)")
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # a callable that does not tell what it takes
        return
    try:
        signature.bind(None, *extras)
    except TypeError as mismatch:
        raise ValueError(
            f"extras has {len(extras)} tensors, but loss_fn takes {signature} ({mismatch}); it must take selected and one argument an extra"
        ) from None


def check_loss_depends(depends: bool) -> None:
    """Raises ValueError where a gradient is wanted of a loss that has none."""
    if not depends:
        raise ValueError(
            "loss_fn returned a loss that does not depend on selected.logp, tail_logp, logz or entropy (detached, or formed under no_grad?), "
            "so every gradient would be zero; build it from those tensors, or call under torch.no_grad() for the value alone"
        )


def check_loss(result: Any, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, aux) of a loss_fn on `tokens` tokens; raises ValueError unless they are a scalar and a dict of per-token tensors."""
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        raise ValueError(f"loss_fn returned a {type(result).__name__}; it must return the pair (loss, aux), aux a dict and {{}} for none")
    loss, aux = result
    if not isinstance(loss, Tensor):
        raise ValueError(f"loss_fn returned a loss that is a {type(loss).__name__}; return the sum over the chunk, a scalar tensor")
    if loss.dim() != 0:
        raise ValueError(f"loss_fn returned a loss of shape {list(loss.shape)}; return the sum over the chunk, a scalar tensor")
    if not loss.is_floating_point():
        raise ValueError(f"loss_fn returned a loss of dtype {loss.dtype}; return a floating-point scalar")
    for name, value in aux.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != tokens:
            what = f"has shape {list(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
            raise ValueError(f"loss_fn's aux[{name!r}] {what}; return a tensor with one value a token")
    return loss, aux


def check_same_aux(first: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Raises ValueError where loss_fn's aux of two chunks have different names, so that they cannot be joined."""
    if set(first) != set(other):
        raise ValueError(f"loss_fn's aux holds {sorted(first)} for one chunk and {sorted(other)} for another; return the same names for every chunk")


def check_divergence(divergence: Any) -> None:
    """Raises ValueError unless `divergence` is a record as the functions of `opd_kernels.divergences` build it."""
    if not isinstance(divergence, Divergence):
        raise ValueError(f"divergence is {divergence!r}; build it with a call such as opd_kernels.forward_kl() or opd_kernels.jsd(0.5)")
    checked_divergence(divergence)


def check_constants(name: str, constants: Any) -> None:
    """Raises ValueError unless `constants` is a HeadConstants."""
    if not isinstance(constants, HeadConstants):
        raise ValueError(f"{name} is a {type(constants).__name__}; it must be an opd_kernels.HeadConstants")


def _check_group(group: Any) -> None:
    if group is not None and not callable(getattr(group, "size", None)):
        raise ValueError(f"process_group is {group!r}; it must be a torch.distributed group, or None for a whole vocabulary")


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
