"""The learner's weights to actors on other GPUs: vLLM's own trainer side of its NCCL backend, a packed broadcast from rank 0 to all workers.

No export is kept: an actor that is lost stays away, and the group is formed anew without it. Imports vLLM, so only where it is used. It has
never run on a GPU; see docs/distributed.md for what was checked without one.
"""

import secrets
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.base import WeightSource as VllmWeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from opd_rollout.dispatch import ActorsLost, Pool, Replica
from opd_rollout.types import WeightSource
from opd_rollout.weight_sync import Parcel

BUFFER_BYTES = 512 << 20  # of a packed piece; two on every GPU of the group, beside what vLLM was given
warnings.filterwarnings("ignore", message=r"Tensor '.*' has size .* exceeds buffer_size_bytes")  # a large embedding is a piece of its own
ELSE = "use engine.transfer=shared_memory (with engine.exchange=FOLDER that all machines share), or run the same command again"


class Late(Exception):
    """A call that may wait for ever has had its time."""


class Source(VllmWeightSource):
    """The weights of the version that is being sent, on this rank's device."""

    def __init__(self, device: torch.device) -> None:
        self.weights: WeightSource | None = None
        self._device = device

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and whole shapes, nothing gathered."""
        assert self.weights is not None
        m = self.weights.metadata()
        return [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, shape, dtype in zip(m.names, m.shapes, m.dtypes, strict=True)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Bucket by bucket: a bucket has been gathered, copied and given back before its first tensor is handed out."""
        assert self.weights is not None
        for bucket in self.weights.buckets():
            for name, tensor in bucket:
                yield name, tensor.detach().to(self._device)


