"""Processes that grade with math-verify, one at work and a spare: whoever is killed has a successor that is already there.

One process imports math-verify and forks servers on request (opd/verify/math_worker.py). A caller that gives up on an answer waits neither for
the end of the server, which takes long where much memory is held, nor for the next fork.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from pathlib import Path

START_SECONDS, RESTART_SECONDS = 60.0, 10.0
NUMBER = struct.Struct("!q")


class Gone(Exception):
    """The process that forks servers has died, or does not answer."""


class Servers:
    """Owns the process and its servers, which end with `close`, with this object, and with this process."""

    def __init__(self, worker: Path) -> None:
        """Returns when the first server waits. Raises RuntimeError where it does not start."""
        self.owner = os.getpid()
        self._control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(worker), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C in a terminal is for the run, not for its child
            )
        self._ready: list[tuple[int, socket.socket]] = []
        self._coming = 0
        self.close = weakref.finalize(self, _end, self.process, self._control, self._ready, os.getpid())
        try:
            self._replace(0)
            self._replace(0)
            self._receive(START_SECONDS)
        except Gone:
            self.close()
            raise RuntimeError(
                f"the math-verify process did not start within {START_SECONDS:g} seconds; try: {sys.executable} -c 'import math_verify'"
            ) from None

    @property
    def first(self) -> int:
        """Process id of the server that works next, 0 where none is ready."""
        return self._ready[0][0] if self._ready else 0

    def ask(self, request: bytes, seconds: float) -> tuple[bytes, bool]:
        """(one line of reply, whether the server still lives): no line after `seconds`, or where the server died. Raises Gone."""
        if not self._ready or (self._coming and _readable(self._control, 0.0)):
            self._receive(RESTART_SECONDS)
        pid, link = self._ready[0]
        ends, received, lives = time.monotonic() + seconds, b"", True
        try:
            link.sendall(request + b"\n")
            while not received.endswith(b"\n") and lives and (left := ends - time.monotonic()) > 0 and _readable(link, left):
                chunk = link.recv(65536)
                received, lives = received + chunk, chunk != b""
        except (BrokenPipeError, ConnectionResetError):
            lives = False
        if received.endswith(b"\n"):
            return received, True
        self._ready.pop(0)
        link.close()
        self._replace(pid)
        return b"", lives

    def _replace(self, pid: int) -> None:
        """Kill the server, if there is one (0), and have another forked. Its parent has not waited for it, so the id is still its own."""
        if self.process.poll() is not None:
            raise Gone
        if pid:
            os.kill(pid, signal.SIGKILL)
        try:
            self._control.sendall(NUMBER.pack(pid))
        except OSError as error:
            raise Gone from error
        self._coming += 1

    def _receive(self, seconds: float) -> None:
        """Take what has been forked since; waits for one where none is ready."""
        while self._coming and _readable(self._control, 0.0 if self._ready else seconds):
            message, links, _, _ = socket.recv_fds(self._control, NUMBER.size, 1)
            if len(message) < NUMBER.size:
                raise Gone
            self._ready.append((NUMBER.unpack(message)[0], socket.socket(fileno=links[0])))
            self._coming -= 1
        if not self._ready:
            raise Gone


def _readable(link: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(link, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _end(process: subprocess.Popen[bytes], control: socket.socket, ready: list[tuple[int, socket.socket]], owner: int) -> None:
    for link in (control, *(link for _, link in ready)):
        link.close()
    if owner == os.getpid():  # a forked copy of the parent must leave the process to it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the servers that it forked
        process.wait(timeout=10)
