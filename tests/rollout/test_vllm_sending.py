"""NCCL and CUDA IPC without a GPU: vLLM's own trainer and worker classes, packing included, over what is faked in memory.

That is NCCL's communicator, and for CUDA IPC the way from a buffer to its handle and back. Not tested, for want of a GPU: NCCL and CUDA IPC
themselves, CUDA streams, an engine that runs meanwhile.
"""

import asyncio
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from queue import Queue
from types import SimpleNamespace

import pytest
import torch
from opd_rollout import vllm_nccl, vllm_sending
from opd_rollout.actor_states import Replica
from opd_rollout.dispatch import ActorsLost
from opd_rollout.shared_memory import Written
from opd_rollout.types import ModuleWeights
from opd_rollout.vllm_actor import VllmActor
from opd_rollout.vllm_ipc import cuda_ipc
from opd_rollout.vllm_nccl import _free_port, nccl_broadcast
from opd_rollout.vllm_transfer import PlainHandleTransfer, SharedMemoryTransfer
from ray.exceptions import GetTimeoutError, RayError
from torch.multiprocessing import reductions
from vllm import envs
from vllm.distributed.weight_transfer import base, ipc_engine, nccl_common, packed_tensor
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

pytestmark = pytest.mark.slow  # vLLM's import
WORKERS = 2
METADATA = ModuleWeights(version=0, named=(("a", torch.zeros(3)),)).metadata()


class FakeNetwork:
    """Queues between the ranks of one group; `joined` lists (port, rank, world_size) of whoever came."""

    def __init__(self):
        self.joined, self.queues, self.silent = [], {}, False

    def join(self, address, port, rank, world_size, device):
        if self.silent:
            threading.Event().wait(2)
        self.joined.append((port, rank, world_size))
        assert address == "10.0.0.1"
        queues = self.queues.setdefault(port, [Queue() for _ in range(world_size)])
        return FakeCommunicator(rank, queues)


class FakeCommunicator:
    def __init__(self, rank, queues):
        self.rank, self.queues, self.sent, self.disabled = rank, queues, 0, False

    def broadcast(self, tensor, src):
        assert src == 0
        if self.rank == src:
            self.sent += 1
            for queue in self.queues[1:]:
                queue.put(tensor.clone())
        else:
            tensor.copy_(self.queues[self.rank].get(timeout=20))


class FakeModel:
    def __init__(self):
        self.held = {}

    def load_weights(self, pairs):
        self.held |= {name: tensor.clone() for name, tensor in pairs}


class FakeActor:
    """vLLM's worker classes of one actor, called as VllmActor calls them through its engine."""

    def __init__(self, threads, receiver=NCCLWeightTransferEngine, devices=("cpu", "cpu")):
        self.models, self.calls, self.broken, self._threads = [FakeModel() for _ in range(WORKERS)], [], "", threads
        self._workers = []
        for rank, model in enumerate(self.models):
            parallel = SimpleNamespace(data_parallel_index=0, world_size=WORKERS, rank=rank)
            config = SimpleNamespace(parallel_config=parallel, model_config=None)
            self._workers.append(receiver(None, config, torch.device(devices[rank]), model))

    def __getattr__(self, method):
        if method not in ("transfer", "begin_update", "end_update"):
            raise AttributeError(method)
        return SimpleNamespace(remote=lambda *arguments: self._threads.submit(self._call, method, arguments))

    def _call(self, method, arguments):
        self.calls.append((method, *arguments))
        if self.broken == method:
            raise RayError("it broke")
        if method == "transfer":
            kind, request = arguments
            done = [self._threads.submit(self._at, worker, kind, request) for worker in self._workers]
            for one in done:
                one.result(timeout=20)

    def _at(self, worker, kind, request):
        if kind == "init_weight_transfer_engine":
            worker.init_transfer_engine(worker.parse_init_info(base.WeightTransferInitRequest(**request).init_info))
        else:
            fields = base.WeightTransferUpdateRequest(**request).update_info
            worker.receive_weights(worker.parse_update_info(MsgpackDecoder().decode(MsgpackEncoder().encode(fields))))  # to vLLM's engine process


