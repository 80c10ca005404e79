"""What the engine's side and an actor's side tell each other: plain records, light to import."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Where an actor finds its model: `folder` with weights, or `config` (the text of config.json), whose weights a learner sends."""

    folder: str = ""
    config: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSettings:
    """One vLLM engine.

    mode: async (an engine process of its own, can pause in mid-answer) or offline (in the actor). positions: longest sequence, tokens.
    max_logprobs: columns that a scoring request may ask for, -1 for the whole vocabulary. kv_bytes: key-value cache on a CPU; memory_share:
    of a GPU's memory. transfer: weight-transfer backend, "" for weights that stay. adapter: text of an adapter_config.json (peft) where updates
    bring LoRA factors over the folder's weights.
    """

    mode: Literal["async", "offline"]
    dtype: str
    positions: int
    max_logprobs: int
    tensor_parallel: int = 1
    kv_bytes: int = 64 << 20
    memory_share: float = 0.9
    transfer: str = ""
    adapter: str = ""
    sleeps: bool = False
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerFacts:
    """What an opened engine says of itself. fixed_ids: it scores given ids (prompt_logprob_token_ids)."""

    vllm: str
    device: str
    vocab_size: int
    fixed_ids: bool
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An actor's machine by its address; sees: a path that was asked for is there. is_open: its vLLM has been started. gpus: as given by Ray."""

    address: str
    sees: bool
    is_open: bool
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """A chunk of completions, packed: token_ids and logprobs of all, one after the other; ends[i] is one past the last of answer i."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    ends: np.ndarray
    stopped: np.ndarray
    spans: list[tuple[tuple[int, int, int], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJob:
    """See opd_rollout.types.ScoreRequest; support_ids [T, K] int32."""

    context_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    support_ids: np.ndarray | None
    k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One completion's scores: sampled [T], ids [T, K] (-1 pads), logp [T, K], tail_logp [T], entropy [T] (NaN where not known), fp32."""

    sampled: np.ndarray
    ids: np.ndarray
    logp: np.ndarray
    tail_logp: np.ndarray
    entropy: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire, ids as int32."""
        return sum(part.nbytes for part in (self.sampled, self.ids, self.logp, self.tail_logp, self.entropy))
