"""Records that every backend takes and returns.

Shape suffixes: N tokens, H hidden size, V vocabulary rows held by this rank, K chosen ids a token, C tokens of a chunk, k top-k.
All log-probabilities are natural logarithms (nats) of softmax(x), where

    x = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature,      softcap(z) = cap * tanh(z / cap)

and columns at or beyond the valid vocabulary are -inf.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAD_LOGP = -1e4
"""Log-probability reported for an id of -1: finite, its exponential is 0 and its square does not overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedLogprobs:
    """What an objective needs from the vocabulary, per token."""

    logp: Tensor  # [N, K] fp32; PAD_LOGP where the id is -1
    tail_logp: Tensor | None  # [N] log of the mass outside the chosen ids; -inf where nothing is outside
    logz: Tensor  # [N] log-normaliser of x
    entropy: Tensor | None  # [N] nats, over the whole vocabulary
    topk_ids: Tensor | None = None  # [N, k] int64, descending, ties to the lowest id
    topk_logp: Tensor | None = None  # [N, k], constants


@dataclass(frozen=True, slots=True, kw_only=True)
class TopkLogprobs:
    """Top-k of each token's distribution; all constants. Slot 0 is the included id where one was asked for."""

    ids: Tensor  # [N, k] or [N, k + 1] int64; -1 where the included id stood among the top k
    logp: Tensor  # like ids; PAD_LOGP where ids is -1
    tail_logp: Tensor  # [N] log of the mass outside ids
    logz: Tensor  # [N]
    entropy: Tensor  # [N]


LossFn = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""loss_fn(selected, *extras) -> (sum of the chunk's token losses, {name: per-token tensor [C]})."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConstants:
    """What turns one head's products into logits: additive bias [V], softcap, multiplicative scale."""

    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitOptions:
    """Validated options of one head, as the backends receive them."""

    temperature: float | Tensor = 1.0  # a number, or [N] in the accumulation dtype on hidden's device
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    logit_scale: float = 1.0
    valid_columns: int  # of this rank's V rows; those at or beyond are -inf
    vocab_start: int = 0  # global id of this rank's first row
    process_group: Any = None  # ranks that hold the other rows; None: this rank holds them all
    chunk_bytes: int | None = None  # scratch budget; None: see chunk_budget


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInputs:
    """One side of a dense divergence: hidden [N, H], weight [V, H] and what turns their product into logits."""

    hidden: Tensor
    weight: Tensor
    options: LogitOptions


ElementFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """D = sum over the vocabulary of value(lp, lq), lp the student's and lq the teacher's log-probabilities.

    Build one with the functions of `opd_kernels.divergences`; `name` is forward_kl, reverse_kl, jsd, skew_forward_kl,
    skew_reverse_kl or elementwise. `mix` is the teacher's share of a JSD mixture, `alpha` the skew. With `entry_clip` = tau an
    entry counts min(entry, tau) and gives no gradient where it was clipped.
    """

    name: str
    mix: float = 0.5
    alpha: float = 0.0
    entry_clip: float | None = None
    value: ElementFn | None = None  # elementwise only
    slope: ElementFn | None = None  # elementwise only: d value / d lp


def accumulation_dtype(hidden: Tensor) -> torch.dtype:
    """fp32 for every input but fp64."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


CPU_TILE_BYTES = (64 << 20, 128 << 20)  # least and most, a fifth of whole logits between them
CPU_ROW_BYTES = 320 << 20


def chunk_budget(options: LogitOptions, device: torch.device, *, row_sets: int, whole_bytes: int = 0) -> int:
    """Scratch bytes of one operation: the given budget, or a default bounded by an eighth of the device's free memory.

    row_sets: how many sets of whole rows share it, 0 for tiles. whole_bytes: of all logits. The default can differ from call to call on a
    nearly full GPU, and with it the last bits of results: give a budget where that matters.
    """
    if options.chunk_bytes is not None:
        return options.chunk_bytes
    if device.type != "cuda":
        least, most = CPU_TILE_BYTES
        return CPU_ROW_BYTES // row_sets if row_sets else max(least, min(most, whole_bytes // 5))
    free_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min((1664 if row_sets else 768) << 20, max(free_bytes // 8, 64 << 20))