@pytest.fixture
def fake_network(monkeypatch):
    network, stream = FakeNetwork(), SimpleNamespace(synchronize=lambda: None)

    def get(futures, timeout):
        try:
            return [future.result(timeout=timeout) for future in futures]
        except TimeoutError:
            raise GetTimeoutError from None

    monkeypatch.setattr(vllm_sending.ray, "get", get)
    monkeypatch.setattr(vllm_nccl, "_free_port", lambda address: 1000 + len({port for port, *_ in network.joined}))
    monkeypatch.setattr(vllm_sending, "BUFFER_BYTES", 100)
    monkeypatch.setattr(nccl_common, "stateless_init_process_group", network.join)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, number: (stream,) * number)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return network


@pytest.fixture
def fake_actors():
    with ThreadPoolExecutor(max_workers=32) as threads:
        yield [FakeActor(threads) for _ in range(2)]


def fake_pool(actors):
    replicas = [Replica(name=f"student-{n}", handle=actor, state="ready") for n, actor in enumerate(actors)]
    facts = {replica.name: SimpleNamespace(pid=100 + number) for number, replica in enumerate(replicas)}
    pool = SimpleNamespace(replicas=replicas, facts=facts, lock=threading.RLock(), note=lambda: None, filled=lambda members: None)
    pool.present = lambda seconds: [replica for replica in replicas if replica.state == "ready"]
    return pool


def weights(version):
    made = torch.Generator().manual_seed(version)
    parts = {name: torch.randn(shape, generator=made) for name, shape in {"a": (4, 5), "b": (8,), "c": (60,), "d": (5,)}.items()}
    parts["b"] = parts["b"].bfloat16()
    return ModuleWeights(version=version, named=tuple((name, torch.nn.Parameter(tensor)) for name, tensor in parts.items()))


def broadcast(rank=0):
    return nccl_broadcast(rank, "10.0.0.1", ["10.0.0.3", "10.0.0.2", "10.0.0.2"], WORKERS, attempt="word")


def test_every_worker_of_every_actor_gets_every_weight(fake_network, fake_actors):
    transfer, pool = broadcast(), fake_pool(fake_actors)
    for version in (3, 4):
        sent = weights(version)
        parcel = transfer.make(sent)
        transfer.deliver(pool, parcel, in_flight=version == 4, seconds=20)
        assert (parcel.version, parcel.stamp, parcel.lasting) == (version, f"word-{version - 2}", False)
        for model in (model for actor in fake_actors for model in actor.models):
            assert list(model.held) == ["a", "c", "d", "b"], "wide types first"
            assert all(torch.equal(model.held[name], tensor) and model.held[name].dtype == tensor.dtype for name, tensor in sent.named)
    assert sorted(rank for _, rank, _ in fake_network.joined) == [0, 1, 2, 3, 4], "one group for both versions, every worker a rank of its own"
    assert {(port, size) for port, _, size in fake_network.joined} == {(1000, 5)}
    communicator = transfer._trainer.model_update_group
    assert communicator.sent == 2 * 2, "two packed pieces a version: a is 80 bytes, and c ends the first, which may pass 100"
    for actor in fake_actors:
        assert [call[0] for call in actor.calls] == ["transfer", *["begin_update", "transfer", "end_update"] * 2]
        assert [call for call in actor.calls if call[0] == "begin_update"] == [("begin_update", False), ("begin_update", True)]
        assert [call for call in actor.calls if call[0] == "end_update"] == [("end_update", 3, "word-1"), ("end_update", 4, "word-2")]


def test_another_rank_iterates_every_bucket_and_calls_nobody(fake_network, fake_actors):
    read, sent = [], weights(1)

    def buckets():
        for pair in sent.named:
            yield [pair]
            read.append(pair[0])

    source = SimpleNamespace(version=1, metadata=sent.metadata, buckets=buckets)
    transfer = broadcast(rank=1)
    transfer.deliver(fake_pool(fake_actors), transfer.make(source), in_flight=False, seconds=20)
    assert read == ["a", "b", "c", "d"] * 2, "once for every width of its types"
    assert fake_network.joined == [] and all(actor.calls == [] for actor in fake_actors)


def test_a_lost_actor_stays_away_and_the_others_form_a_new_group(fake_network, fake_actors):
    transfer, pool = broadcast(), fake_pool(fake_actors)
    transfer.deliver(pool, transfer.make(weights(1)), in_flight=False, seconds=20)
    pool.replicas[0].state = "dead"
    transfer.deliver(pool, transfer.make(weights(2)), in_flight=False, seconds=20)
    assert sorted(fake_network.joined)[5:] == [(1001, 0, 3), (1001, 1, 3), (1001, 2, 3)]
    assert torch.equal(fake_actors[1].models[1].held["a"], weights(2).named[0][1])
    assert torch.equal(fake_actors[0].models[1].held["a"], weights(1).named[0][1])


