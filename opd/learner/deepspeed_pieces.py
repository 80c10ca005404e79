"""A rank's pieces of what DeepSpeed partitions: masters and moments of every trainable tensor, where they start, and files of them.

A piece is a run of elements of the flattened tensor. Files name tensors and starts, not ranks: as many or as few ranks as one likes can read
them. ZeRO 0 has one piece, the whole tensor, on every rank. Legend: n elements of a piece.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """start: of the piece in the flattened tensor. states: master and moments -> [n], views into the optimiser."""

    start: int
    states: Mapping[str, Tensor]

    @property
    def master(self) -> Tensor:
        return self.states[MASTER]


def own_pieces(engine: Any, stage: int, rank: int, own: Mapping[str, nn.Parameter]) -> dict[str, Piece]:
    """This rank's pieces by name, empty ones included."""
    base = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3, whose optimiser has its tensors during a step only
    start_moments(base, [tensor for group in base.param_groups for tensor in group["params"]] if flat is None else flat)
    find = {0: _replicated, 1: _of_flat_group, 2: _of_flat_group, 3: _of_parameter}[stage]
    return {name: find(engine.optimizer, base, rank, parameter) for name, parameter in own.items()}


def start_moments(base: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> None:
    """Zeros where the optimiser has made no step yet, as it would begin with."""
    for tensor in tensors:
        if not base.state[tensor]:
            zeros = {name: torch.zeros_like(tensor, memory_format=torch.preserve_format) for name in MOMENTS}
            base.state[tensor].update({"step": torch.zeros((), dtype=torch.float32, device=tensor.device), **zeros})


def num_steps(base: torch.optim.Optimizer) -> float:
    """Optimiser steps so far, the same for all tensors."""
    return float(next(iter(base.state.values()))["step"])


def set_num_steps(base: torch.optim.Optimizer, steps: float) -> None:
    for state in base.state.values():
        state["step"].fill_(steps)


def _replicated(optimizer: Any, base: torch.optim.Optimizer, rank: int, parameter: nn.Parameter) -> Piece:
    state = base.state[parameter]
    return Piece(start=0, states={MASTER: parameter.detach().view(-1)} | {name: state[name].view(-1) for name in MOMENTS})


def _of_flat_group(optimizer: Any, base: torch.optim.Optimizer, rank: int, parameter: nn.Parameter) -> Piece:
    """ZeRO 1 and 2: a group's tensors lie one after the other, and the ranks share the whole length."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        none = torch.zeros(0, device=parameter.device)
        return Piece(start=0, states=dict.fromkeys((MASTER, *MOMENTS), none))
    flat = optimizer.fp32_groups_flat_partition if hasattr(optimizer, "fp32_groups_flat_partition") else optimizer.single_partition_of_fp32_groups
    place, state = mapping.hp_fragment_address, base.state[flat[mapping.param_group_index]]
    moments = {name: state[name].narrow(0, place.start, place.numel) for name in MOMENTS}
    return Piece(start=mapping.lp_fragment_address.start, states={MASTER: mapping.hp_fragment.detach(), **moments})


def _of_parameter(optimizer: Any, base: torch.optim.Optimizer, rank: int, parameter: nn.Parameter) -> Piece:
    """ZeRO 3: the ranks share every tensor; the last piece is padded."""
    states = {}
    for key in (None, *MOMENTS):
        padded, _ = optimizer._get_fp32_opt_state_partition(parameter, False, key)
        start = rank * padded.numel()
        states[key or MASTER] = padded.detach().narrow(0, 0, max(0, min(padded.numel(), parameter.ds_numel - start)))  # type: ignore[attr-defined]
    return Piece(start=start, states=states)


def write_pieces(path: Path, pieces: Mapping[str, Piece], extra: Mapping[str, Mapping[str, Tensor]], steps: float) -> None:
    """One rank's file. extra: further states, by name and then tensor, cut like the pieces."""
    tensors = {
        name: [piece.start, {**piece.states, **{state: found[name].view(-1) for state, found in extra.items()}}] for name, piece in pieces.items()
    }
    torch.save({"steps": steps, "tensors": _compact(tensors)}, path)


def _compact(tensors: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Copies where it must be: a view would be saved with everything that it is a part of; a whole tensor is written as it is."""
    return {name: [start, {state: _alone(tensor.detach().cpu()) for state, tensor in states.items()}] for name, (start, states) in tensors.items()}


def _alone(tensor: Tensor) -> Tensor:
    return tensor if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() else tensor.clone()


class PieceFiles:
    """The files of all ranks that wrote a checkpoint, read as they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where there are none."""
        paths = sorted(folder.glob("pieces-*.pt"))
        if not paths:
            raise ValueError(f"{folder} holds no DeepSpeed checkpoint; resume with the learner.kind that wrote it")
        self._files = [torch.load(path, mmap=True, weights_only=True, map_location="cpu") for path in paths]
        self.steps: float = self._files[0]["steps"]

    def whole(self, name: str, shape: Sequence[int]) -> dict[str, Tensor]:
        """State -> the whole tensor, flat. Raises ValueError for one that is missing or has another size."""
        found: dict[str, Tensor] = {}
        size, covered = torch.Size(shape).numel(), 0
        for file in self._files:
            start, states = file["tensors"].get(name, (0, {}))
            for state, piece in states.items():
                target = found.setdefault(state, torch.empty(size))
                if start + piece.numel() > size:
                    raise ValueError(f"the checkpoint's {name} is larger than the model's")
                target[start : start + piece.numel()] = piece
            covered += states[MASTER].numel() if states else 0
        if covered != size:
            raise ValueError(f"the checkpoint holds {covered} of the {size} elements of {name}: it is of another model, or a file is missing")
        return found
