"""What to do when a micro-batch does not fit into memory."""

import gc
from collections.abc import Sequence

import torch

from opd.types import Sample


class OutOfMemory(ValueError):
    """Memory does not suffice, and smaller micro-batches cannot help here."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def halved(token_budget: int, samples: Sequence[Sample]) -> int:
    """Half the budget. Raises OutOfMemory where each sequence already stands alone."""
    longest = max((len(s.judged.prompt_ids) + len(s.judged.completion.token_ids) for s in samples), default=0)
    if token_budget <= longest // 2:
        raise OutOfMemory(
            f"out of memory with a single sequence of {longest} tokens in a micro-batch: lower sampling.max_tokens or "
            "learner.chunk_bytes, or set model.gradient_checkpointing=true"
        )
    return max(1, token_budget // 2)


def free_memory() -> None:
    """Lets go of what an interrupted pass has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
