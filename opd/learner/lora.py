"""Puts low-rank adapters into an ordinary Hugging Face module (peft)."""

from collections.abc import Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn


def add_lora(model: nn.Module, *, rank: int, alpha: float, targets: str | Sequence[str], seed: int) -> None:
    """Adapts the model's linear layers in place and freezes all else; the first factor is drawn from `seed`, the second is 0.

    targets: module names, or "all-linear" (never the head). Raises ValueError for the head, and for names that the model does not have.
    """
    names = targets if isinstance(targets, str) else list(targets)
    if "lm_head" in names:
        raise ValueError("model.lora.targets names lm_head: adapters on the head are not supported; leave it out")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none"), model)
