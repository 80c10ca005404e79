"""Floating-point operations that a model's products need, counted from its configuration: what MFU divides by time and peak.

Model FLOPs as PaLM counts them (arXiv 2204.02311, appendix B), with two differences that fit this trainer: the head counts for predicted tokens
only, and attention for the causal pairs only. Recomputed activations do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Weights of a model by where they multiply. body: of all layers. head: hidden size x rows. adapters: LoRA factors.

    heads: width of all query heads together, by layer. windows: positions that each layer looks back on, itself included, 0 for all.
    """

    body: int
    head: int
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    adapters: int = 0


def pairs(length: int, window: int = 0) -> int:
    """(query, key) pairs of causal attention over `length` positions."""
    if not window or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def forward(p: Products, length: int, predicted: int, *, before: int = 0) -> int:
    """FLOPs of `length` positions, the first `before` of them in a cache already, with the head at `predicted` of them."""
    attention = sum(4 * width * (pairs(length, window) - pairs(before, window)) for width, window in zip(p.heads, p.windows, strict=True))
    return 2 * (p.body + p.adapters) * (length - before) + 2 * p.head * predicted + attention


def training(p: Products, length: int, predicted: int) -> int:
    """FLOPs of a forward and backward pass: three times the forward's; frozen weights (LoRA) need no gradient of their own, so twice."""
    once = forward(p, length, predicted)
    frozen = 2 * p.body * length + 2 * p.head * predicted if p.adapters else 0
    return 3 * once - frozen


def generation(p: Products, prompt: int, answers: Sequence[int]) -> int:
    """FLOPs of answers of so many tokens to one prompt, which is read once."""
    return forward(p, prompt, 0) + sum(forward(p, prompt + answer, answer, before=prompt) for answer in answers)
