"""The learner's weights by vLLM's own trainer classes, over NCCL (opd_rollout.vllm_nccl) or CUDA IPC (opd_rollout.vllm_ipc): what both share.

No export is kept: an actor that comes back empty waits for the next version. Imports vLLM, so only where it is used. Neither way has run on a
GPU; see docs/distributed.md for what was checked without one.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.base import WeightSource as VllmWeightSource

from opd_rollout.actor_states import Replica, reason_of
from opd_rollout.dispatch import ActorsLost, Pool
from opd_rollout.types import WeightSource
from opd_rollout.weight_sync import Parcel

BUFFER_BYTES = 512 << 20  # of a packed piece, beside what vLLM was given; NCCL has two on every GPU of the group, CUDA IPC one on every rank's
ELSE = "use engine.transfer=shared_memory (with engine.exchange=FOLDER that all machines share), or run the same command again"


class Late(Exception):
    """A call that may wait for ever has had its time."""


class Source(VllmWeightSource):
    """The weights of the version that is being sent, on this rank's device; widest types first, for vLLM packs bytes without aligning them."""

    def __init__(self, device: torch.device) -> None:
        self.weights: WeightSource | None = None
        self._device = device

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and whole shapes, nothing gathered."""
        assert self.weights is not None
        m = self.weights.metadata()
        found = [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, shape, dtype in zip(m.names, m.shapes, m.dtypes, strict=True)]
        return sorted(found, key=lambda one: -one.dtype.itemsize)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Bucket by bucket, once for every width: a bucket has been gathered, copied and given back before its first tensor is handed out."""
        assert self.weights is not None
        for width in sorted({one.dtype.itemsize for one in self.metadata()}, reverse=True):
            for bucket in self.weights.buckets():
                for name, tensor in bucket:
                    if tensor.dtype.itemsize == width:
                        yield name, tensor.detach().to(self._device)


class Actors:
    """What vLLM's trainer side asks of the other side (VLLMWeightSyncClient), of several actors with `workers` GPUs each.

    plain: what becomes of an update's fields before they travel.
    """

    def __init__(
        self, pool: Pool, members: Sequence[Replica], workers: int, seconds: float, how: str, plain: Callable[[Any], Any] = lambda fields: fields
    ) -> None:
        self._pool, self.members, self._workers, self._seconds, self._how, self._plain = pool, list(members), workers, seconds, how, plain
        self.parcel, self.in_flight = Parcel(stamp="", version=0, written=None), False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """With NCCL every actor's first worker has the rank after the last worker of the actor before."""
        infos = [dict(init_info) for _ in self.members]
        for place, info in enumerate(infos):
            if "rank_offset" in info:
                info["rank_offset"] += place * self._workers
        self._all("transfer", [("init_weight_transfer_engine", {"init_info": info}) for info in infos])

    def start_weight_update(self) -> None:
        self._all("begin_update", [(self.in_flight,)] * len(self.members))

    def update_weights(self, update_info: Any) -> None:
        self._all("transfer", [("update_weights", {"update_info": self._plain(update_info)})] * len(self.members))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("end_update", [(self.parcel.version, self.parcel.stamp)] * len(self.members))

    def _all(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Raises ActorsLost for an actor that fails or is late."""
        self._mark(method)
        try:
            asked = [getattr(replica.handle, method).remote(*own) for replica, own in zip(self.members, arguments, strict=True)]
            ray.get(asked, timeout=self._seconds)
        except GetTimeoutError:
            raise ActorsLost(f"an actor did not end {method} of a weight update over {self._how} within {self._seconds:.0f} s; {ELSE}") from None
        except RayError as error:
            raise ActorsLost(f"a weight update over {self._how} failed in an actor, at {method}: {reason_of(error)}; {ELSE}") from error
        finally:
            self._mark("")

    def _mark(self, method: str) -> None:
        with self._pool.lock:
            for replica in self.members:
                replica.called = method
            self._pool.note()


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a trainer of vLLM's is made. how: its name for people; link: between whom, for people. join(actors, source, within) -> the trainer,
    with the actors ready for it; plain: see Actors."""

    how: str
    link: str
    join: Callable[[Actors, Source, Callable[[Callable[[], Any]], Any], float], Any]
    plain: Callable[[Any], Any] = lambda fields: fields


class TrainerTransfer:
    """A Transfer (opd_rollout.weight_sync); trainer and actors are joined with the first version, and again when an actor has gone or come."""

    def __init__(self, way: Way, rank: int, workers: int, attempt: str = "") -> None:
        """workers: of an actor. attempt: see SharedMemoryParcels."""
        self._way, self._rank, self._workers = way, rank, workers
        self._attempt, self._serial = attempt or secrets.token_hex(6), 0
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._source, self._actors, self._trainer = Source(self._device), None, None
        self._joined: list[tuple[str, int]] = []

    def make(self, weights: WeightSource) -> Parcel:
        """Nothing is copied: the weights leave in `deliver`."""
        self._serial += 1
        self._source.weights = weights
        return Parcel(stamp=f"{self._attempt}-{self._serial}", version=weights.version, written=None, lasting=False)

    def deliver(self, pool: Pool, parcel: Parcel, *, in_flight: bool, seconds: float) -> None:
        """All ranks iterate the weights, rank 0 sends. Raises ActorsLost, with both addresses, where that takes longer than `seconds`."""
        members = pool.present(seconds) if self._rank == 0 else []
        joined = [(replica.name, pool.facts[replica.name].pid) for replica in members]
        if self._trainer is None or self._actors is None or joined != self._joined:
            self._actors = Actors(pool, members, self._workers, seconds, self._way.how, self._way.plain)
            self._trainer, self._joined = self._way.join(self._actors, self._source, lambda action: self._within(seconds, action), seconds), joined
        self._actors.parcel, self._actors.in_flight = parcel, in_flight
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # vLLM packs on streams of its own, which do not wait for the optimiser's
        try:
            self._within(seconds, self._trainer.send_weights)
        except Late:
            what = f"sending version {parcel.version} by {self._way.how} {self._way.link}"
            raise ActorsLost(f"{what} did not end within {seconds:.0f} s; {ELSE}") from None
        self._source.weights = None
        pool.filled(members if self._rank == 0 else pool.replicas)

    def done(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """A communicator goes with this process: to abort it could wait for a peer that is gone."""

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

