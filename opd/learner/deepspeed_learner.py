"""The DeepSpeed learner: ZeRO 0 to 3, one process or one a rank under torchrun or the deepspeed launcher.

The caller sets DS_ACCELERATOR=cpu before the first import where no accelerator is wanted.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from opd.learner.deepspeed_pieces import MASTER, PieceFiles, num_steps, own_pieces, set_num_steps, write_pieces
from opd.learner.learner import PolicyLearner
from opd.learner.optimizer import adamw, clip, set_rate
from opd.learner.policy import Policy
from opd.learner.types import LARGEST_BUCKET, LearnerSettings, OptimizerSettings
from opd.learner.weights import whole_shape

DEADLINE = timedelta(minutes=30)
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}  # further keys of "zero_optimization"


def deepspeed_learner(
    model: nn.Module,
    optimizer: OptimizerSettings,
    settings: LearnerSettings,
    *,
    vocab_size: int | None = None,
    zero_stage: int = 0,
    zero_options: Mapping[str, Any] | None = None,
) -> PolicyLearner:
    """A learner of the model's trainable parameters over all ranks of the default process group (one rank if there is none).

    bf16 weights are trained with fp32 masters, at ZeRO 1 or above. vocab_size: see Policy. zero_options: further keys of DeepSpeed's
    "zero_optimization" section (bucket sizes, offload).
    """
    join_process_group()
    policy = Policy(model, vocab_size=vocab_size, gradient_checkpointing=settings.gradient_checkpointing)
    return PolicyLearner(policy, DeepSpeedUpdater(policy, optimizer, zero_stage, zero_options or {}), optimizer, settings)


def join_process_group() -> None:
    """The ranks' process group: the one that exists, the launcher's, or one of this process alone. Idempotent."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    on_cpu = get_accelerator().device_name() == "cpu"
    if on_cpu:  # its shared-memory all-reduce would be compiled on first use, half a minute with g++; gloo serves as well
        deepspeed.ops.__compatible_ops__ = {}
    if not dist.is_initialized():
        backend = "gloo" if on_cpu else get_accelerator().communication_backend_name()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(backend, timeout=DEADLINE)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=DEADLINE)
    os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed.initialize insists on it


