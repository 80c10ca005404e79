"""Weights of a sharded student on their way to an engine."""

from collections.abc import Iterator, Sequence

import torch
from opd_rollout.types import WeightMetadata
from torch import Tensor, nn

from opd.learner.types import Updater

BUCKET_ELEMENTS = 16 << 20
FACTOR = ".lora_"  # in the names of LoRA's factors (peft)


class GatheredWeights:
    """A WeightSource over partitioned parameters: each bucket is gathered on all ranks, copied, and given back before it is yielded.

    Nothing is collective while the consumer works on a bucket, so a slow engine cannot hold the other ranks inside a gather.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], updater: Updater, version: int) -> None:
        self.version = version
        self._updater = updater
        self._named = list(named)

    def metadata(self) -> WeightMetadata:
        return WeightMetadata(
            names=tuple(name for name, _ in self._named),
            shapes=tuple(tuple(whole_shape(parameter)) for _, parameter in self._named),
            dtypes=tuple(str(parameter.dtype).removeprefix("torch.") for _, parameter in self._named),
        )

    def buckets(self) -> Iterator[list[tuple[str, Tensor]]]:
        for bucket in self._split():
            with self._updater.whole_weights([parameter for _, parameter in bucket]):
                copies = [(name, parameter.detach().clone()) for name, parameter in bucket]
            yield copies

    def _split(self) -> Iterator[list[tuple[str, nn.Parameter]]]:
        bucket: list[tuple[str, nn.Parameter]] = []
        size = 0
        for name, parameter in self._named:
            bucket.append((name, parameter))
            size += whole_shape(parameter).numel()
            if size >= BUCKET_ELEMENTS:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape before partitioning (DeepSpeed notes it on the parameter)."""
    return getattr(parameter, "ds_shape", parameter.shape)
