"""Child process of opd.verify.math_servers: forks the processes that grade, one JSON request a line in, one reply a line out.

Started by path, so that it imports math-verify and nothing of opd. Answers reach math-verify as
LaTeX only, because its other extractor hands text to a Python parser.
"""

import functools
import json
import logging
import os
import re
import resource
import signal
import socket
import struct
import sys
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Equality, Float

MEMORY_BYTES = 2 << 30
ROUNDING = 0.01  # "1/3=0.333": how far a decimal may be from what it stands for
_ARITHMETIC = re.compile(r"(?:[\d\s.+\-*/^=(){}\[\]]|\\[dt]?frac|\\(?:sqrt|cdot|times|div|left|right)(?![A-Za-z]))+")
_TWO_NUMBERS = re.compile(r"[\d.]\s+[\d.\\]|\d\\[dt]?frac")  # side by side: "10 000" and mixed fractions may be read as products
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
    """Compare an answer with the gold one; an answer that nothing can be read from is wrong, a gold one like that is an error.

    Of an equation math-verify reads the right side: "x=4" and "2+2=4" are 4, and so would "3=4" be.
    """
    expected = _read(gold)
    if all(isinstance(item, str) for item in expected):
        return {"error": f"no mathematical expression in the gold answer {gold!r}"}
    given = _read(answer)
    correct = bool(given) and verify(list(expected), list(given), timeout_seconds=None, raise_on_error=True)
    return {"correct": correct and ("=" in gold or not is_false_equation(answer))}


def is_false_equation(answer: str) -> bool:
    """Whether an answer in plain arithmetic equates different numbers. Units and bases ("1 km=1000 m", "3=11_2") are no plain arithmetic."""
    if "=" not in answer or not _ARITHMETIC.fullmatch(answer) or _TWO_NUMBERS.search(answer):
        return False
    equations = [equation for read in _read(answer)[:1] if isinstance(read, Basic) for equation in read.atoms(Equality)]
    return not all(_equal(*equation.args) for equation in equations)


def _equal(left: Basic, right: Basic) -> bool:
    if verify([left], [right], timeout_seconds=None, raise_on_error=True):
        return True
    return bool(left.has(Float) or right.has(Float)) and abs(left.evalf() - right.evalf()) <= ROUNDING * abs(right.evalf())


@functools.lru_cache(maxsize=1024)
def _read(text: str) -> tuple[Any, ...]:
    return tuple(parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=True))


if __name__ == "__main__":
    main()