class Actors:
    """What vLLM's trainer side asks of the other side (VLLMWeightSyncClient), of several actors with `workers` GPUs each."""

    def __init__(self, pool: Pool, members: Sequence[Replica], workers: int, seconds: float) -> None:
        self._pool, self.members, self._workers, self._seconds = pool, list(members), workers, seconds
        self.parcel, self.in_flight = Parcel(stamp="", version=0, written=None), False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every actor's first worker has the rank after the last worker of the actor before."""
        first = init_info["rank_offset"]
        infos = [{**init_info, "rank_offset": first + place * self._workers} for place in range(len(self.members))]
        self._all("transfer", [("init_weight_transfer_engine", {"init_info": info}) for info in infos])

    def start_weight_update(self) -> None:
        self._all("begin_update", [(self.in_flight,)] * len(self.members))

    def update_weights(self, update_info: Any) -> None:
        self._all("transfer", [("update_weights", {"update_info": update_info})] * len(self.members))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("end_update", [(self.parcel.version, self.parcel.stamp)] * len(self.members))

    def _all(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Raises ActorsLost for an actor that fails or is late."""
        self._mark(method)
        try:
            asked = [getattr(replica.handle, method).remote(*own) for replica, own in zip(self.members, arguments, strict=True)]
            ray.get(asked, timeout=self._seconds)
        except GetTimeoutError:
            raise ActorsLost(f"an actor did not end {method} of a weight update over NCCL within {self._seconds:.0f} s; {ELSE}") from None
        except RayError as error:
            raise ActorsLost(f"a weight update over NCCL failed in an actor, at {method}: {_reason(error)}; {ELSE}") from error
        finally:
            self._mark("")

    def _mark(self, method: str) -> None:
        with self._pool.lock:
            for replica in self.members:
                replica.called = method
            self._pool.note()


class NcclBroadcast:
    """A Transfer (opd_rollout.weight_sync) between GPUs; the group is formed with the first version, and again when an actor has gone."""

    def __init__(self, rank: int, address: str, actors_at: Sequence[str], workers: int, attempt: str = "") -> None:
        """address: of this machine, for rank 0 to listen on; actors_at: of the actors' machines, for people. attempt: see SharedMemoryParcels."""
        self._rank, self._address, self._actors_at, self._workers = rank, address, sorted(set(actors_at)), workers
        self._attempt, self._serial = attempt or secrets.token_hex(6), 0
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._source, self._actors, self._trainer = Source(self._device), None, None

    def make(self, weights: WeightSource) -> Parcel:
        """Nothing is copied: the weights leave in `deliver`."""
        self._serial += 1
        self._source.weights = weights
        return Parcel(stamp=f"{self._attempt}-{self._serial}", version=weights.version, written=None, lasting=False)

    def deliver(self, pool: Pool, parcel: Parcel, *, in_flight: bool, seconds: float) -> None:
        """All ranks iterate the weights, rank 0 sends. Raises ActorsLost, with both addresses, where that takes longer than `seconds`."""
        ready = [replica for replica in pool.replicas if replica.state == "ready"]
        if self._rank == 0 and not ready:
            raise ActorsLost(f"every actor is gone, and with NCCL none comes back; {ELSE}")
        if self._trainer is None or self._actors is None or (self._rank == 0 and ready != self._actors.members):
            self._actors = Actors(pool, ready, self._workers, seconds)
            self._trainer = self._join(self._actors, seconds)
        self._actors.parcel, self._actors.in_flight = parcel, in_flight
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # vLLM packs on streams of its own, which do not wait for the optimiser's
        try:
            self._within(seconds, self._trainer.send_weights)
        except Late:
            what = f"the broadcast of version {parcel.version} by NCCL from {self._address} to {self._who()}"
            raise ActorsLost(f"{what} did not end within {seconds:.0f} s; {ELSE}") from None
        self._source.weights = None

    def done(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """The communicator goes with this process: to abort it could wait for a peer that is gone."""

    def _join(self, actors: Actors, seconds: float) -> Any:
        port = _free_port(self._address) if self._rank == 0 else 0
        info = NCCLTrainerInitInfo(
            master_address=self._address, master_port=port, world_size=1 + self._workers * len(actors.members),
            packed_buffer_size_bytes=BUFFER_BYTES, rank=self._rank,
        )  # fmt: skip
        try:
            trainer = self._within(seconds, lambda: WeightTransferTrainerFactory.trainer_init(info, client=actors, source=self._source))
            if self._rank == 0 and trainer.model_update_group.disabled:  # vLLM goes on without a word, and would send nothing
                raise RuntimeError("vLLM cannot load NCCL here, or VLLM_DISABLE_PYNCCL is set")
        except ActorsLost:
            raise
        except (Late, RuntimeError) as error:
            why = f"nothing within {seconds:.0f} s" if isinstance(error, Late) else _reason(error)
            raise ActorsLost(
                f"no NCCL group between the learner at {self._address}:{port} and {self._who()} ({why}): the machines must reach each other on "
                f"every port, over the interface that NCCL_SOCKET_IFNAME names; NCCL_DEBUG=INFO shows more; {ELSE}"
            ) from error
        return trainer

    def _who(self) -> str:
        return f"actors at {', '.join(self._actors_at) or 'unknown addresses'}"

    def _within(self, seconds: float, action: Callable[[], Any]) -> Any:
        """Of a thread that may stay behind, for a call that waits in NCCL cannot be ended. Raises Late."""
        outcome: Future[Any] = Future()

        def run() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                with torch.no_grad():  # a thread has its own mode
                    outcome.set_result(action())
            except BaseException as error:
                outcome.set_exception(error)

        Thread(target=run, daemon=True).start()
        try:
            return outcome.result(timeout=seconds)
        except TimeoutError:
            if outcome.done():
                raise
            raise Late from None


def _free_port(address: str) -> int:
    try:
        with socket.create_server((address, 0)) as found:
            return found.getsockname()[1]
    except OSError as error:
        raise ActorsLost(f"the learner cannot listen at {address}, its address in the Ray cluster, for NCCL ({error}); {ELSE}") from None


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')[:300]}"
