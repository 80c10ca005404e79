"""Ray, seen from the driver (who starts and owns the actors) and from a learner rank (who only finds them by name)."""

import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private import state as ray_state
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from opd_rollout.vllm_actor import VllmActor
from opd_rollout.vllm_types import Place

TESTED_VLLM = ((0, 27), (0, 33))
LOOPBACK = "127.0.0.1"
ENVIRONMENT = {  # of every actor; nobind: with vLLM's own binding all actors of a machine share its first core
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray keeps 127.0.0.1, on which its servers then listen, instead of a public address
REACH_SECONDS = 5.0  # to connect, and again to be greeted
PLACED_SECONDS = 60.0  # until an actor says which GPUs it was given
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # of HTTP/2 (RFC 9113), which gRPC and so Ray speaks
SETTINGS = 4  # the kind of the frame that its servers answer with
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPlan:
    """`replicas` actors of one role (student, or a teacher's name), each on `gpus` GPUs.

    shared_gpus: CUDA_VISIBLE_DEVICES of every replica where they share the learner's GPUs (colocated) and Ray must not count them.
    """

    role: str
    replicas: int = 1
    gpus: int = 0
    restarts: int = 10
    shared_gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorAddress:
    """How a rank finds the actors: plain values, for JSON. exchange: a folder for weights that all ranks of one start share."""

    address: str
    namespace: str
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    exchange: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_installed() -> None:
    """Raises ValueError where vLLM or Ray is missing or of a version that was never tried."""
    for name in ("vllm", "ray"):
        found = _version_of(name)
        if found is None:
            raise ValueError(f'engine=vllm needs {name}, which is not installed: pip install "opd-train[gpu]" (or, without a GPU, "opd-train[cpu]")')
        low, high = TESTED_VLLM
        if name == "vllm" and not low <= tuple(int(part) for part in found.split(".")[:2]) < high:
            raise ValueError(
                f"vLLM {found} is installed, and its weight transfer was tried from {low[0]}.{low[1]} up to, not including, {high[0]}.{high[1]}: "
                f'pip install "vllm>={low[0]}.{low[1]},<{high[0]}.{high[1]}"'
            )


def _version_of(name: str) -> str | None:
    for candidate in (name, f"{name}-cpu"):
        with suppress(PackageNotFoundError):
            return version(candidate)
    return None


@contextmanager
def start_actors(
    plans: Sequence[ActorPlan],
    *,
    address: str = "",
    gpus: Sequence[str] = (),
    learner_gpus: int = 0,
    folder: Path | None = None,
    passed: Mapping[str, str] | None = None,
) -> Iterator[ActorAddress]:
    """Start (or join, by `address`) a Ray cluster and create the named, still empty actors of every plan; all are gone after the block.

    gpus: this machine's, as CUDA_VISIBLE_DEVICES names them; the learner's ranks take the first `learner_gpus`, and a cluster that is started
    here gives out the others. folder: where a cluster that is started keeps its sockets and logs.
    passed: environment variables of the actors. Raises ValueError where the cluster lacks what the plans need, or cannot be reached.
    """
    check_installed()
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    namespace, found = f"opd-{secrets.token_hex(6)}", os.environ.get(ONE_MACHINE)
    created: list[Any] = []
    at, is_loopback = find_cluster(address) if address else ("", True)
    if is_loopback:
        os.environ[ONE_MACHINE] = "0"
    try:
        with nullcontext() if address or not gpus else _sees_only(gpus[learner_gpus:]):
            _join(at, namespace, folder)
        taken, offered = 0 if address else learner_gpus, ray.available_resources()
        check_resources(plans, {**offered, "GPU": offered.get("GPU", 0) + taken}, taken, address)
        if address:
            check_nodes(plans, [node.get("GPU", 0) for node in ray_state.available_resources_per_node().values()], address)
        names: dict[str, list[str]] = {}
        for plan in plans:
            for index in range(plan.replicas):
                created.append(_create(plan, index, namespace, passed or {}, shared=bool(address)))
                names.setdefault(plan.role, []).append(f"{plan.role}-{index}")
        where = ActorAddress(address=ray.get_runtime_context().gcs_address, namespace=namespace, names=names)
        if address and learner_gpus:
            apart = [actor for plan in plans if plan.gpus and not plan.shared_gpus for actor in connect(where, plan.role)]
            check_given(places(apart, "", PLACED_SECONDS), own_address(), gpus[:learner_gpus])
        yield where
    finally:
        for handle in created:
            with suppress(RayError, RuntimeError):
                ray.kill(handle, no_restart=True)
        ray.shutdown()
        os.environ.pop(ONE_MACHINE, None)
        os.environ.update({} if found is None else {ONE_MACHINE: found})


def find_cluster(address: str) -> tuple[str, bool]:
    """HOST:PORT where the cluster of `address` (auto, or HOST:PORT) answers, and whether it keeps to this machine's loopback interface.

    Raises ValueError within 4 x REACH_SECONDS where none does; Ray itself would try for over a minute, then end this process.
    """
    fix = "start a cluster (ray start --head), correct ray.address, or leave it empty for a cluster of this machine"
    found = given = address
    _follow_environment()
    try:
        given = _the_one_here() if address == "auto" else address
        found = services.canonicalize_bootstrap_address(given) or ""  # Ray takes 127.0.0.1 for this machine's public address
        try:
            _greet(found)
        except (OSError, ValueError):
            if found == given:
                raise
            _greet(given)  # of a cluster that was started with --node-ip-address=127.0.0.1
            return given, True
    except TimeoutError:
        raise ValueError(f"no Ray cluster answers at ray.address={address} ({found}: no answer within {REACH_SECONDS:.0f} s); {fix}") from None
    except (OSError, OverflowError, ValueError) as error:
        raise ValueError(f"no Ray cluster answers at ray.address={address} ({found}: {_first_line(error)}); {fix}") from None
    return found, found.startswith(f"{LOOPBACK}:")


def _the_one_here() -> str:
    """As Ray finds it: RAY_ADDRESS, what `ray start` started last, or what runs on this machine; but never one of several by chance."""
    if given := os.environ.get(ray_constants.RAY_ADDRESS_ENVIRONMENT_VARIABLE):
        return given
    running, newest = sorted(services.find_gcs_addresses()), services.find_bootstrap_address(None)
    if newest in running or len(running) == 1:
        return newest if newest in running else running[0]
    raise ValueError(f"on this machine run {', '.join(running)}: name one" if running else "none runs on this machine")


def _greet(address: str) -> None:
    """Raises OSError, OverflowError or ValueError where nothing, or something else than Ray, listens."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS) as link:
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            link.sendall(PREFACE)
            answer = link.recv(9)
            if len(answer) < 9 or answer[3] != SETTINGS:
                raise ConnectionError("something else than Ray listens there")


def connect(where: ActorAddress, role: str) -> list[tuple[str, Any]]:
    """(name, handle) of the actors of one role, joining the cluster first if need be. Raises ValueError where they are not there."""
    if not ray.is_initialized():
        _join(where.address, where.namespace)
    found = []
    for name in where.names.get(role, ()):
        try:
            found.append((name, ray.get_actor(name, namespace=where.namespace)))
        except (ValueError, RayError) as error:
            raise ValueError(f"actor {name} of namespace {where.namespace} is not there; start the run with `opd train`") from error
    if not found:
        raise ValueError(f"this run has no actors for {role!r}; it has {', '.join(where.names) or 'none'}")
    return found


def own_address() -> str:
    """Of this machine in the cluster that this process has joined."""
    return ray.util.get_node_ip_address()


def places(actors: Sequence[tuple[str, Any]], path: str, seconds: float) -> list[Place]:
    """Of every actor that answers in time, with whether it sees `path`."""
    asked = [handle.place.remote(path) for _, handle in actors]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=seconds)
    found = []
    for reference in ready:
        with suppress(RayError):  # one that is being restarted: the others say where it will be
            found.append(ray.get(reference, timeout=seconds))
    return found


def check_resources(plans: Sequence[ActorPlan], offered: Mapping[str, float], learner_gpus: int, address: str) -> None:
    """Raises ValueError with what is missing."""
    counted = [plan for plan in plans if plan.gpus and not plan.shared_gpus]
    wanted = sum(plan.gpus * plan.replicas for plan in counted)
    have = int(offered.get("GPU", 0))
    where = f"the Ray cluster at {address}" if address else "this machine"
    if wanted and have < wanted + learner_gpus:
        parts = ", ".join(f"{plan.role} {plan.replicas} x {plan.gpus}" for plan in counted)
        learner = f" and {learner_gpus} for the learner" if learner_gpus else ""
        raise ValueError(
            f"{where} offers {have} free GPUs, and this run needs {wanted} for the actors ({parts}){learner}: {wanted + learner_gpus - have} are "
            "missing. Lower engine.replicas or engine.tensor_parallel, use engine.placement=colocated, or add GPUs"
        )
    count = sum(plan.replicas for plan in plans)
    if address and offered.get("CPU", 0) < count:
        raise ValueError(
            f"{where} offers {offered.get('CPU', 0):.0f} free CPUs, and {count} actors need one each; lower engine.replicas or free some"
        )


def check_nodes(plans: Sequence[ActorPlan], gpus_of_nodes: Sequence[float], address: str) -> None:
    """Raises ValueError where the GPUs of an actor are free on no one machine of the cluster: Ray would wait for them without a word."""
    left = sorted((int(gpus) for gpus in gpus_of_nodes), reverse=True)
    for plan in sorted(plans, key=lambda plan: -plan.gpus):
        for _ in range(plan.replicas if plan.gpus and not plan.shared_gpus else 0):
            place = next((index for index, free in reversed(list(enumerate(left))) if free >= plan.gpus), None)
            if place is None:
                raise ValueError(
                    f"each of the {plan.replicas} {plan.role} actors wants {plan.gpus} GPUs of one machine, and the machines of the Ray cluster at "
                    f"{address} have {', '.join(str(int(gpus)) for gpus in gpus_of_nodes)} free: lower engine.tensor_parallel or engine.replicas"
                )
            left[place] -= plan.gpus
            left.sort(reverse=True)


def check_given(actors_at: Sequence[Place], learner_at: str, learners: Sequence[str]) -> None:
    """Raises ValueError where Ray gave an actor a GPU of the learner's, `learners`, as CUDA_VISIBLE_DEVICES names them."""
    both = sorted({gpu for place in actors_at if place.address == learner_at for gpu in place.gpus} & set(learners))
    if both:
        raise ValueError(
            f"the Ray cluster gives out the learner's GPU {', '.join(both)} of {learner_at}: start Ray there with CUDA_VISIBLE_DEVICES set to GPUs "
            f"other than {', '.join(learners)}, leave ray.address empty, or use engine.placement=colocated"
        )


def _create(plan: ActorPlan, index: int, namespace: str, passed: Mapping[str, str], *, shared: bool) -> Any:
    environment = {**ENVIRONMENT, **passed}
    if "OMP_NUM_THREADS" in os.environ:
        environment["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
    if plan.shared_gpus:
        environment |= {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": plan.shared_gpus[index]}
    if plan.gpus:
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # whose GPUs they share
    return (
        ray.remote(VllmActor)
        .options(
            name=f"{plan.role}-{index}", namespace=namespace, num_cpus=1 if shared else 0, num_gpus=0 if plan.shared_gpus else plan.gpus,
            scheduling_strategy=here if plan.shared_gpus else None, max_restarts=plan.restarts, max_task_retries=0, max_concurrency=1000,
            runtime_env={"env_vars": environment},
        )
        .remote()
    )  # fmt: skip


@contextmanager
def _sees_only(gpus: Sequence[str]) -> Iterator[None]:
    """Processes that are started in the block see these GPUs: Ray numbers and gives out what its first process sees."""
    found = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        os.environ.update({} if found is None else {"CUDA_VISIBLE_DEVICES": found})


def _join(address: str, namespace: str, folder: Path | None = None) -> None:
    """A local cluster on the loopback interface, without a dashboard, or the one at `address`."""
    options: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if not address:
        options |= {"num_cpus": 0, "include_dashboard": False, "_node_ip_address": LOOPBACK, "address": "local"}
        options |= {} if folder is None else {"_temp_dir": str(folder)}
    else:
        options |= {"address": address}
    _follow_environment()
    asked_to_stop, talk = signal.getsignal(signal.SIGTERM), logging.getLogger("ray")
    level = talk.level
    talk.setLevel(logging.ERROR)
    try:
        if _is_here(address):
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # by this rule `ray start` asks for one
        ray.init(**options)
    except Exception as error:  # Ray raises also plain Exceptions
        reason = _first_line(error)
        fix = "leave ray.address empty for a cluster of this machine" if address else "free memory or ports on this machine, or use engine=torch"
        if address and "token" in str(error.__cause__ or error):
            fix = "the cluster asks for a token: set RAY_AUTH_MODE=token, with the cluster's ~/.ray/auth_token in place"
        raise ValueError(f"Ray {f'at {address} cannot be reached' if address else 'does not start'} ({reason}); {fix}") from error
    finally:
        talk.setLevel(level)
        signal.signal(signal.SIGTERM, asked_to_stop)  # Ray puts its own in the place of whoever saves the run


def _follow_environment() -> None:
    """Ray reads the variable only when it is imported."""
    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(ONE_MACHINE) != "0"


def _is_here(address: str) -> bool:
    """Whether a cluster's HOST:PORT is on this machine."""
    return address.rpartition(":")[0] in (LOOPBACK, services.get_node_ip_address()) if address else False


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