class DeepSpeedUpdater:
    """An opd.learner.types.Updater around a DeepSpeed engine.

    DeepSpeed averages gradients over ranks, so losses are multiplied by their number here and nowhere else. At ZeRO 0 it would apply
    a NaN step, so reduction, check and clip are done here before its step; from ZeRO 1 on it refuses such a step on every rank itself.
    """

    def __init__(self, policy: Policy, settings: OptimizerSettings, zero_stage: int, zero_options: Mapping[str, Any]) -> None:
        low_precision = policy.head.weight.dtype == torch.bfloat16
        self.stage = max(1, zero_stage) if low_precision else zero_stage
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.replayable, self.sharded, self.whole = self.stage <= 1, self.stage == 3, self.stage == 0
        self._own = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
        self._everything = list(policy.parameters())
        self._largest = settings.clip
        # DeepSpeed allocates the bucket whole, 2 GB in fp32, however little there is to train
        bucket = min(LARGEST_BUCKET, sum(whole_shape(parameter).numel() for parameter in self._own.values()))
        zero = {"stage": self.stage, "reduce_bucket_size": bucket, **zero_options}
        self.module, *_ = deepspeed.initialize(
            model=policy,
            optimizer=adamw(self._own, settings),
            config=engine_config(zero, settings.clip, low_precision),
            dist_init_required=False,
        )
        self._base = self.module.optimizer if self.stage == 0 else self.module.optimizer.optimizer
        self._places: list[dict[str, tuple[int, int]]] = []
        if self.stage == 0:
            self.module.enable_backward_allreduce = False  # its step() would reduce what `_replicated_step` has reduced

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss * self.world_size, scale_wrt_gas=False)

    def apply(self, lr: float) -> tuple[bool, float]:
        engine = self.module
        set_rate(engine.optimizer, lr)
        if self.stage == 0:
            return self._replicated_step()
        engine.step()
        norm = engine.get_global_grad_norm()
        return engine.was_step_applied(), float("nan") if norm is None else float(norm)

    def _replicated_step(self) -> tuple[bool, float]:
        """All ranks hold the same reduced gradient, so they agree on its norm without asking."""
        if self.world_size > 1:
            self.module.buffered_allreduce_fallback()
        finite, norm = clip(list(self._own.values()), self._largest)
        if finite:
            self.module.step()
        else:
            self.discard()
        return finite, norm

    def discard(self) -> None:
        self.module.optimizer.zero_grad()
        self.module.zero_grad()

    def all_reduce(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        moved = values.to(get_accelerator().current_device_name())
        dist.all_reduce(moved)
        return moved.to(values.device)

    def gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def masters(self) -> dict[str, Tensor]:
        return {name: self.joined(name, piece) for name, piece in self.pieces().items()}

    def pieces(self) -> dict[str, Tensor]:
        found = own_pieces(self.module, self.stage, self.rank, self._own)
        return {name: piece.master.view_as(self._own[name]) if self.whole else piece.master for name, piece in found.items()}

    def joined(self, name: str, piece: Tensor) -> Tensor:
        if self.whole:
            return piece
        if not self._places:
            found = own_pieces(self.module, self.stage, self.rank, self._own)
            self._places = self.gather({name: (piece.start, piece.master.numel()) for name, piece in found.items()})
        places, shape = [of_rank[name] for of_rank in self._places], whole_shape(self._own[name])
        longest = max(numel for _, numel in places)
        padded = nn.functional.pad(piece, (0, longest - piece.numel()))
        received = [torch.empty_like(padded) for _ in places]
        dist.all_gather(received, padded)
        whole = torch.empty(shape.numel(), dtype=piece.dtype, device=piece.device)
        for (start, numel), part in zip(places, received, strict=True):
            whole[start : start + numel] = part[:numel]
        return whole.view(shape)

    @contextmanager
    def whole_weights(self, parameters: Sequence[nn.Parameter] | None = None, *, write: bool = False) -> Iterator[None]:
        if not self.sharded:
            yield
            return
        chosen = self._everything if parameters is None else list(parameters)
        with deepspeed.zero.GatheredParameters(chosen, modifier_rank=0 if write else None):
            yield

    def state(self) -> dict[str, Any]:
        if self.stage:
            raise ValueError(f"the optimiser is in ZeRO-{self.stage} pieces, which only a checkpoint can hold; use learner.zero_stage=0")
        return {"masters": dict(self._own), "optimizer": self.module.optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        raise ValueError("the DeepSpeed learner goes on from its own checkpoints only; use learner.kind=torch")

    def save(self, folder: Path, extra: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self.whole and self.rank:
            return  # rank 0 has all of it
        pieces = own_pieces(self.module, self.stage, self.rank, self._own)
        write_pieces(folder / f"pieces-{self.rank:05d}.pt", pieces, extra, num_steps(self._base))

    def load(self, folder: Path) -> dict[str, dict[str, Tensor]]:
        files, extra = PieceFiles(folder), dict[str, dict[str, Tensor]]()
        for name, piece in own_pieces(self.module, self.stage, self.rank, self._own).items():
            parameter, shape = self._own[name], whole_shape(self._own[name])
            for state, whole in files.whole(name, shape).items():
                part = whole[piece.start : piece.start + piece.master.numel()]
                if state in piece.states:
                    piece.states[state].copy_(part)
                else:
                    extra.setdefault(state, {})[name] = (part.view(shape) if self.whole else part).to(piece.master.device, copy=True)
                if state == MASTER:
                    with self.whole_weights([parameter], write=True), torch.no_grad():
                        parameter.copy_(whole.view(shape))
        set_num_steps(self._base, files.steps)
        return extra

    def close(self) -> None:
        self.module.destroy()
        del self.module, self._own, self._everything, self._base


def engine_config(zero: Mapping[str, Any], largest_norm: float, low_precision: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes mean nothing here: gradient accumulation is the caller's."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": largest_norm if zero["stage"] else 0.0,
        "zero_optimization": dict(zero),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # an offloaded state is torch's AdamW's too: no C++ compiler needed
    }
    if low_precision:
        config |= {"bf16": {"enabled": True}, "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    return config
