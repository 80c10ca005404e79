"""Watches the process that started it: `python deadline_watch.py PID GRACE`, standard library only; see opd/verify/deadline.py.

Standard input: lines "number, seconds, message" (tabs between them) when a call begins, "number" when it has ended. A call that lasts longer
is interrupted by SIGURG; where it has not ended GRACE seconds later, the process is killed.
"""

import os
import select
import signal
import sys
import time

PARENT_SECONDS = 5.0  # a copy that the process forked may hold the pipe open after its end


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    process, grace, rest = int(sys.argv[1]), float(sys.argv[2]), b""
    calls: dict[bytes, tuple[float, bool, bytes]] = {}  # (when to act, whether the signal was sent, message)
    while os.getppid() == process:
        due = min((when for when, _, _ in calls.values()), default=float("inf"))
        if select.select([0], [], [], min(PARENT_SECONDS, max(0.0, due - time.monotonic())))[0]:
            received = os.read(0, 65536)
            if not received:
                return
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                take(line, calls)
        for number, (when, signalled, message) in list(calls.items()):
            if when <= time.monotonic():
                act(process, signalled, message)
                calls[number] = (time.monotonic() + grace, True, message)


def take(line: bytes, calls: dict[bytes, tuple[float, bool, bytes]]) -> None:
    number, *begun = line.split(b"\t", 2)
    if begun:
        calls[number] = (time.monotonic() + float(begun[0]), False, begun[1])
    else:
        calls.pop(number, None)


def act(process: int, signalled: bool, message: bytes) -> None:
    if os.getppid() != process:
        return
    if signalled:
        os.write(2, b"opd: %s; nothing could interrupt it, so its process was ended. What was saved stays\n" % message)
    os.kill(process, signal.SIGKILL if signalled else signal.SIGURG)


if __name__ == "__main__":
    main()
