"""vLLM's weight-transfer protocol over shared memory, and over CUDA IPC with plain handles; imported in every vLLM worker (worker_extension_cls).

start -> update (one file a version) -> finish is the life that the NCCL and IPC backends have, layer-wise reload included. Every worker of an
actor maps the same file; the model's own loaders take its shard and copy it to its device, as they do from a checkpoint.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from opd_rollout.shared_memory import Written, read
from opd_rollout.types import WeightMetadata

BACKEND, IPC_BACKEND = "opd_shared_memory", "opd_ipc"
PACKED = {0: torch.Tensor, 4: torch.storage.TypedStorage, 5: torch.uint8}  # what of torch's handle of a packed buffer is always the same


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """One version's file and what it holds."""

    path: str
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]


class SharedMemoryTransfer(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads whole files; tied heads are repacked at finish."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Parameters go to the meta device: nothing may run until `finish_weight_update`."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Map the file and load all of it."""
        shapes = tuple(tuple(shape) for shape in update_info.shapes)
        metadata = WeightMetadata(names=tuple(update_info.names), shapes=shapes, dtypes=tuple(update_info.dtypes))
        self.model.load_weights(read(Written(path=update_info.path, metadata=metadata)))

    def finish_weight_update(self) -> None:
        """Finish the reload, then, on a CPU, repack what shares a parameter: a tied head would keep its packed copy of the old weights."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type != "cpu":
            return  # nothing is packed there, and what a quantised layer did to its weights must not be done to them twice
        with torch.no_grad():
            for module in tied_modules(self.model):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing to release."""


def tied_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules whose weight is also another module's and who keep a packed form of it."""
    owners: dict[int, list[torch.nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    shared = [module for modules in owners.values() if len(modules) > 1 for module in modules]
    return [module for module in shared if hasattr(getattr(module, "quant_method", None), "process_weights_after_loading")]


class PlainHandleTransfer(IPCWeightTransferEngine):
    """vLLM's own receiver over CUDA IPC, for handles that hold no classes: vLLM would unpickle those, if it was told to (see plain_handle)."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        """Raises ValueError for fields that vLLM does not know."""
        handles = {gpu: whole_handle(handle) for gpu, handle in update_dict["ipc_handles"].items()}
        return super().parse_update_info({**update_dict, "ipc_handles": handles})


def plain_handle(handle: tuple[Any, ...]) -> list[Any]:
    """What torch's `reduce_tensor` says of a packed buffer, as numbers, bytes and lists: fit for any transport, nothing to unpickle."""
    assert all(handle[index] is value for index, value in PACKED.items()), "vLLM packs bytes into a plain tensor"
    return [None if index in PACKED else list(value) if isinstance(value, tuple) else value for index, value in enumerate(handle)]


def whole_handle(plain: list[Any]) -> tuple[Any, ...]:
    """The arguments of torch's `rebuild_cuda_tensor` again."""
    return tuple(PACKED.get(index, tuple(value) if isinstance(value, list) else value) for index, value in enumerate(plain))


class WorkerExtension:
    """Its import registers the backends; mixed into vLLM's worker."""

    def opd_num_parameters(self) -> Any:
        """Parameters of this worker's part of the model, packed ones counted as they are."""
        return sum(parameter.numel() for parameter in self.model_runner.model.parameters())  # type: ignore[attr-defined]


for backend, engine in ((BACKEND, SharedMemoryTransfer), (IPC_BACKEND, PlainHandleTransfer)):
    if backend not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(backend, engine)
