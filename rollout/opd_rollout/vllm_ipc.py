"""The learner's weights to colocated actors: vLLM's own trainer side of its CUDA IPC backend.

Every rank packs the whole weights, piece by piece, into a buffer on its own GPU; the worker that shares this GPU maps the buffer and copies its
part out of it. Nothing crosses the host. Each rank's GPU must have one worker: a buffer that nobody maps is never given back (torch counts).
"""

import math
from collections.abc import Callable
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

from opd_rollout import vllm_sending
from opd_rollout.vllm_sending import Actors, Source, TrainerTransfer, Way
from opd_rollout.vllm_transfer import plain_handle


def cuda_ipc(rank: int, workers: int, attempt: str = "") -> TrainerTransfer:
    """A Transfer on one machine; all ranks of torch's default process group take part."""

    def join(actors: Actors, source: Source, within: Callable[[Callable[[], Any]], Any], seconds: float) -> Any:
        largest = max(one.dtype.itemsize * math.prod(one.shape) for one in source.metadata())  # vLLM refuses what its buffer cannot hold
        info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=max(vllm_sending.BUFFER_BYTES, largest), rank=rank)
        return WeightTransferTrainerFactory.trainer_init(info, client=actors, source=source)

    return TrainerTransfer(Way(how="CUDA IPC", link="to the actors on the learner's GPUs", join=join, plain=_plain), rank, workers, attempt)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """An update without classes in it, so that no process of vLLM's has to unpickle any."""
    kept = {name: fields[name] for name in ("names", "dtype_names", "shapes", "tensor_sizes")}
    return {**kept, "ipc_handles": {gpu: plain_handle(handle) for gpu, handle in fields["ipc_handles"].items()}}

