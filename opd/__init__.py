"""On-policy RL and (self-)distillation of language models: `opd.train(recipe)`, `opd.compare(comparison)`."""

from importlib import import_module
from typing import Any

__all__ = ["compare", "evaluate", "inspect", "train"]
__version__ = "0.1.0"

HOMES = {"train": "opd.api", "evaluate": "opd.examination.run", "compare": "opd.reports", "inspect": "opd.reports"}


def __getattr__(name: str) -> Any:
    """Load torch and transformers only when a run is asked for."""
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'opd' has no attribute {name!r}")
