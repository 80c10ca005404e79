"""Several machines in one run: a line from each launcher to that of machine 0, over which they start, end and start again together.

Every attempt has a rendezvous of its own, so a rank that was started anew meets no rank of the attempt before. Lines carry JSON objects; whoever
loses one ends its ranks. `Alone`, `Leader` (machine 0) and `Follower` have the same methods; what they raise is for the command line.
"""

import contextlib
import fcntl
import json
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from opd.config.load import recipe_hash
from opd.config.recipe import Recipe
from opd.errors import Preempted, RunFailed
from opd.launcher.watch import End, preempted

POLL_SECONDS = 0.2
ANSWER_SECONDS = 120.0  # for another machine to end its ranks and say how they ended
HELLO_SECONDS = 10.0
LONGEST_LINE = 1 << 20
MACHINE_0_GONE = "machine 0's launcher is gone, or the network to it"
ORDER = ("input", "skipped", "paused", "preempted", "lost", "failed", "finished")  # which of several ends explains the others


class Machines(Protocol):
    """This machine among those of a run."""

    def gather(self, scratch: Path, asked: Callable[[], int]) -> str:
        """Where this attempt's ranks meet, once every machine is here.

        Raises Preempted for a signal that `asked` returns, RunFailed when somebody does not come, ValueError for a machine of another run.
        """
        ...

    def look(self) -> End | None:
        """How the attempt has ended on another machine, if it has before its time: ranks that have finished there wait for nobody."""
        ...

    def agree(self, end: End, may_restart: bool) -> tuple[End, bool]:
        """How the attempt ended over all machines, and whether machine 0, which alone is asked, starts another."""
        ...


class Alone:
    """The only machine."""

    def gather(self, scratch: Path, asked: Callable[[], int]) -> str:
        return f"file://{scratch}/rendezvous"

    def look(self) -> End | None:
        return None

    def agree(self, end: End, may_restart: bool) -> tuple[End, bool]:
        return end, end.restartable and may_restart


