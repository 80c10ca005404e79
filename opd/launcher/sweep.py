"""Ends what a run has started, however deep, when its launcher is gone: `python sweep.py MARK [FOLDER]`, standard library only.

Every process of a run inherits the environment variable OPD_RUN_MARK, so that children of children (verifiers, loggers, Ray) are found
too. It reads its standard input, which ends when the launcher dies, even by SIGKILL. FOLDER is removed afterwards.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "OPD_RUN_MARK"
QUIET_SECONDS = 0.3  # nothing found for so long: nobody is left, also none that was just being forked
GIVE_UP_SECONDS = 30.0


def marked(mark: str, folder: Path | None = None, spared: int = 0) -> list[int]:
    """Processes that carry the mark or have a file below `folder` open, and all below them, but for this one and `spared`.

    Linux only; elsewhere none is found.

    A process that changes its title, as Ray's agents and vLLM's engine do, may write over its environment, hence the other two ways.
    """
    children, found = dict[int, list[int]](), set[int]()
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z" or pid in (os.getpid(), spared):
                continue
            children.setdefault(int(parent), []).append(pid)
            if _carries((entry / "environ").read_bytes(), mark) or (folder is not None and _has_open(entry, folder)):
                found.add(pid)
        except OSError:
            continue  # gone, or somebody else's
    below = list(found)
    while below:
        new = [pid for pid in children.get(below.pop(), ()) if pid not in found]
        found.update(new)
        below += new
    return list(found)


def _carries(environ: bytes, mark: str) -> bool:
    """A process started inside of several runs carries the marks of all."""
    values = [entry.partition(b"=")[2] for entry in environ.split(b"\0") if entry.startswith(f"{MARK}=".encode())]
    return any(mark.encode() in value.split(b":") for value in values)


def _has_open(entry: Path, folder: Path) -> bool:
    for link in (entry / "fd").iterdir():
        with suppress(OSError):  # closed in the meantime
            if os.readlink(link).startswith(f"{folder}/"):
                return True
    return False


def state_of(entry: Path) -> str:
    """The kernel's letter for a process: R, S, T (stopped), Z (ended) ...; "" where there is none."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def sweep(mark: str, folder: Path | None = None, spared: int = 0) -> None:
    """SIGKILL to every process that `marked` finds, until none is left."""
    started = quiet_since = time.monotonic()
    while time.monotonic() - started < GIVE_UP_SECONDS and time.monotonic() - quiet_since < QUIET_SECONDS:
        for pid in marked(mark, folder, spared):
            quiet_since = time.monotonic()
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.05)


@contextmanager
def marked_processes(folder: Path | None = None) -> Iterator[str]:
    """All processes started inside carry a mark, and neither they nor `folder` outlive the block or this process, however it ends."""
    mark, outer = secrets.token_hex(8), os.environ.get(MARK)
    unmarked = {name: value for name, value in os.environ.items() if name != MARK}
    words = [sys.executable, "-P", "-S", __file__, mark] + ([] if folder is None else [str(folder)])
    guard = subprocess.Popen(words, stdin=subprocess.PIPE, env=unmarked, start_new_session=True)
    os.environ[MARK] = mark if outer is None else f"{outer}:{mark}"
    try:
        yield mark
    finally:
        os.environ.pop(MARK, None)
        if outer is not None:
            os.environ[MARK] = outer
        sweep(mark, folder)
        assert guard.stdin is not None
        guard.stdin.close()
        try:
            guard.wait(timeout=2 * GIVE_UP_SECONDS)
        except subprocess.TimeoutExpired:  # what it would remove is removed above
            guard.kill()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    launcher = os.getppid()  # it may have a file of its cluster open while it ends by itself
    sys.stdin.buffer.read()
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    sweep(sys.argv[1], folder, spared=launcher)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
