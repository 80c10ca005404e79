"""Verifiers: text in, Verdict out. A verifier that fails gives status "error", which leaves baselines and denominators, never a zero
reward."""

import inspect
from collections.abc import Callable
from functools import wraps
from math import isfinite
from numbers import Real
from typing import Any

from opd.config.choices import nearest, resolve, split_choice
from opd.tasks import TASKS
from opd.types import Prompt, Verdict, Verifier
from opd.verify.answers import final_answer
from opd.verify.code import code_verdict, gold_tests_problem, require_isolation
from opd.verify.math import MathVerifier, math_verdict
from opd.verify.simple import choice_verdict, chosen_letter, exact_verdict, json_verdict, regex_verdict

__all__ = ["VERIFIERS", "MathVerifier", "as_verifier", "final_answer", "gold_problem", "judge", "make_verifier", "read_answer"]


def make_verifier(choice: Any) -> Verifier:
    """The verifier that a recipe names: a name, {name: {parameter: value}} or {fn: module:function}. Raises ValueError with the fix."""
    verifier, name = resolve(choice, VERIFIERS, "data.verifier"), split_choice(choice, "data.verifier")[0]
    if name in REQUIRES:
        REQUIRES[name]()
    return as_verifier(verifier) if name == "fn" else verifier


def read_answer(choice: Any) -> Callable[[Prompt, str], str]:
    """What a vote counts under this verifier: the letter of a choice, nothing for programs, else the final answer."""
    name, parameters = split_choice(choice, "verifier")
    if name == "choice":
        return lambda prompt, text: chosen_letter(text, **parameters)
    return (lambda prompt, text: "") if name == "code" else final_answer


def as_verifier(function: Callable[..., Any], *, correct_at: float = 1.0) -> Verifier:
    """Adapt fn(prompt, text) -> Verdict, bool, number (correct from `correct_at` on) or None (abstain).

    Raises ValueError when the function cannot be called with two arguments; the verifier raises ValueError for any other result.
    """
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise ValueError(f"verifier {getattr(function, '__name__', function)!r} must accept (prompt, text): {error}") from None

    @wraps(function, updated=())
    def verify(prompt: Prompt, text: str) -> Verdict:
        result = function(prompt, text)
        if isinstance(result, Verdict):
            return result
        if result is None:
            return Verdict(status="abstain")
        if hasattr(result, "item"):  # numpy and torch scalars
            result = result.item()
        if isinstance(result, bool):
            return Verdict(reward=float(result), correct=bool(result))
        if isinstance(result, Real) and isfinite(result):
            return Verdict(reward=float(result), correct=float(result) >= correct_at)
        raise ValueError(f"verifier returned {result!r}; return a Verdict, a bool, a finite number or None")

    return verify


def judge(verify: Verifier, prompt: Prompt, text: str) -> Verdict:
    """The verdict, or status "error" with the exception's text as feedback when the verifier raises."""
    try:
        verdict = verify(prompt, text)
    except Exception as error:  # kept and counted by the caller: a verifier is foreign code
        return Verdict(status="error", feedback=f"{type(error).__name__}: {error}")
    if verdict.status == "score" and not isfinite(verdict.reward):
        return Verdict(status="error", feedback=f"reward {verdict.reward} is not finite")
    return verdict


def gold_problem(verify: Verifier, prompt: Prompt) -> str:
    """Why a verifier does not accept the gold answer itself; "" when it does. For verifiers that judge a bare answer, and for tests."""
    if not prompt.answer:
        return "there is no gold answer"
    if getattr(verify, "func", verify) is code_verdict:
        return gold_tests_problem(prompt)
    verdict = judge(verify, prompt, f"#### {prompt.answer}")
    if verdict.correct and verdict.status == "score":
        return ""
    return f"the gold answer {prompt.answer[:80]!r} cannot be graded: {verdict.feedback or 'the verifier refuses it'}"


def task_verdict(prompt: Prompt, text: str) -> Verdict:
    """The embedded task's own verifier, found by the prompt's domain "task/difficulty". Raises ValueError for a prompt of no task."""
    name = prompt.domain.partition("/")[0]
    if name not in TASKS:
        raise ValueError(
            f"prompt {prompt.id!r} of domain {prompt.domain!r} belongs to no embedded task{nearest(name, TASKS)}; set data.verifier"
        )
    return TASKS[name].verify(prompt, text)


VERIFIERS: dict[str, Callable[..., Verdict]] = {
    "task": task_verdict,
    "exact": exact_verdict,
    "choice": choice_verdict,
    "math": math_verdict,
    "gsm8k": math_verdict,
    "json": json_verdict,
    "regex": regex_verdict,
    "code": code_verdict,
}

REQUIRES: dict[str, Callable[[], None]] = {"code": require_isolation}
"""What must hold on this machine before a verifier may serve; raises ValueError."""