class Line:
    """JSON objects to and from one launcher; `closed` once the other side is gone."""

    def __init__(self, link: socket.socket) -> None:
        self._link, self._rest, self.closed = link, b"", False
        link.settimeout(HELLO_SECONDS)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine without power closes nothing
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def tell(self, **message: Any) -> None:
        try:
            self._link.sendall((json.dumps(message) + "\n").encode())
        except OSError:
            self.closed = True

    def hear(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None when none has come in time, or none will."""
        until = time.monotonic() + seconds
        while not self.closed:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                return self._read(line)
            left = until - time.monotonic()
            if not select.select([self._link], [], [], max(0.0, left))[0]:
                return None
            try:
                received = self._link.recv(1 << 16)
            except OSError:
                received = b""
            self._rest += received
            self.closed = not received or len(self._rest) > LONGEST_LINE
        return None

    def _read(self, line: bytes) -> dict[str, Any] | None:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                return message
        self.closed = True  # nobody who speaks to a launcher
        return None

    def close(self) -> None:
        self.closed = True
        self._link.close()


class Leader:
    """Machine 0: waits for the others, hears how their ranks ended, decides."""

    def __init__(self, listener: socket.socket, host: str, hello: Mapping[str, Any], deadline_seconds: float) -> None:
        self._listener, self._host, self._hello, self._deadline_seconds = listener, host, hello, deadline_seconds
        self._lines: dict[int, Line] = {}
        self._ends: dict[int, End] = {}

    def gather(self, scratch: Path, asked: Callable[[], int]) -> str:
        until, told = time.monotonic() + self._deadline_seconds, False
        while missing := [number for number in range(1, self._hello["nodes"]) if number not in self._lines]:
            named = f"machine{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            if not told:
                print(f"opd: waiting for {named} of 0 to {self._hello['nodes'] - 1} (launch.node_rank)", file=sys.stderr, flush=True)
                told = True
            _check_asked(asked())
            if time.monotonic() > until:
                limit = f"launch.deadline_seconds={self._deadline_seconds:g}"
                raise RunFailed(f"{named} did not come within {limit}: start the same command there, with its launch.node_rank")
            if select.select([self._listener], [], [], POLL_SECONDS)[0]:
                self._admit(Line(self._listener.accept()[0]))
        self._ends = {}
        store = f"tcp://{self._host}:{free_port(self._host)}"
        for line in self._lines.values():
            line.tell(store=store)
        return store

    def look(self) -> End | None:
        for number, line in self._lines.items():
            if number not in self._ends and (end := self._end_of(number, line, 0.0)):
                self._ends[number] = end
        return next((end for end in self._ends.values() if end.kind != "finished"), None)

    def agree(self, end: End, may_restart: bool) -> tuple[End, bool]:
        for number, line in self._lines.items():
            if number not in self._ends:
                line.tell(over=True)
        until = time.monotonic() + ANSWER_SECONDS
        for number, line in self._lines.items():
            if number not in self._ends:
                found = self._end_of(number, line, until - time.monotonic())
                self._ends[number] = found or End(kind="failed", text=f"machine {number} has not answered for {ANSWER_SECONDS:.0f} s")
        whole = joint([end, *self._ends.values()])
        again = whole.restartable and may_restart
        for line in self._lines.values():
            line.tell(verdict=asdict(whole), again=again)
        return whole, again

    def close(self) -> None:
        for line in self._lines.values():
            line.close()
        self._listener.close()

    def _admit(self, line: Line) -> None:
        said = line.hear(HELLO_SECONDS)
        if said is None or "machine" not in said:
            line.close()
            return
        number = said.pop("machine")
        others = {name: (value, said.get(name)) for name, value in self._hello.items() if said.get(name) != value}
        if not others and number in range(1, self._hello["nodes"]) and number not in self._lines:
            self._lines[number] = line
            return
        why = "; ".join(f"{name} is {theirs} there and {ours} on machine 0" for name, (ours, theirs) in others.items())
        line.tell(refused=why or f"machine {number} is here already: give each machine its own launch.node_rank")
        line.close()

    def _end_of(self, number: int, line: Line, seconds: float) -> End | None:
        """What a machine says of its ranks' end; None while it says nothing."""
        said = line.hear(seconds)
        if said is not None and "end" in said:
            end = End(**said["end"])
            return End(**{**asdict(end), "text": f"machine {number}: {end.text}" if end.kind in ("lost", "failed") else end.text})
        return End(kind="failed", text=f"machine {number}'s launcher is gone, or the network to it") if line.closed else None


class Follower:
    """Another machine than the first."""

    def __init__(self, host: str, port: int, hello: Mapping[str, Any], deadline_seconds: float) -> None:
        self._host, self._port, self._hello, self._deadline_seconds = host, port, hello, deadline_seconds
        self._line: Line | None = None

    def gather(self, scratch: Path, asked: Callable[[], int]) -> str:
        until = time.monotonic() + self._deadline_seconds
        if self._line is None:
            self._line = self._reach(until, asked)
            self._line.tell(**self._hello)
        while time.monotonic() < until and not self._line.closed:
            _check_asked(asked())
            said = self._line.hear(POLL_SECONDS)
            if said is not None and "refused" in said:
                raise ValueError(f"{said['refused']}; run the same command on every machine, with its own launch.node_rank")
            if said is not None and "store" in said:
                return str(said["store"])
        raise RunFailed(MACHINE_0_GONE if self._line.closed else f"machine 0 waits for others (launch.deadline_seconds={self._deadline_seconds:g})")

    def look(self) -> End | None:
        assert self._line is not None
        said = self._line.hear(0.0)
        if said is not None and "over" in said:
            return End(kind="lost", text="the ranks of another machine have ended", restartable=True, caused=True)
        return End(kind="failed", text=MACHINE_0_GONE) if self._line.closed else None

    def agree(self, end: End, may_restart: bool) -> tuple[End, bool]:
        assert self._line is not None
        self._line.tell(end=asdict(end))
        until = time.monotonic() + max(2 * ANSWER_SECONDS, self._deadline_seconds)  # machine 0's rank may still write a large model
        while (left := until - time.monotonic()) > 0 and not self._line.closed:
            said = self._line.hear(left)
            if said is not None and "verdict" in said:
                return End(**said["verdict"]), said["again"]
        return joint([end, End(kind="failed", text=MACHINE_0_GONE)]), False

    def close(self) -> None:
        if self._line is not None:
            self._line.close()

    def _reach(self, until: float, asked: Callable[[], int]) -> Line:
        last: OSError | None = None
        while time.monotonic() < until:
            _check_asked(asked())
            try:
                return Line(socket.create_connection((self._host, self._port), timeout=HELLO_SECONDS))
            except OSError as error:
                if last is None:
                    print(f"opd: waiting for machine 0 at {self._host}:{self._port} ({error})", file=sys.stderr, flush=True)
                last = error
            time.sleep(POLL_SECONDS)
        raise RunFailed(f"machine 0 does not answer at {self._host}:{self._port} ({last}): start the same command there, with launch.node_rank=0")

@contextmanager
def machines_of(recipe: Recipe) -> Iterator[Machines]:
    """This machine among those of the recipe. Raises ValueError for an address that cannot be had."""
    launch = recipe.launch
    if launch.nodes == 1:
        yield Alone()
        return
    host, port = master_address(launch.master)
    hello = {"nodes": launch.nodes, "learner.ranks": recipe.learner.ranks, "recipe": recipe_hash(recipe), "name": recipe.name}
    if launch.node_rank:
        machine: Leader | Follower = Follower(host, port, {**hello, "machine": launch.node_rank}, launch.deadline_seconds)
    else:
        machine = Leader(_listen(launch.master, host, port), host, hello, launch.deadline_seconds)
    with contextlib.closing(machine):
        yield machine


def master_address(master: str) -> tuple[str, int]:
    """HOST:PORT as an IPv4 address and a number. Raises ValueError for a host that nobody knows, or that means another machine on each."""
    name, _, port = master.rpartition(":")
    try:
        host = socket.gethostbyname(name)
    except OSError as error:
        raise ValueError(f"launch.master={master}: unknown host ({error}); give machine 0's address, e.g. 10.0.0.1:29500") from None
    if host.startswith("127.") and name != "localhost" and not name.startswith("127."):
        raise ValueError(f"launch.master={master}: {name} is {host} here, where no other machine comes; give the address that they see")
    if not 0 < int(port) < 1 << 16:
        raise ValueError(f"launch.master={master}: ports go from 1 to 65535")
    return host, int(port)


def interface_to(host: str) -> str | None:
    """Name of this machine's network interface on the way to `host`; None where the system does not say."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return None
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                if fcntl.ioctl(probe, 0x8915, name.encode().ljust(256, b"\0"))[20:24] == own:  # SIOCGIFADDR
                    return name
    return None


def free_port(host: str) -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def joint(ends: list[End]) -> End:
    """The end that explains the others."""
    return min(ends, key=lambda end: (end.caused, ORDER.index(end.kind)))


def _listen(master: str, host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ValueError(f"launch.master={master}: cannot listen there ({error}); give a free port of machine 0") from None


def _check_asked(number: int) -> None:
    if number:
        raise Preempted(f"{preempted(number).text} while waiting for other machines")
