"""The learner's weights to actors on other GPUs: vLLM's own trainer side of its NCCL backend, a packed broadcast from rank 0 to all workers."""

import socket
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from opd_rollout import vllm_sending
from opd_rollout.actor_states import reason_of
from opd_rollout.dispatch import ActorsLost
from opd_rollout.vllm_sending import ELSE, Actors, Late, Source, TrainerTransfer, Way

warnings.filterwarnings("ignore", message=r"Tensor '.*' has size .* exceeds buffer_size_bytes")  # a large embedding is a piece of its own


def nccl_broadcast(rank: int, address: str, actors_at: Sequence[str], workers: int, attempt: str = "") -> TrainerTransfer:
    """A Transfer between GPUs. address: of this machine, for rank 0 to listen on; actors_at: of the actors' machines, for people."""
    others = f"actors at {', '.join(sorted(set(actors_at))) or 'unknown addresses'}"

    def join(actors: Actors, source: Source, within: Callable[[Callable[[], Any]], Any], seconds: float) -> Any:
        port = _free_port(address) if rank == 0 else 0
        info = NCCLTrainerInitInfo(
            master_address=address, master_port=port, world_size=1 + workers * len(actors.members),
            packed_buffer_size_bytes=vllm_sending.BUFFER_BYTES, rank=rank,
        )  # fmt: skip
        try:
            trainer = within(lambda: WeightTransferTrainerFactory.trainer_init(info, client=actors, source=source))
            if rank == 0 and trainer.model_update_group.disabled:  # vLLM goes on without a word, and would send nothing
                raise RuntimeError("vLLM cannot load NCCL here, or VLLM_DISABLE_PYNCCL is set")
        except ActorsLost:
            raise
        except (Late, RuntimeError) as error:
            why = f"nothing within {seconds:.0f} s" if isinstance(error, Late) else reason_of(error)
            raise ActorsLost(
                f"no NCCL group between the learner at {address}:{port} and {others} ({why}): the machines must reach each other on "
                f"every port, over the interface that NCCL_SOCKET_IFNAME names; NCCL_DEBUG=INFO shows more; {ELSE}"
            ) from error
        return trainer

    return TrainerTransfer(Way(how="NCCL", link=f"from {address} to {others}", join=join), rank, workers, attempt)


def _free_port(address: str) -> int:
    try:
        with socket.create_server((address, 0)) as found:
            return found.getsockname()[1]
    except OSError as error:
        raise ActorsLost(f"the learner cannot listen at {address}, its address in the Ray cluster, for NCCL ({error}); {ELSE}") from None
