"""A deadline for functions of one's own. They run in this process, where they see what they always saw; a small child process watches.

Whoever watches must be outside: while C code holds the interpreter's lock (re on a bad pattern does), no thread of ours runs. In the main
thread a call is interrupted by a signal, which ends loops, sleeps and waits; in another one, where no signal arrives, it has a thread of its
own, which is given up. What neither ends is ended with the whole process.
"""

import itertools
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from opd.errors import VerifierStuck

SECONDS = 300.0
GRACE_SECONDS = 10.0  # from the signal to the end of the process
WRITE_SECONDS, END_SECONDS = 10.0, 5.0
LONGEST_MESSAGE = 800  # characters: a line of less than PIPE_BUF bytes is written whole, whichever thread writes it
_WATCH = Path(__file__).with_name("deadline_watch.py")
_numbers = itertools.count()


def in_time(call: Callable[[], Any], seconds: float, message: str) -> Any:
    """What the call returns or raises. Raises VerifierStuck with the message where it takes longer than `seconds`, whatever it returns then."""
    number, ends = next(_numbers), time.monotonic() + seconds  # taken first: the child's signal must not come before it
    _tell(f"{number}\t{seconds}\t{message[:LONGEST_MESSAGE]}\n".encode(errors="backslashreplace"))
    try:
        if threading.current_thread() is threading.main_thread():
            return _interruptible(call, ends, message)
        return _beside(call, ends, message)
    finally:
        _tell(b"%d\n" % number)


class _Interrupted(KeyboardInterrupt):
    """Not an Exception, so that a function which swallows those does not swallow it."""


def _interruptible(call: Callable[[], Any], ends: float, message: str) -> Any:
    running, late = True, False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal late
        if running and time.monotonic() >= ends:  # else it was sent for another call
            late = True
            raise _Interrupted
        if callable(before):
            before(number, frame)

    before = signal.signal(signal.SIGURG, interrupt)
    try:
        try:
            result = call()
        finally:
            running = False
    except BaseException:
        if late:
            raise VerifierStuck(message) from None
        raise
    finally:
        signal.signal(signal.SIGURG, signal.SIG_DFL if before is None else before)
    if late:  # the function has caught what was to end it
        raise VerifierStuck(message)
    return result


class _Aside:
    """Owns a thread in which the calls of another one are made; the end of the process does not wait for it."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue] | None] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self._calls,), daemon=True, name="verifier").start()

    def run(self, call: Callable[[], Any], ends: float) -> Any:
        """What the call returns or raises. Raises queue.Empty where it has done neither in time: the thread is then given up."""
        outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._calls.put((call, outcome))
        try:
            result, error = outcome.get(timeout=max(0.0, ends - time.monotonic()))
        except queue.Empty:
            self._leave()
            raise
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame: the thread would stay until the next garbage collection
        return result

    def _leave(self) -> None:
        self._calls.put(None)  # the thread ends, when it comes back

    __del__ = _leave


def _serve(calls: queue.SimpleQueue) -> None:
    while work := calls.get():
        call, outcome = work
        try:
            outcome.put((call(), None))
        except BaseException as error:  # raised where the call was asked for
            outcome.put((None, error))


_of_this_thread = threading.local()


def _beside(call: Callable[[], Any], ends: float, message: str) -> Any:
    """The call, in one and the same other thread for all calls of this one."""
    if not hasattr(_of_this_thread, "aside"):
        _of_this_thread.aside = _Aside()
    try:
        return _of_this_thread.aside.run(call, ends)
    except queue.Empty:
        del _of_this_thread.aside
        raise VerifierStuck(message) from None


class _Watch:
    """Owns the child process, which ends with this one."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        words = [sys.executable, "-I", "-S", str(_WATCH), str(self.owner), str(GRACE_SECONDS)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd="/")
        assert process.stdin is not None
        self._pipe = process.stdin.fileno()
        os.set_blocking(self._pipe, False)
        self.close = weakref.finalize(self, _end, process, self.owner)

    def tell(self, line: bytes) -> None:
        """Raises OSError where the child is gone, or does not read."""
        try:
            os.write(self._pipe, line)
        except BlockingIOError:
            select.select([], [self._pipe], [], WRITE_SECONDS)
            os.write(self._pipe, line)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    assert process.stdin is not None
    process.stdin.close()
    if owner == os.getpid():  # of a forked copy it is no child
        try:
            process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=END_SECONDS)


_watch: _Watch | None = None
_telling = threading.Lock()


def _tell(line: bytes) -> None:
    """Tell the child, started where there is none that hears: somebody may have ended it."""
    global _watch
    with _telling:
        if _watch is not None and _watch.owner == os.getpid():
            try:
                return _watch.tell(line)
            except OSError:
                _watch.close()
        _watch = _Watch()
        _watch.tell(line)
