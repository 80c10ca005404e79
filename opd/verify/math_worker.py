"""Child process of opd.verify.math: one JSON request a line in, one reply a line out, until its parent closes the pipe or kills it.

Started by path, so that it imports math-verify and nothing of opd. Answers reach math-verify as
LaTeX only, because its other extractor hands text to a Python parser.
"""

import functools
import json
import logging
import os
import resource
import signal
import sys
from typing import Any, TextIO

from math_verify import LatexExtractionConfig, parse, verify

MEMORY_BYTES = 2 << 30


def main() -> None:
    """Fork a server of requests, and another each time one is killed or dies; end when one ends by itself, at the end of the input.

    The import and the first parse, which take a second, are done once, before the forks: a server is back within milliseconds.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # parsers that print must not break the protocol
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    grade("1/2", "0.5")  # the first parse builds grammars: not on a request's clock
    while True:
        server = os.fork()
        if server == 0:
            serve(replies)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]) == 0:
            return


def serve(replies: TextIO) -> None:
    """Say {"ready": own process id}, then answer requests {"gold", "answer", "deadline_seconds"} with {"correct"} or {"error"}."""
    print(json.dumps({"ready": os.getpid()}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, 2.0 * request["deadline_seconds"])  # ends this process should its parent be gone
        try:
            reply = grade(request["gold"], request["answer"])
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(json.dumps(reply), file=replies, flush=True)


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
