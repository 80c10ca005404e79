r"""Mathematical answers (`#### 42`, `\boxed{\frac12}`, "it is 1,000"): plain numbers here, all else by math-verify in a child process.

The child can be killed: math-verify's own timeouts are signals, which work in the main thread only and cannot interrupt C code.
"""

import functools
import importlib.util
import json
import os
import threading
from pathlib import Path
from typing import Any

from opd.config.choices import Positive
from opd.types import Prompt, Verdict
from opd.verify.answers import MAX_ANSWER_CHARACTERS, last_number, marked_answer, read_number
from opd.verify.math_servers import Gone, Servers

_WORKER = Path(__file__).with_name("math_worker.py")


class MathVerifier:
    """Owns the child processes, which start at the first answer that needs them; see opd.verify.math_servers.

    deadline_seconds: longest time for one answer; then its server is given up and the verdict is an error, never a zero. marked: only an
    answer after `####` or in a box counts; else the last number of a text that marks none does. Answers above 1,000 characters are wrong.
    """

    def __init__(self, *, deadline_seconds: float = 5.0, marked: bool = False) -> None:
        assert deadline_seconds > 0
        self.deadline_seconds, self.marked = deadline_seconds, marked
        self._lock = threading.Lock()
        self._servers: Servers | None = None

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
        """End the child processes; the next answer that needs one starts others."""
        with self._lock:
            self._close()

    def _ask(self, gold: str, answer: str) -> dict[str, Any]:
        request = json.dumps({"gold": gold, "answer": answer, "deadline_seconds": self.deadline_seconds}).encode()
        with self._lock:
            try:
                line, lives = self._running().ask(request, self.deadline_seconds)
            except Gone:
                self._close()
                return {"error": "math-verify's process was ended by somebody else"}
        if line:
            return json.loads(line)
        if lives:
            return {"error": f"math-verify gave no verdict within {self.deadline_seconds:g} seconds"}
        return {"error": "math-verify's process died of this answer"}

    def _running(self) -> Servers:
        servers = self._servers
        if servers is None or servers.process.poll() is not None or servers.owner != os.getpid():
            if importlib.util.find_spec("math_verify") is None:
                raise ValueError("answers that are not plain numbers need math-verify: pip install math-verify")
            self._close()
            servers = self._servers = Servers(_WORKER)
        return servers

    def _close(self) -> None:
        if self._servers is not None:
            self._servers.close()


def math_verdict(prompt: Prompt, text: str, *, deadline_seconds: Positive = 5.0, marked: bool = False) -> Verdict:
    """Right when math-verify finds the answer equal to the gold one: numbers, fractions, expressions, sets; `####` and \\boxed are read first.

    An equation counts by its right side ("x=4", "2+2=4"), unless it equates different numbers ("3=4"). One child process of MathVerifier serves
    all callers of this process. marked: only an answer behind a mark counts.
    """
    return _shared(deadline_seconds, marked)(prompt, text)


def math_reads(text: str) -> str:
    """All that the verdict on a text depends on: its marked answer, or the last number of one that marks none."""
    marked = marked_answer(text)
    return f"marked {marked}" if marked is not None else f"last {last_number(text)}"


@functools.lru_cache(maxsize=8)
def _shared(deadline_seconds: float, marked: bool) -> MathVerifier:
    return MathVerifier(deadline_seconds=deadline_seconds, marked=marked)
