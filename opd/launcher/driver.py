"""The launcher of a run with several processes: starts the learner's ranks, watches them, restarts them, and leaves none behind.

Light on purpose: neither torch nor a model is imported here, but where vLLM actors are wanted: this process is then Ray's driver. What a
rank does is told by its beacon (opd/launcher/beacon.py).
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from opd.config.recipe import Recipe
from opd.errors import Paused, Preempted, RunFailed, TooManySkipped
from opd.launcher.machines import interface_to, machines_of, master_address
from opd.launcher.sweep import marked_processes
from opd.launcher.watch import Board, Child, End, behind, preempted, read_messages, verdict
from opd.run.folder import check_chain, finished, run_folder
from opd.stop import stop_signals

GRACE_SECONDS = 10.0  # for the others to say how they ended, once one rank is gone
POLL_SECONDS = 0.2
GONE_SECONDS = 60.0  # from SIGKILL to the end
BEFORE_WORK = ("start", "imports", "join")  # phases of a rank that has nothing to save, and may wait for others where no signal reaches it


def wants_launcher(recipe: Recipe) -> bool:
    """Whether a run needs processes besides this one."""
    return recipe.learner.ranks > 1 or recipe.launch.nodes > 1


def refuse_other_launchers() -> None:
    """Raises ValueError inside torchrun, the deepspeed launcher or the like: opd starts its own ranks."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ or count not in ("", "1"):
        raise ValueError(
            f"this process was started by torchrun or another launcher (WORLD_SIZE={count}), but opd starts, watches and restarts its ranks "
            f"itself. Run once, without it: opd train RECIPE learner.ranks={count}; several machines: see docs/distributed.md"
        )


def train_stages(stages: Sequence[Recipe], reference: str, *, quiet: bool = False) -> Path:
    """Run recipes one after the other, each with its ranks; returns the last run's folder. Raises as `opd.api.train`, and RunFailed."""
    folder = Path()
    check_chain(stages, reference)
    for recipe in stages:
        folder = run_folder(recipe, reference)
        if not finished(folder, recipe.steps):
            launch(recipe, folder, quiet=quiet)
        elif not quiet:
            print(f"{folder} is finished: nothing to do", file=sys.stderr)
    return folder


@dataclass(slots=True)
class Forwarded:
    """The stop signal that came first; a second SIGINT ends everything at once."""

    number: int = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number


def launch(recipe: Recipe, folder: Path, *, quiet: bool) -> None:
    """One run with its ranks, from start to end, restarts included."""
    check_machine(recipe)
    asked, tries = Forwarded(), 0
    board = Board(folder, recipe)
    with stop_signals(asked), tempfile.TemporaryDirectory(prefix="opd-") as scratch, machines_of(recipe) as machines, actors_for(recipe) as actors:
        while True:
            place = Path(scratch) / str(board.restarts)
            place.mkdir()
            rendezvous = machines.gather(place, lambda: asked.number)
            with exchange_folder(recipe) as exchange, marked_processes(exchange):
                order = {"recipe": recipe.model_dump(mode="json"), "folder": str(folder), "quiet": quiet, "rendezvous": rendezvous}
                order["actors"] = actors and {**actors, "exchange": str(exchange or "")}
                children = start_ranks(recipe, order, place)
                try:
                    end = supervise(children, board, asked, recipe.launch.deadline_seconds, machines.look)
                finally:
                    stop_all(children)
            tries = 1 if board.saved_anew() else tries + 1
            end, again = machines.agree(end, not asked.number and tries <= recipe.launch.restarts)
            if not again:
                break
            board.restarts += 1
            print(f"opd: {end.text}; restarting from the last checkpoint ({tries} of {recipe.launch.restarts} without a new one)", file=sys.stderr)
        board.finish(end)
    conclude(end)


def conclude(end: End) -> None:
    """Raises what the run's end means to the command line."""
    match end.kind:
        case "finished":
            return
        case "preempted":
            raise Preempted(end.text)
        case "paused":
            raise Paused(end.text)
        case "input":
            raise ValueError(end.text)
        case "skipped":
            raise TooManySkipped(end.text)
        case _:
            raise RunFailed(f"{end.text}; the last checkpoint stays, run the same command to go on")


def check_machine(recipe: Recipe) -> None:
    """Raises ValueError for ranks that this machine cannot hold."""
    ranks, given = recipe.learner.ranks, os.environ.get("CUDA_VISIBLE_DEVICES")
    if find_spec("deepspeed") is None:
        raise ValueError('several ranks need deepspeed, which is not installed: pip install "opd-train[train]", or learner.ranks=1')
    devices = num_gpus()
    if devices and ranks > devices and os.environ.get("DS_ACCELERATOR") != "cpu":
        seen = f" (CUDA_VISIBLE_DEVICES={given})" if given is not None else ""
        raise ValueError(f"learner.ranks is {ranks}, but here are {devices} GPUs{seen}: use learner.ranks={devices}, or DS_ACCELERATOR=cpu")


