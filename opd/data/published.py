"""Sampling settings that model families publish for evaluation, by the model's name, and those of a generation_config.json."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from opd.config.choices import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """How a family's own evaluations draw answers. `name` matches the model's name; thinking: the mode that it holds for, None for any.

    source: the page that states it. `top_k` 0 and `top_p` 1 keep the whole vocabulary.
    """

    family: str
    name: str = ""
    thinking: bool | None = None
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int
    source: str

    def __str__(self) -> str:
        kept = [f"top-p {self.top_p:g}"] * (self.top_p < 1) + [f"top-k {self.top_k}"] * bool(self.top_k)
        return ", ".join([f"temperature {self.temperature:g}", *kept, f"at most {self.max_tokens} tokens"])


def published_for(model: str, thinking: bool | None, generation_config: Mapping[str, Any]) -> Published:
    """The family's settings by the model's name; else those of its generation_config.json where it samples; else plain sampling.

    thinking: None is the template's default, which for families with both modes is to think.
    """
    for settings in FAMILIES:
        if settings.name and re.search(settings.name, model, re.IGNORECASE) and settings.thinking in (None, thinking is not False):
            return settings
    if generation_config.get("do_sample"):
        return replace(
            PLAIN, family="generation_config", source="the model's generation_config.json",
            temperature=float(generation_config.get("temperature") or 1.0), top_p=float(generation_config.get("top_p") or 1.0),
            top_k=int(generation_config.get("top_k") or 0),
        )  # fmt: skip
    return PLAIN


def find_published(family: str) -> Published:
    """Settings by the family's own name. Raises ValueError with the nearest name."""
    names = {settings.family: settings for settings in (*FAMILIES, PLAIN)}
    if family not in names:
        raise ValueError(f"suite.sampling: no published settings {family!r}{nearest(family, names)}; known: auto, {', '.join(sorted(names))}")
    return names[family]


PLAIN = Published(
    family="plain", temperature=1.0, max_tokens=32768, source="no published settings are known for this model: its own distribution"
)

FAMILIES = (  # the first that matches
    Published(
        family="qwen3-2507-thinking", name=r"qwen3-.*thinking-2507", temperature=0.6, top_p=0.95, top_k=20, max_tokens=81920,
        source="https://huggingface.co/Qwen/Qwen3-30B-A3B-Thinking-2507 (best practices, competitions)",
    ),
    Published(
        family="qwen3-2507-instruct", name=r"qwen3-.*instruct-2507", temperature=0.7, top_p=0.8, top_k=20, max_tokens=16384,
        source="https://huggingface.co/Qwen/Qwen3-30B-A3B-Instruct-2507 (best practices)",
    ),
    Published(
        family="qwen3-thinking", name=r"qwen3-(?!.*base)", thinking=True, temperature=0.6, top_p=0.95, top_k=20, max_tokens=38912,
        source="https://huggingface.co/Qwen/Qwen3-8B (best practices: thinking mode, competitions)",
    ),
    Published(
        family="qwen3", name=r"qwen3-(?!.*base)", thinking=False, temperature=0.7, top_p=0.8, top_k=20, max_tokens=32768,
        source="https://huggingface.co/Qwen/Qwen3-8B (best practices: non-thinking mode)",
    ),
    Published(
        family="deepseek-r1", name=r"deepseek-r1", temperature=0.6, top_p=0.95, max_tokens=32768,
        source="https://huggingface.co/deepseek-ai/DeepSeek-R1 (evaluation results; 64 answers a problem)",
    ),
    Published(
        family="llama-3", name=r"llama-3.*instruct", temperature=0.6, top_p=0.9, max_tokens=8192,
        source="https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct (generation_config.json)",
    ),
    Published(
        family="gemma-3", name=r"gemma-3-.*it", temperature=1.0, top_p=0.95, top_k=64, max_tokens=8192,
        source="https://huggingface.co/google/gemma-3-4b-it (generation_config.json)",
    ),
)  # fmt: skip
