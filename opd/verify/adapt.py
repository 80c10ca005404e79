"""Functions of others as verifiers, and verdicts for many answers at once.

A verifier is called with (prompt, text). One that has an attribute `many` judges a list of such pairs in one call: a model's batch, a cache.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from math import isfinite
from numbers import Real
from typing import Any

from opd.errors import VerifierStuck
from opd.types import Prompt, Verdict, Verifier
from opd.verify.deadline import SECONDS, in_time

Asked = Sequence[tuple[Prompt, str]]
STATUSES = ("score", "abstain", "error")
EVERY_COLUMN = "**"
BY_NAME = ("prompt", "completion", "answer", "state", "info", "task")


@dataclass(frozen=True, slots=True)
class Batched:
    """A verifier from a function of many (prompt, text) pairs; it returns one verdict a pair, in order."""

    many: Callable[[Asked], Sequence[Verdict]]

    def __call__(self, prompt: Prompt, text: str) -> Verdict:
        return self.many([(prompt, text)])[0]


def judge(verify: Verifier, prompt: Prompt, text: str) -> Verdict:
    """The verdict, or status "error" with the exception's text as feedback when the verifier raises. Raises VerifierStuck."""
    try:
        verdict = verify(prompt, text)
    except VerifierStuck:
        raise
    except Exception as error:  # kept and counted by the caller: a verifier is foreign code
        return Verdict(status="error", feedback=f"{type(error).__name__}: {error}")
    return _finite(verdict)


def judge_all(verify: Verifier, asked: Asked) -> list[Verdict]:
    """`judge` for many answers, in one call where the verifier has one; a failure of that call is an error for all of them."""
    many = getattr(verify, "many", None)
    if many is None:
        return [judge(verify, prompt, text) for prompt, text in asked]
    try:
        verdicts = list(many(asked))
    except VerifierStuck:
        raise
    except Exception as error:
        return [Verdict(status="error", feedback=f"{type(error).__name__}: {error}")] * len(asked)
    assert len(verdicts) == len(asked)
    return [_finite(verdict) for verdict in verdicts]


def checked(verify: Verifier, check: Callable[[], None]) -> Verifier:
    """The verifier, asked only while `check` has nothing against it."""

    def many(asked: Asked) -> list[Verdict]:
        check()
        return list(verify.many(asked))  # type: ignore[attr-defined]

    @wraps(verify, updated=())
    def one(prompt: Prompt, text: str) -> Verdict:
        check()
        return verify(prompt, text)

    if not hasattr(verify, "__qualname__"):  # a partial: the record of a run names the verifier, watched or not
        one.__qualname__ = type(verify).__name__
    return Batched(many) if hasattr(verify, "many") else one


def as_verifier(function: Callable[..., Any], *, correct_at: float = 1.0, seconds: float = SECONDS) -> Verifier:
    """Adapt a function that returns a Verdict, a bool, a number (correct from `correct_at` on) or None (abstain).

    Called as (prompt, text); or by name, as the library `verifiers` calls reward functions, when it has a parameter `completion`: any of
    prompt and completion (lists of messages), answer, state, info, task; or as TRL calls them when it has `completions`: lists of one.
    Coroutines are run to their end. Raises ValueError for a function that none of these calls fits; the verifier raises ValueError for any
    other result, and VerifierStuck for one that has not come after `seconds`.
    """
    call, name = _call_of(function), _name(function)

    @wraps(function, updated=())
    def verify(prompt: Prompt, text: str) -> Verdict:
        stuck = f"verifier {name} gave no verdict on prompt {prompt.id!r} within {seconds:g} s; mend it, or raise data.verifier_seconds"
        return _verdict(in_time(partial(call, prompt, text), seconds, stuck), correct_at)

    return verify


def _name(function: Any) -> str:
    """module:function, as a recipe names it."""
    own = getattr(function, "func", function)
    return f"{own.__module__}:{getattr(own, '__qualname__', type(own).__name__)}"


def _verdict(result: Any, correct_at: float) -> Verdict:
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