def test_an_actor_that_came_back_empty_is_in_a_new_group(fake_network, fake_actors):
    transfer, pool = broadcast(), fake_pool(fake_actors)
    transfer.deliver(pool, transfer.make(weights(1)), in_flight=False, seconds=20)
    pool.facts["student-0"].pid += 10
    transfer.deliver(pool, transfer.make(weights(2)), in_flight=False, seconds=20)
    assert sorted(fake_network.joined)[5:] == [(1001, rank, 5) for rank in range(5)]
    assert all(torch.equal(actor.models[1].held["a"], weights(2).named[0][1]) for actor in fake_actors)


def test_types_that_vllm_would_not_align_arrive_whole(fake_network, fake_actors):
    """7 bfloat16 are 14 bytes: a float32 after them would fail in vLLM's unpacking, "storage_offset() must be divisible by 4"."""
    odd = [("x", torch.arange(7).bfloat16()), ("y", torch.randn(3)), ("z", torch.randn(2).double()), ("s", torch.tensor([3], dtype=torch.int8))]
    sent = ModuleWeights(version=1, named=tuple(odd))
    transfer = broadcast()
    transfer.deliver(fake_pool(fake_actors), transfer.make(sent), in_flight=False, seconds=20)
    for model in (model for actor in fake_actors for model in actor.models):
        assert list(model.held) == ["z", "y", "x", "s"]
        assert all(torch.equal(model.held[name], tensor) and model.held[name].dtype == tensor.dtype for name, tensor in odd)


def test_a_group_that_does_not_form_is_an_error_with_both_addresses(fake_network, fake_actors):
    fake_network.silent, transfer = True, broadcast()
    said = r"no NCCL group between the learner at 10.0.0.1:1000 and actors at 10.0.0.2, 10.0.0.3 \({}\): .*NCCL_SOCKET_IFNAME"
    with pytest.raises(ActorsLost, match=said.format("nothing within 0 s")):
        transfer.deliver(fake_pool(fake_actors), transfer.make(weights(1)), in_flight=False, seconds=0.3)


@pytest.mark.parametrize("why", ["vLLM cannot load NCCL here", "NCCL error: 2"])
def test_an_nccl_that_vllm_cannot_use_is_an_error_not_silence(why, fake_network, fake_actors, monkeypatch):
    def join(*arguments, **options):
        communicator = fake_network.join(*arguments, **options)
        communicator.disabled = True
        if why == "NCCL error: 2":
            raise RuntimeError(why)
        return communicator

    monkeypatch.setattr(nccl_common, "stateless_init_process_group", join)
    transfer = broadcast()
    with pytest.raises(ActorsLost, match=rf"10.0.0.1:1000 and actors at 10.0.0.2, 10.0.0.3 \(RuntimeError: {why}.*\): "):
        transfer.deliver(fake_pool(fake_actors), transfer.make(weights(1)), in_flight=False, seconds=20)


def test_an_address_where_the_learner_cannot_listen():
    with pytest.raises(ActorsLost, match="the learner cannot listen at 203.0.113.7, its address in the Ray cluster"):
        _free_port("203.0.113.7")


@pytest.mark.parametrize("method", ["begin_update", "end_update"])
def test_an_actor_that_fails_in_an_update_is_named_with_what_it_did(method, fake_network, fake_actors):
    fake_actors[1].broken, transfer = method, broadcast()
    with pytest.raises(ActorsLost, match=f"over NCCL failed in an actor, at {method}: RayError: it broke; use engine.transfer=shared_memory"):
        transfer.deliver(fake_pool(fake_actors), transfer.make(weights(1)), in_flight=False, seconds=20)


