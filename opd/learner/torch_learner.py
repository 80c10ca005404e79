"""The plain learner: one process, one device, torch's own AdamW. The reference for the others."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd.learner.learner import PolicyLearner
from opd.learner.optimizer import adamw, clip, set_rate
from opd.learner.policy import Policy
from opd.learner.types import LearnerSettings, OptimizerSettings


def torch_learner(
    model: nn.Module, optimizer: OptimizerSettings, settings: LearnerSettings, *, vocab_size: int | None = None
) -> PolicyLearner:
    """A learner of the model's trainable parameters; the module stays the caller's to share (with an engine). vocab_size: see Policy."""
    policy = Policy(model, vocab_size=vocab_size, gradient_checkpointing=settings.gradient_checkpointing)
    return PolicyLearner(policy, TorchUpdater(policy, optimizer), optimizer, settings)


class TorchUpdater:
    """An opd.learner.types.Updater of one process. Parameters below fp32 are trained through fp32 masters."""

    world_size, rank, replayable, sharded, whole = 1, 0, True, False, True

    def __init__(self, policy: Policy, settings: OptimizerSettings) -> None:
        self.module = policy
        self._own = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
        self._masters = {name: _master(parameter) for name, parameter in self._own.items()}
        self._optimizer = adamw(self._masters, settings)
        self._largest = settings.clip

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for name, master in self._low_precision():
            own = self._own[name]
            if own.grad is not None:
                master.grad = own.grad.float() if master.grad is None else master.grad.add_(own.grad)
                own.grad = None

    def apply(self, lr: float) -> tuple[bool, float]:
        finite, norm = clip(list(self._masters.values()), self._largest)
        if finite:
            set_rate(self._optimizer, lr)
            self._optimizer.step()
            with torch.no_grad():
                for name, master in self._low_precision():
                    self._own[name].copy_(master)
        self.discard()
        return finite, norm

    def discard(self) -> None:
        for tensor in (*self._own.values(), *self._masters.values()):
            tensor.grad = None

    def all_reduce(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def masters(self) -> dict[str, Tensor]:
        return dict(self._masters)

    def pieces(self) -> dict[str, Tensor]:
        return dict(self._masters)

    def joined(self, name: str, piece: Tensor) -> Tensor:
        return piece

    @contextmanager
    def whole_weights(self, parameters: Sequence[nn.Parameter] | None = None, *, write: bool = False) -> Iterator[None]:
        yield

    def state(self) -> dict[str, Any]:
        return {"masters": dict(self._masters), "optimizer": self._optimizer.state_dict()}

    def save(self, folder: Path, extra: Mapping[str, Mapping[str, Tensor]]) -> None:
        torch.save({**self.state(), "extra": extra}, folder / "optimizer.pt")

    def load(self, folder: Path) -> dict[str, dict[str, Tensor]]:
        if not (folder / "optimizer.pt").is_file():
            raise ValueError(f"{folder} holds no checkpoint of the torch learner; resume with the learner.kind that wrote it")
        state = torch.load(folder / "optimizer.pt", map_location=self.module.head.weight.device, weights_only=True)
        self.load_state(state)
        return state["extra"]

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state` of any learner whose optimiser is torch's."""
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(state["masters"][name])
                if master is not self._own[name]:
                    self._own[name].copy_(master)
        self._optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        self.discard()
        self._optimizer.state.clear()

    def _low_precision(self) -> list[tuple[str, Tensor]]:
        return [(name, master) for name, master in self._masters.items() if master is not self._own[name]]


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.dtype in (torch.float32, torch.float64) else nn.Parameter(parameter.detach().float())
