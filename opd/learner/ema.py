"""An exponential moving average of the student, kept in fp32."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opd.learner.types import Updater


class Shadow:
    """`tensors`: name -> average of what this rank holds of a trainable tensor (Updater.pieces), in fp32 (fp64 for fp64).

    With LoRA the factors are averaged, not their product: not the same as averaging weights, but close for small rates.
    """

    def __init__(self, live: Mapping[str, Tensor], rate: float) -> None:
        """Starts at the live weights. Raises ValueError for a rate outside [0, 1]."""
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"the EMA rate is {rate}; it must be between 0 (never moves) and 1 (the live weights)")
        self.rate = rate
        self.tensors = {name: _widened(tensor) for name, tensor in live.items()}

    @torch.no_grad()
    def tick(self, live: Mapping[str, Tensor]) -> None:
        """shadow <- (1 - rate) shadow + rate live."""
        names = list(self.tensors)
        shadows = [self.tensors[name] for name in names]
        torch._foreach_lerp_(shadows, [live[name].detach().to(self.tensors[name].dtype) for name in names], self.rate)

    @contextmanager
    def swapped_in(self, policy: nn.Module, updater: Updater) -> Iterator[None]:
        """The policy's parameters hold the average (in their own dtype) while inside, and bitwise what they held before afterwards."""
        own = {name: parameter for name, parameter in policy.named_parameters() if name in self.tensors}
        kept = {name: parameter.detach().clone() for name, parameter in own.items()} if updater.whole else updater.pieces()
        _write(own, self.tensors, updater)
        try:
            yield
        finally:
            _write(own, kept, updater)  # of a partitioned optimiser its masters: the parameters are those, rounded


def _widened(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)


@torch.no_grad()
def _write(own: Mapping[str, nn.Parameter], pieces: Mapping[str, Tensor], updater: Updater) -> None:
    for name, parameter in own.items():  # one at a time: no rank holds all of a partitioned student twice
        whole = updater.joined(name, pieces[name])
        with updater.whole_weights([parameter], write=True):
            parameter.copy_(whole)