class FakeSharing:
    """Two ranks in two threads, GPU-0 and GPU-1, and buffers that travel as handles. made: handle -> buffer; opened: (handle, device) in order."""

    def __init__(self):
        self.of_thread, self.made, self.opened, self.slots = threading.local(), {}, [], {}
        self.together = threading.Barrier(2, timeout=20)

    def reduce(self, buffer):
        handle = b"handle %d" % len(self.made)
        self.made[handle] = buffer
        known = (handle, buffer.nbytes, 0, False, b"counter", 8, b"event", True)
        return None, (torch.Tensor, buffer.size(), buffer.stride(), 0, torch.storage.TypedStorage, buffer.dtype, 5, *known)

    def rebuild(self, *fields):
        buffer, device = self.made[fields[7]], fields[6]
        _, known = self.reduce(buffer)
        assert fields == (*known[:6], device, fields[7], *known[8:]) and [type(one) for one in fields[1:3]] == [tuple, tuple]
        self.opened.append((fields[7], device))
        return buffer

    def gather(self, found, handles):
        self.slots[next(iter(handles[0]))] = handles
        self.together.wait()
        found[:] = [self.slots[name] for name in sorted(self.slots)]
        self.together.wait()


@pytest.fixture
def fake_sharing(monkeypatch):
    sharing, empty, get = FakeSharing(), torch.empty, lambda futures, timeout: [future.result(timeout=timeout) for future in futures]
    monkeypatch.setattr(vllm_sending.ray, "get", get)
    monkeypatch.setattr(vllm_sending, "BUFFER_BYTES", 100)
    monkeypatch.setattr(packed_tensor, "reduce_tensor", sharing.reduce)
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", sharing.rebuild)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **{**options, "device": "cpu"}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: getattr(sharing.of_thread, "rank", 0))
    for name in ("synchronize", "ipc_collect"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(ipc_engine.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(ipc_engine.torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(ipc_engine.torch.distributed, "all_gather_object", sharing.gather)
    monkeypatch.setattr(ipc_engine.torch.distributed, "barrier", sharing.together.wait)
    return sharing


def test_every_worker_reads_the_buffer_of_the_rank_on_its_gpu(fake_sharing):
    """One actor over the GPUs of two ranks, each of which fills a buffer of its own with everything; no class and no pickle on the way."""
    assert not envs.VLLM_ALLOW_INSECURE_SERIALIZATION
    with ThreadPoolExecutor(max_workers=32) as threads:
        actor = FakeActor(threads, PlainHandleTransfer, ["cuda:0", "cuda:1"])
        pools, transfers = [fake_pool([actor]) for _ in range(2)], [cuda_ipc(rank, WORKERS, attempt="word") for rank in range(2)]

        def deliver(rank, version):
            fake_sharing.of_thread.rank = rank
            sent = weights(version) if rank == 0 else ModuleWeights(version=version, named=weights(version).named)
            transfers[rank].deliver(pools[rank], transfers[rank].make(sent), in_flight=False, seconds=20)

        for version in (3, 4):
            for done in [threads.submit(deliver, rank, version) for rank in range(2)]:
                done.result(timeout=30)
            for model in actor.models:
                assert list(model.held) == ["a", "c", "d", "b"]
                for name, tensor in weights(version).named:
                    assert torch.equal(model.held[name], tensor) and model.held[name].dtype == tensor.dtype
    assert {fake_sharing.made[handle].nbytes for handle, _ in fake_sharing.opened} == {240}, "as the largest tensor, which vLLM wants whole"
    assert len(fake_sharing.opened) == len(set(fake_sharing.opened)) == 2 * WORKERS, "each buffer is mapped once, by one worker"
    kinds = [call[1] if call[0] == "transfer" else call[0] for call in actor.calls]
    assert kinds == ["init_weight_transfer_engine", *["begin_update", *["update_weights"] * 3, "end_update"] * 2], "a, then c, then d and b"


def test_the_names_that_vllm_has_for_what_is_sent():
    """A rename in vLLM fails here, not at a user's first run on GPUs."""
    assert {"nccl", "ipc"} <= set(WeightTransferEngineFactory._registry) & set(WeightTransferTrainerFactory._registry)
    fields = {one.name for one in dataclasses.fields(SharedMemoryTransfer.update_info_cls)}
    sent = {}

    class FakeRunner:
        async def call(self, method, *arguments, **options):
            sent[method] = arguments

        async def hold(self, *, keep=True): ...

        async def release(self): ...

    actor = VllmActor()
    actor._runner, actor._opened = FakeRunner(), (None, SimpleNamespace(adapter=""))
    asyncio.run(actor.load(Written(path="/x", metadata=METADATA), 5, "word-1"))
    assert set(sent["update_weights"][0].update_info) == fields
    assert sent["finish_weight_update"] == ("5",)
