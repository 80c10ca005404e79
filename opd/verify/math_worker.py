"""Child process of opd.verify.math: one JSON request a line in, one reply a line out, until its parent closes the pipe or kills it.

Started by path, so that it imports math-verify and nothing of opd: a restart after a kill costs no torch. Answers reach math-verify as
LaTeX only, because its other extractor hands text to a Python parser.
"""

import functools
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

MEMORY_BYTES = 2 << 30


def main() -> None:
    """Serve requests {"gold", "answer", "deadline_seconds"} with {"correct"} or {"error"}."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # parsers that print must not break the protocol
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    grade("1/2", "0.5")  # the first parse builds grammars: not on a request's clock
    print(json.dumps({"ready": True}), file=replies, flush=True)
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
