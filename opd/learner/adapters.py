"""Adapters that `opd.learner.lora` has put into a model: off for the frozen teacher, merged for everyone else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> peft layer, for every layer with adapters."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapters, bitwise, while inside. Raises ValueError for a model without adapters."""
    layers = adapted_layers(model).values()
    if not layers:
        raise ValueError("the model has no adapters to switch off; set model.lora, or use a frozen copy as the teacher")
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Writes the factors alone as peft does (adapter_model.safetensors, adapter_config.json); peft loads them onto the starting model."""
    factors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            factors[f"base_model.model.{name.replace('.default.', '.')}"] = parameter.detach().cpu().contiguous()
    model.peft_config["default"].save_pretrained(folder)
    save_file(factors, folder / "adapter_model.safetensors")


@torch.no_grad()
def merged_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter once under its Hugging Face name, adapters added to the weights they adapt (copies; the rest is the model's own)."""
    layers = adapted_layers(model)
    merged = []
    for name, parameter in model.named_parameters():
        owner, found, part = name.partition(".base_layer.")
        if found:
            value = parameter.detach()
            if part == "weight":
                value = value + sum(layers[owner].get_delta_weight(adapter) for adapter in layers[owner].active_adapters)
            merged.append((f"{owner}.{part}", value))
        elif not any(name.startswith(f"{layer}.lora_") for layer in layers):
            merged.append((name, parameter.detach()))
    return merged
