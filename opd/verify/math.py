r"""Mathematical answers (`#### 42`, `\boxed{\frac12}`, "it is 1,000"): plain numbers here, all else by math-verify in a child process.

The child can be killed: math-verify's own timeouts are signals, which work in the main thread only and cannot interrupt C code.
"""

import contextlib
import functools
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from opd.config.choices import Positive
from opd.types import Prompt, Verdict
from opd.verify.answers import MAX_ANSWER_CHARACTERS, last_number, marked_answer, read_number

_WORKER = Path(__file__).with_name("math_worker.py")
START_SECONDS, RESTART_SECONDS = 60.0, 10.0


class MathVerifier:
    """Owns the child process, which starts at the first answer that needs it; its server of requests is forked anew after each kill.

    deadline_seconds: longest time for one answer; beyond it the verdict is an error, never a zero. marked: only an answer after `####` or
    in a box counts; else the last number of a text that marks none does. Answers above 1,000 characters are wrong.
    """

    def __init__(self, *, deadline_seconds: float = 5.0, marked: bool = False) -> None:
        assert deadline_seconds > 0
        self.deadline_seconds, self.marked = deadline_seconds, marked
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = self._server = 0
        self._close = lambda: None

    def __call__(self, prompt: Prompt, text: str) -> Verdict:
        """Grade a completion; status "abstain" without a gold answer, "error" after a failure or a missed deadline."""
        if prompt.answer is None:
            return Verdict(status="abstain", feedback="no gold answer")
        gold = marked_answer(prompt.answer) or prompt.answer.strip()
        answer = marked_answer(text)
        parts = {"marked": float(answer is not None)}
        if answer is None and not self.marked:
            answer = last_number(text)
        if not answer or len(answer) > MAX_ANSWER_CHARACTERS:
            return Verdict(feedback="No final answer was found.", parts={**parts, "answer": 0.0})
        expected, given = read_number(gold), read_number(answer)
        if expected is not None and given is not None:
            correct = expected == given
        else:
            reply = self._ask(gold, answer)
            if "error" in reply:
                return Verdict(status="error", feedback=reply["error"])
            correct = reply["correct"]
        feedback = "" if correct else f"The final answer {answer} is wrong."
        return Verdict(reward=float(correct), correct=correct, feedback=feedback, parts={**parts, "answer": float(correct)})

    def close(self) -> None:
        """End the child process; the next answer that needs one starts another."""
        with self._lock:
            self._close()

    def _ask(self, gold: str, answer: str) -> dict[str, Any]:
        request = json.dumps({"gold": gold, "answer": answer, "deadline_seconds": self.deadline_seconds})
        with self._lock:
            child = self._child
            if child is None or child.poll() is not None or self._owner != os.getpid():
                child = self._start()
            try:
                assert child.stdin is not None
                child.stdin.write(request.encode() + b"\n")
                child.stdin.flush()
                reply = json.loads(_read_line(child, self.deadline_seconds) or b"{}")
            except BrokenPipeError:
                reply = {}
            if "ready" in reply:  # the server died of this answer, by itself, and the next one is there
                self._server = reply["ready"]
                return {"error": "math-verify's process died of this answer"}
            if not reply:
                self._replace_server(child)
                return {"error": f"math-verify gave no verdict within {self.deadline_seconds:g} seconds"}
            return reply

    def _replace_server(self, child: subprocess.Popen[bytes]) -> None:
        """Kill what works on the answer; its parent, which holds everything that takes long to load, forks the next."""
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._server, signal.SIGKILL)
        reply = json.loads(_read_line(child, RESTART_SECONDS) or b"{}")
        if "ready" in reply:
            self._server = reply["ready"]
        elif not ("correct" in reply or "error" in reply) or not self._next_ready(child):  # a verdict that came just too late is not read
            self._close()

    def _next_ready(self, child: subprocess.Popen[bytes]) -> bool:
        reply = json.loads(_read_line(child, RESTART_SECONDS) or b"{}")
        self._server = reply.get("ready", 0)
        return "ready" in reply

    def _start(self) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("answers that are not plain numbers need math-verify: pip install math-verify")
        self._close()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in a terminal is for the run, not for its child
        )
        self._child, self._owner = child, os.getpid()
        self._close = weakref.finalize(self, _end, child, os.getpid())
        ready = json.loads(_read_line(child, START_SECONDS) or b"{}")
        if "ready" not in ready:
            self._close()
            raise RuntimeError(
                f"the math-verify process did not start within {START_SECONDS:g} seconds; try: {sys.executable} -P {_WORKER}"
            )
        self._server = ready["ready"]
        return child


def math_verdict(prompt: Prompt, text: str, *, deadline_seconds: Positive = 5.0, marked: bool = False) -> Verdict:
    """Right when math-verify finds the answer equal to the gold one: numbers, fractions, expressions, sets; `####` and \\boxed are read first.

    One child process of MathVerifier serves all callers of this process. marked: only an answer behind a mark counts.
    """
    return _shared(deadline_seconds, marked)(prompt, text)


def math_reads(text: str) -> str:
    """All that the verdict on a text depends on: its marked answer, or the last number of one that marks none."""
    marked = marked_answer(text)
    return f"marked {marked}" if marked is not None else f"last {last_number(text)}"


@functools.lru_cache(maxsize=8)
def _shared(deadline_seconds: float, marked: bool) -> MathVerifier:
    return MathVerifier(deadline_seconds=deadline_seconds, marked=marked)


def _read_line(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The last line of the child's output so far; empty when it died or the deadline passed."""
    assert child.stdout is not None
    ends, received = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while (left := ends - time.monotonic()) > 0 and selector.select(left):
            chunk = os.read(child.stdout.fileno(), 65536)
            received += chunk
            if received.endswith(b"\n"):
                return received.splitlines()[-1]
            if not chunk:
                break
    return b""


def _end(child: subprocess.Popen[bytes], owner: int) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    if owner == os.getpid():  # a forked copy of the parent must leave the process to it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with the server that it forked
        child.wait(timeout=10)