def num_gpus() -> int:
    """GPUs that a process started now would see."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return len([device for device in given.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


@contextmanager
def actors_for(recipe: Recipe) -> Iterator[Mapping[str, Any] | None]:
    """Where the ranks find the recipe's actors, which this process, Ray's driver, has started; None for a recipe without any.

    Several machines: those of machine 0, whose rank 0 tells the others.
    """
    if not wants_actors(recipe) or recipe.launch.node_rank:
        yield None
        return
    with import_module("opd.build.system").actors_of(recipe) as where:  # torch and Ray, which a run without actors need not wait for
        yield where and where.as_dict()


def wants_actors(recipe: Recipe) -> bool:
    """Whether something of a recipe lives in a Ray actor: the student's engine, or a teacher's."""
    external = [signal.weights.get("external") for signal in recipe.signals.values() if isinstance(signal.weights, Mapping)]
    return recipe.engine.kind == "vllm" or any(isinstance(given, Mapping) and given.get("engine") == "vllm" for given in external)


@contextmanager
def exchange_folder(recipe: Recipe) -> Iterator[Path | None]:
    """A folder of one start of the ranks, for weights on their way to vLLM actors; None for another engine."""
    if recipe.engine.kind != "vllm":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="opd-", dir=recipe.engine.exchange, ignore_cleanup_errors=True) as made:
        yield Path(made)


def start_ranks(recipe: Recipe, order: Mapping[str, Any], scratch: Path) -> list[Child]:
    """This machine's ranks, told `order`. The first one of machine 0 has the terminal, the others write to files under `scratch`."""
    local, nodes = recipe.learner.ranks, recipe.launch.nodes
    first, count = recipe.launch.node_rank * local, local * nodes
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // local))
    interface = interface_of(recipe)
    children = []
    for place in range(local):
        ours, theirs = socket.socketpair()
        rank = first + place
        log = None if rank == 0 else scratch / f"rank-{rank}.log"
        with theirs, open(os.devnull) as nothing, log.open("wb") if log else open(os.devnull) as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "opd.launcher.beacon", str(theirs.fileno())],
                env={**os.environ, **environment(place, rank, count, interface)},
                stdin=nothing,
                stdout=output if log else None,
                stderr=output if log else None,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        child = Child(rank=rank, process=process, link=ours, log=log)
        child.tell(**order, rank=rank, count=count, threads=threads)
        ours.setblocking(False)
        children.append(child)
    return children


def interface_of(recipe: Recipe) -> str | None:
    """The network interface over which this machine's ranks meet the others; None: whatever gloo takes."""
    if recipe.launch.nodes == 1:
        return "lo" if sys.platform == "linux" else None
    return os.environ.get("GLOO_SOCKET_IFNAME") or interface_to(master_address(recipe.launch.master)[0])


def environment(place: int, rank: int, count: int, interface: str | None) -> dict[str, str]:
    """What torch, DeepSpeed and CUDA read; each rank sees one GPU, where there are any.

    interface: of the network over which ranks meet. Left to itself gloo takes that of the host's name, which is often the loopback.
    """
    found = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(count), "PYTHONFAULTHANDLER": "1"}
    given = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    if num_gpus() and os.environ.get("DS_ACCELERATOR") != "cpu":
        found["CUDA_VISIBLE_DEVICES"] = given[place] if given else str(place)
    if interface is not None:
        found["GLOO_SOCKET_IFNAME"] = interface
    return found


def supervise(
    children: Sequence[Child], board: Board, asked: Forwarded, deadline_seconds: float, elsewhere: Callable[[], End | None]
) -> End:
    """Watch until every rank has ended, or one has and the others had time to say so too; returns how the attempt ended here.

    elsewhere: how it has ended on another machine, if it has.
    """
    forwarded, first_end, other = False, None, None
    while True:
        read_messages(children, POLL_SECONDS)
        if asked.number and not forwarded:
            forwarded = True
            for child in children:
                child.signal(asked.number)
        gone = [child for child in children if child.process.poll() is not None]
        board.show(children, bool(asked.number))
        if len(gone) == len(children):
            read_messages(children, 0.0)
            return verdict(children, asked.number)
        if asked.number and all(child.facts.get("phase", "start") in BEFORE_WORK for child in children):
            return preempted(asked.number)
        other = other or elsewhere()
        broken = [child for child in gone if child.outcome[0] != "finished"]
        if (broken or other) and first_end is None:
            first_end = time.monotonic()
        if first_end is not None and time.monotonic() - first_end > GRACE_SECONDS:
            return verdict(children, asked.number) if broken or other is None else other
        stalled = board.stalled(children, deadline_seconds)
        if stalled is not None:
            for child in behind(children) or children:
                child.signal(signal.SIGUSR2)  # its stack, for whoever reads the log
            time.sleep(POLL_SECONDS)
            return stalled


def stop_all(children: Sequence[Child]) -> None:
    """SIGKILL to every rank's process group; returns when the ranks are gone. Raises RunFailed for one that does not end."""
    for child in children:
        child.kill()
    for child in children:
        child.link.close()
        try:
            child.process.wait(timeout=GONE_SECONDS)
        except subprocess.TimeoutExpired:
            where = f"rank {child.rank} (pid {child.process.pid}), killed in phase {child.place}"
            raise RunFailed(f"{where}, has not ended after {GONE_SECONDS:.0f} s: it waits inside the kernel, for a device or a disk") from None
