"""Child process of opd.verify.math_servers: forks the processes that grade, one JSON request a line in, one reply a line out.

Started by path, so that it imports math-verify and nothing of opd. Answers reach math-verify as
LaTeX only, because its other extractor hands text to a Python parser.
"""

import functools
import json
import logging
import os
import resource
import signal
import socket
import struct
import sys
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

MEMORY_BYTES = 2 << 30
NUMBER = struct.Struct("!q")


def main() -> None:
    """Fork a server for every message on the socket whose number was given, until the other end is closed.

    A message is the process id of a server that has been killed, or 0; the answer is the new server's id and its socket. The import and the
    first parse, which take a second, are done once, before the forks: a server is there within milliseconds.
    """
    control = socket.socket(fileno=int(sys.argv[1]))
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    grade("1/2", "0.5")  # the first parse builds grammars: not on a request's clock
    while len(message := control.recv(NUMBER.size, socket.MSG_WAITALL)) == NUMBER.size:
        if old := NUMBER.unpack(message)[0]:
            os.waitpid(old, 0)
        ours, theirs = socket.socketpair()
        server = os.fork()
        if server == 0:
            control.close()
            theirs.close()
            serve(ours)
            os._exit(0)
        ours.close()
        socket.send_fds(control, [NUMBER.pack(server)], [theirs.fileno()])
        theirs.close()


def serve(link: socket.socket) -> None:
    """Answer requests {"gold", "answer", "deadline_seconds"}, a line each, with {"correct"} or {"error"}, until the other end is closed."""
    for line in link.makefile("r", encoding="utf-8"):
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, 2.0 * request["deadline_seconds"])  # ends this process should its parent be gone
        try:
            reply = grade(request["gold"], request["answer"])
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        link.sendall(json.dumps(reply).encode() + b"\n")


def grade(gold: str, answer: str) -> dict[str, Any]:
    """Compare an answer with the gold one; an answer that nothing can be read from is wrong, a gold one like that is an error."""
    expected = _read(gold)
    if all(isinstance(item, str) for item in expected):
        return {"error": f"no mathematical expression in the gold answer {gold!r}"}
    given = _read(answer)
    return {"correct": bool(given) and verify(list(expected), list(given), timeout_seconds=None, raise_on_error=True)}


@functools.lru_cache(maxsize=1024)
def _read(text: str) -> tuple[Any, ...]:
    return tuple(parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=True))


if __name__ == "__main__":
    main()
