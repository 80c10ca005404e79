"""Runs a program that nobody trusts: own process, network, mount and host namespaces, an unused user id, limits on everything.

What a program sees: the interpreter and the system's libraries (read-only), three devices, an empty scratch of bounded size. No network, no
other process, no file of the user, no environment. Linux only. The kernel itself is the wall: its bugs are not defended against.
"""

import functools
import json
import os
import pwd
import secrets
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SETUP_FAILED = 97
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
_GRACE_SECONDS = 5.0  # to end a program whose time is over; beyond it the machine is in trouble


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use. seconds: wall clock; cpu_seconds, memory_bytes: of each of its processes; scratch_bytes: files it writes."""

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 512 << 20
    processes: int = 8
    scratch_bytes: int = 16 << 20
    output_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended. status: "ended" by itself with exit_code (128 + n after signal n), or stopped for its "time" or its "output"."""

    status: Literal["ended", "time", "output"]
    exit_code: int
    stdout: bytes
    stderr: bytes


class NoIsolation(ValueError):
    """This machine cannot close a program in, so it is not run."""


def run_python(source: str, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
    """Runs Python source in the sandbox (this interpreter, standard library only) and waits for its end or its deadline.

    Raises NoIsolation, before the program runs, where any part of the isolation fails.
    """
    limits = limits or Limits()
    command = [os.path.realpath(sys.executable), "-I", "-S", "-B", "/scratch/program.py"]
    readable = [folder for folder in (*_SYSTEM, os.path.realpath(sys.base_prefix)) if os.path.isdir(folder)]
    readable = [f for f in readable if not any(f != other and f.startswith(other + "/") for other in readable)]
    job = {**asdict(limits), "uid": unused_user_id(), "readable": readable, "command": command, "script": source}
    encoded = json.dumps(job).encode()
    return _outcome(len(encoded).to_bytes(8, "big") + encoded + stdin, limits)


@functools.cache
def obstacle() -> str:
    """Why this machine cannot isolate a program; "" where it can. Asked by running one, once."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux namespaces, and this is {sys.platform}"
    try:
        found = run_python("print(6 * 7)")
    except NoIsolation as error:
        return str(error)
    return "" if found.stdout == b"42\n" else f"a test program ended with {found.exit_code}: {found.stderr[-300:].decode(errors='replace')}"


def unused_user_id() -> int:
    """A user id without a name, drawn anew for every program, so that limits on processes are its own."""
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return next(number for number in iter(lambda: 200_000 + secrets.randbelow(1 << 30), None) if number not in taken)


def _outcome(sent: bytes, limits: Limits) -> Outcome:
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin"},
        cwd="/",
        bufsize=0,
        start_new_session=True,
    )
    try:
        status, stdout, stderr = _talk(child, sent, limits)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # its end takes process 1 of the namespace along, and that one all others
        for pipe in (child.stdin, child.stdout, child.stderr):
            pipe.close()
        code = child.wait(timeout=_GRACE_SECONDS)
    if code == _SETUP_FAILED and stderr.startswith(b"sandbox: "):
        raise NoIsolation(f"programs cannot be isolated here ({stderr.decode(errors='replace').strip()}): run as root, or allow user namespaces")
    return Outcome(status=status, exit_code=code if code >= 0 else 128 - code, stdout=stdout, stderr=stderr)


def _talk(child: subprocess.Popen[bytes], sent: bytes, limits: Limits) -> tuple[Literal["ended", "time", "output"], bytes, bytes]:
    """Feeds and reads all three pipes at once until both outputs close, the time is over, or too much was said."""
    ends, said = time.monotonic() + limits.seconds, {child.stdout: bytearray(), child.stderr: bytearray()}
    os.set_blocking(child.stdin.fileno(), False)
    left = memoryview(sent)
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdin, selectors.EVENT_WRITE)
        for pipe in said:
            selector.register(pipe, selectors.EVENT_READ)
        status: Literal["ended", "time", "output"] = "ended"
        while selector.get_map() and status == "ended":
            ready = selector.select(max(0.0, ends - time.monotonic()))
            if not ready:
                status = "time"
            for key, _ in ready:
                if key.fileobj is child.stdin:
                    left = _write(child.stdin, left)
                    if not left:
                        selector.unregister(child.stdin)
                        child.stdin.close()
                    continue
                piece = os.read(key.fd, 65536)
                if not piece:
                    selector.unregister(key.fileobj)
                said[key.fileobj] += piece
            if sum(map(len, said.values())) > limits.output_bytes:
                status = "output"
    if status == "ended":
        try:
            child.wait(timeout=max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = "time"
    return status, bytes(said[child.stdout]), bytes(said[child.stderr])


def _write(pipe, left: memoryview) -> memoryview:
    try:
        return left[os.write(pipe.fileno(), left[:65536]) :]
    except BlockingIOError:
        return left
    except BrokenPipeError:  # the program does not want the rest of its input
        return left[:0]
