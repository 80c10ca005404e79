"""Validation of what a caller passes: every mistake is a ValueError that names the argument, what it was and what it should be.

Values of CUDA tensors are checked by device-side asserts, so that no check waits for the device.
"""

import math
from typing import Any

import torch
from torch import Tensor

from opd_kernels.types import HeadConstants, LogitOptions, accumulation_dtype


def check_projection(hidden: Tensor, weight: Tensor, *, suffix: str = "") -> None:
    """Raises ValueError unless hidden [N, H] and weight [V, H] are floating, plain, on one device and fit together."""
    for name, tensor in (("hidden" + suffix, hidden), ("weight" + suffix, weight)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
        if hasattr(tensor, "full_tensor"):
            raise ValueError(f"{name} is a DTensor; call the operation inside opd_kernels.Head's forward, or pass {name}.full_tensor()")
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
    if bias is not None and (bias.shape != (rows,) or not bias.is_floating_point() or bias.device != weight.device):
        raise ValueError(
            f"bias{suffix} is {list(bias.shape)} {bias.dtype} on {bias.device}; it must be [{rows}], floating, on {weight.device}"
        )
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap{suffix} is {softcap}; it must be a positive number, or None")
    if not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale{suffix} is {logit_scale}; it must be a finite number other than 0")
    if vocab_start < 0:
        raise ValueError(f"vocab_start is {vocab_start}; it must be the global id of this rank's first row, at least 0")
    if process_group is None and vocab_start != 0:
        raise ValueError(f"vocab_start is {vocab_start} without a process_group; it must be 0 where one rank holds the whole vocabulary")
    if vocab_size is not None and (vocab_size < 1 or (process_group is None and vocab_size > rows)):
        raise ValueError(f"vocab_size is {vocab_size}; it must lie between 1 and weight{suffix}'s {rows} rows")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; it must be a positive number of bytes, or None for the default")
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
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature is {temperature}; it must be a positive number")
        return float(temperature)
    if temperature.shape != (hidden.shape[0],) or temperature.device != hidden.device:
        raise ValueError(
            f"temperature has shape {list(temperature.shape)} on {temperature.device}; "
            f"it must be a number or [{hidden.shape[0]}] on {hidden.device}"
        )
    temperature = temperature.detach().to(accumulation_dtype(hidden)).contiguous()
    if temperature.numel():
        _require_values((temperature > 0) & temperature.isfinite(), "temperature", temperature, "a positive number")
    return temperature


def check_count(name: str, count: int, least: int, total_columns: int | None) -> None:
    """Raises ValueError unless `count` lies between `least` and the valid columns."""
    if count < least or (total_columns is not None and count > total_columns):
        raise ValueError(f"{name} is {count}; it must lie between {least} and the vocabulary's {total_columns} valid columns")


def check_token_tensor(name: str, tensor: Tensor, hidden: Tensor) -> Tensor:
    """Returns a per-token constant [N] in the accumulation dtype; raises ValueError for another shape or device."""
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
        if extra.requires_grad:
            raise ValueError(f"extras[{index}] requires a gradient, which would be lost; pass extras[{index}].detach()")
