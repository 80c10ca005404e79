"""Ends what a run has started, however deep, when its launcher is gone: `python sweep.py MARK`, standard library only.

Every process of a run inherits the environment variable OPD_RUN_MARK, so that children of children (verifiers, loggers, Ray) are found
too. It reads its standard input, which ends when the launcher dies, even by SIGKILL.
"""

import os
import signal
import sys
import time
from pathlib import Path

MARK = "OPD_RUN_MARK"
QUIET_SECONDS = 0.3  # nothing found for so long: nobody is left, also none that was just being forked
GIVE_UP_SECONDS = 30.0


def marked(mark: str) -> list[int]:
    """Processes that carry the mark, but for this one (Linux; elsewhere none is found)."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0") and not is_zombie(entry):
                found.append(int(entry.name))
        except OSError:
            continue  # gone, or somebody else's
    return [pid for pid in found if pid != os.getpid()]


def is_zombie(entry: Path) -> bool:
    return state_of(entry) == "Z"


def state_of(entry: Path) -> str:
    """The kernel's letter for a process: R, S, T (stopped), Z (ended) ...; "" where there is none."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def sweep(mark: str) -> None:
    """SIGKILL to every marked process until none is left."""
    started = quiet_since = time.monotonic()
    while time.monotonic() - started < GIVE_UP_SECONDS and time.monotonic() - quiet_since < QUIET_SECONDS:
        for pid in marked(mark):
            quiet_since = time.monotonic()
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.05)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    sweep(sys.argv[1])


if __name__ == "__main__":
    main()
