"""What the loop may ask of a learner, and the plain settings that a learner is built from.

Legend: N completion tokens, K support size.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from opd_kernels import HeadView
from opd_rollout.types import ScoreRequest, TokenScores, WeightSource
from torch import Tensor, nn

from opd.objective.terms import Needs, Objective
from opd.types import Judged, MicroBatch, Prepared, Sample, StepReport

Weights = Literal["live", "adapter_off", "ema"]
LARGEST_BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces together, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW, its schedule and the clip.

    lr: peak learning rate. warmup_steps, total_steps: optimiser steps (not rollout steps); total_steps only matters to cosine and
    linear, which reach 0 there. clip: largest global gradient norm.
    """

    lr: float
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """Everything about a learner but its model and optimiser.

    temperature: of the student's distribution (the sampling temperature). token_budget: tokens of a micro-batch, padding included.
    packed: packed rows instead of padded ones. chunk_bytes: scratch of the head; None lets the kernels choose. minibatches, epochs:
    optimiser steps on one batch of rollouts. ema_rate: shadow <- (1 - rate) shadow + rate weights every ema_every rollout steps (rate 1: a
    copy that old); None keeps none.
    merge_adapters: `weights` sends LoRA merged into Hugging Face names (an engine with a module of its own); otherwise the module's own
    parameters (an engine that shares it). adapters_alone: it sends LoRA's factors and nothing else (an engine that has the base model).
    shard_bytes: largest file of weights that an export writes.
    """

    temperature: float = 1.0
    token_budget: int = 16384
    packed: bool = False
    pad_id: int = 0
    chunk_bytes: int | None = None
    minibatches: int = 1
    epochs: int = 1
    merge_adapters: bool = False
    adapters_alone: bool = False
    ema_rate: float | None = None
    ema_every: int = 1
    gradient_checkpointing: bool = False
    shard_bytes: int = 4 << 30


class Learner(Protocol):
    """The student in training. `version` counts rollout steps; every rank of a distributed learner calls the same methods in turn.

    rate_scale multiplies the learning rate, 1.0 at first; whoever sets it keeps it over a resume. observer: sees every token's loss, or None.
    """

    version: int
    rate_scale: float
    observer: "Observer | None"

    def prepare(self, judged: Sequence[Judged], needs: Needs) -> list[Prepared | None]: ...

    def teacher_pass(self, requests: Sequence[ScoreRequest], weights: Weights) -> list[TokenScores]: ...

    def head(self, weights: Weights) -> HeadView: ...

    def step(self, samples: Sequence[Sample], objective: Objective, heads: Mapping[str, HeadView]) -> StepReport: ...

    def weights(self, version: int) -> WeightSource: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None: ...

    def close(self) -> None: ...


class Observer(Protocol):
    """Sees the per-token columns of `token_loss` as they are made."""

    def begin(self, num_samples: int) -> None:
        """A step over so many samples begins."""
        ...

    def take(self, first: int, batch: MicroBatch, columns: Mapping[str, Tensor]) -> None:
        """The columns [N] of a micro-batch whose `members` count from the sample `first`."""
        ...


class Updater(Protocol):
    """The part in which learners differ: how gradients become an update, and where optimiser state lives.

    module: what a forward pass calls (the policy, or an engine around it). replayable: the gradients of an interrupted backward pass
    can be thrown away, because no collective runs inside it. sharded: outside of `whole_weights` parameters are not whole. whole: every
    rank holds all of the optimiser, so that `state` can be had.
    """

    module: nn.Module
    world_size: int
    rank: int
    replayable: bool
    sharded: bool
    whole: bool

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the sum of `loss` over the ranks."""
        ...

    def apply(self, lr: float) -> tuple[bool, float]:
        """One clipped optimiser step: (applied, global gradient norm before the clip); refused on all ranks if a gradient is not finite."""
        ...

    def discard(self) -> None:
        """Forgets the gradients collected so far; only where `replayable`."""
        ...

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the ranks."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order."""
        ...

    def masters(self) -> dict[str, Tensor]:
        """Name -> trainable tensor in the optimiser's precision, whole on every rank; not to be written to. Collective."""
        ...

    def pieces(self) -> dict[str, Tensor]:
        """Name -> what this rank holds of it in the optimiser's precision, flat; the tensor itself where `whole`. Not to be written to."""
        ...

    def joined(self, name: str, piece: Tensor) -> Tensor:
        """The tensor whose pieces, cut as in `pieces`, the ranks give. Collective."""
        ...

    def whole_weights(self, parameters: Sequence[nn.Parameter] | None = None, *, write: bool = False) -> AbstractContextManager[None]:
        """These parameters (None: all) are whole on every rank while inside; with `write` what all ranks alike put there stays. Collective."""
        ...

    def state(self) -> dict[str, Any]:
        """Masters and optimiser as torch has them; ValueError where they are not whole."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...

    def save(self, folder: Path, extra: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Optimiser and masters into files that any number of ranks can read. extra: further states, tensors cut as in `pieces`."""
        ...

    def load(self, folder: Path) -> dict[str, dict[str, Tensor]]:
        """Goes on from `save`, of however many ranks; returns its `extra`, cut for this rank."""
        ...

    def close(self) -> None: ...