def _call_of(function: Callable[..., Any]) -> Callable[[Prompt, str], Any]:
    name, parameters = getattr(function, "__name__", repr(function)), inspect.signature(function).parameters
    if "completion" in parameters:
        wanted = _wanted(parameters, BY_NAME, name)
        return lambda prompt, text: _finished(function(**_columns(prompt, parameters, wanted) | _known(prompt, text, wanted)))
    if "completions" in parameters:
        wanted = _wanted(parameters, ("prompts", "completions", "answer", "info", "task", "completion_ids", "trainer_state"), name)
        return lambda prompt, text: _one_of(_finished(function(**_lists(prompt, text, parameters, wanted))), name)
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"verifier {name!r} must accept (prompt, text), or by name completion with any of {', '.join(BY_NAME)} (as in verifiers), or prompts "
            f"and completions (as in TRL): {error}"
        ) from None
    return lambda prompt, text: _finished(function(prompt, text))


def by_name(prompt: Prompt, text: str) -> dict[str, Any]:
    """What a reward function of the library `verifiers` may ask for, of a conversation of one turn."""
    messages, completion = [dict(message) for message in prompt.messages], [{"role": "assistant", "content": text}]
    info = {"id": prompt.id, **prompt.hints}
    given = {"prompt": messages, "completion": completion, "answer": prompt.answer, "info": info, "task": prompt.domain}
    return {**given, "state": dict(given)}


def _wanted(parameters: Mapping[str, inspect.Parameter], known: Sequence[str], name: str) -> set[str]:
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return {*known, EVERY_COLUMN}
    strange = [key for key, each in parameters.items() if key not in known and each.default is each.empty]
    if strange:
        raise ValueError(f"verifier {name!r} asks for {', '.join(strange)}, which is not there; by name there are {', '.join(known)}")
    return {key for key in parameters if key in known}


def _known(prompt: Prompt, text: str, wanted: set[str]) -> dict[str, Any]:
    return {key: value for key, value in by_name(prompt, text).items() if key in wanted}


def _columns(prompt: Prompt, parameters: Mapping[str, inspect.Parameter], wanted: set[str]) -> dict[str, str]:
    """The record's further columns, for a function with **kwargs. Raises ValueError for one that it must have and the record has not."""
    if EVERY_COLUMN not in wanted:
        return {}
    needed = [key for key, each in parameters.items() if each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    lacking = [key for key in needed if key not in wanted and key not in prompt.hints]
    if lacking:
        have = ", ".join(sorted(prompt.hints)) or "none"
        raise ValueError(f"the verifier asks for {', '.join(lacking)}, which prompt {prompt.id!r} has not; further columns of its record: {have}")
    return {key: value for key, value in prompt.hints.items() if key.isidentifier()}


def _lists(prompt: Prompt, text: str, parameters: Mapping[str, inspect.Parameter], wanted: set[str]) -> dict[str, Any]:
    given = by_name(prompt, text)
    lists = {"prompts": [given["prompt"]], "completions": [given["completion"]], **{key: [given[key]] for key in ("answer", "info", "task")}}
    columns = {key: [value] for key, value in _columns(prompt, parameters, wanted).items()}
    return columns | {key: value for key, value in lists.items() if key in wanted}


def _one_of(result: Any, name: str) -> Any:
    if not isinstance(result, list | tuple) or len(result) != 1:
        raise ValueError(f"verifier {name!r} returned {result!r} for one completion; return a list with one number a completion")
    return result[0]


def _finished(result: Any) -> Any:
    async def waited() -> Any:
        return await result

    return asyncio.run(waited()) if inspect.isawaitable(result) else result


def _finite(verdict: Verdict) -> Verdict:
    """The verdict, or an error where a function of one's own filled it with what is none: a text as reward, a status of its own."""
    if verdict.status not in STATUSES:
        return Verdict(status="error", feedback=f"the verdict's status is {verdict.status!r}; known: {', '.join(STATUSES)}")
    wrong = [f"{name} {value!r}" for name, value in (("reward", verdict.reward), *verdict.parts.items()) if not _is_number(value)]
    if verdict.status == "score" and wrong:
        return Verdict(status="error", feedback=f"{', '.join(wrong)}: not a finite number")
    return verdict


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | bool) and isfinite(value)
