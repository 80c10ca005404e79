"""Seconds that the phases of a step take: model FLOPs over the share of a device's arithmetic that the project's runs reached.

On a GPU two numbers, WIDE_SHARE and LAYER_SECONDS, were fitted to five phases that one H200 ran at the shape of Qwen3-0.6B, and are within 16 %
of each (`benchmarks/results/dry_run.json`, `learner_step.json`; tests/preflight/test_speed.py). Wider models and other cards are extrapolated.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from opd.config.choices import nearest
from opd.preflight.memory import ModelFacts
from opd.timing.flops import forward, training


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """flops: dense bf16 multiply-adds counted twice, a second; bandwidth: bytes a second; memory: bytes. As the maker states them."""

    name: str
    flops: float
    bandwidth: float
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A step's work on one learner rank, in tokens. group: answers that share a prompt. decoded: of the longest answer, drawn one after the other."""

    answers: int
    group: int
    prompt: float
    answer: float
    decoded: float


CPU = "this CPU"
DEVICES = {
    "a100": Device(name="A100 80 GB", flops=312e12, bandwidth=2.0e12, memory=80 * 10**9),
    "h100": Device(name="H100 SXM 80 GB", flops=989e12, bandwidth=3.35e12, memory=80 * 10**9),
    "h200": Device(name="H200 141 GB", flops=989e12, bandwidth=4.8e12, memory=141 * 10**9),
    "l40s": Device(name="L40S 48 GB", flops=362e12, bandwidth=0.864e12, memory=48 * 10**9),
}
WIDE_SHARE, HALF_WIDTH = 0.42, 1024
"""Share of a GPU's stated arithmetic in products of very wide models, and the hidden size at which half of it is reached (measured there: 0.21)."""
DECODING_SHARE = 0.6
"""Assumed share of a GPU's stated bandwidth that reading weights and cache for a token reaches."""
LAYER_SECONDS = 1.1e-3
"""Least time of a layer and pass when a GPU runs the Hugging Face module as it is: starting its kernels takes longer than they run."""
CPU_SHARE = 0.35
"""Share of a large product's speed that small models reach on a CPU, from runs of the embedded recipes."""
CPU_LAYER_SECONDS = 1.5e-3
"""Least time of a layer for one token on one core of a CPU, from runs of the embedded recipes."""


def find_device(name: str, dtype: torch.dtype) -> Device:
    """A GPU by name, or this machine's CPU, whose speed is measured for a moment. Raises ValueError with the nearest name."""
    if name in DEVICES:
        return DEVICES[name]
    if name not in ("", "cpu"):
        raise ValueError(f"device={name}: no figures for it{nearest(name, DEVICES)}; known: cpu, {', '.join(DEVICES)}")
    a = torch.ones(768, 768, dtype=dtype)
    started, taken = time.perf_counter(), []
    while time.perf_counter() - started < 0.2 or len(taken) < 3:
        before = time.perf_counter()
        a @ a
        taken.append(time.perf_counter() - before)
    flops = 2 * 768**3 / min(taken)  # the fastest one, which other work on the machine has not slowed down
    return Device(name=CPU, flops=flops, bandwidth=2e10, memory=_machine_memory())


def share(device: Device, hidden: int) -> float:
    """Share of the device's arithmetic that products of a model of this width reach."""
    return CPU_SHARE if device.name == CPU else WIDE_SHARE * hidden / (hidden + HALF_WIDTH)


def rollout_seconds(model: ModelFacts, device: Device, load: Load, *, rows: int, compiled: bool = False, gpus: int = 1) -> float:
    """Answers of `rows` at once, one batch after the other. compiled: by an engine that starts a pass as one (vLLM), its model cut over `gpus`."""
    on_cpu, speed = device.name == CPU, device.flops * share(device, model.hidden) * gpus
    rows = max(1, min(rows, load.answers))
    batches = -(-load.answers // rows)
    floor = 0.0 if compiled else model.layers * (CPU_LAYER_SECONDS if on_cpu else LAYER_SECONDS)
    read = model.parameters * model.item + rows * round(load.prompt + load.answer / 2) * model.cache_per_token
    a_token = max(2 * model.parameters * rows / speed, read / (device.bandwidth * DECODING_SHARE * gpus), floor)
    prefill = load.answers / load.group * forward(model.products, round(load.prompt), 0) / speed + (0.0 if on_cpu else batches * floor)
    return prefill + batches * load.decoded * a_token


def scoring_seconds(model: ModelFacts, device: Device, load: Load, *, hint: float, budget: int, compiled: bool = False, gpus: int = 1) -> float:
    """A teacher's passes of at most `budget` tokens over prompt, hint and answer; gpus: those that share its model."""
    length = round(load.prompt + hint + load.answer)
    flops = load.answers * forward(model.products, length, round(load.answer))
    return flops / (gpus * device.flops * share(device, model.hidden)) + (0.0 if compiled else _starts(model, device, load.answers * length, budget))


def learning_seconds(model: ModelFacts, device: Device, load: Load, *, budget: int, checkpointing: bool) -> float:
    """Forward and backward, and the forward again where activations are recomputed, in micro-batches of at most `budget` tokens."""
    length, answer = round(load.prompt + load.answer), round(load.answer)
    flops = training(model.products, length, answer) + (forward(model.products, length, 0) if checkpointing else 0)
    passes = 4 if checkpointing else 3
    return load.answers * flops / (device.flops * share(device, model.hidden)) + passes * _starts(model, device, load.answers * length, budget)


def _starts(model: ModelFacts, device: Device, tokens: int, budget: int) -> float:
    """Starting the kernels of one pass over so many tokens; nothing on a CPU."""
    return 0.0 if device.name == CPU else -(-tokens // budget) * model.layers * LAYER_SECONDS


def _machine_memory() -> int:
    return int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")).split()[1]) * 1024
