"""Programs as answers: the last code block of a text, run against the prompt's tests in the sandbox.

Tests are JSON in the prompt's answer, in the forms of the public code sets:
    {"inputs": ["3 4\n"], "outputs": ["7\n"]}                      standard input and output
    {"inputs": [[3, 4]], "outputs": [7], "fn_name": "add"}         calls of a function (or of a method of a class Solution)
    {"asserts": "assert add(3, 4) == 7"}                           Python statements after the program; also a plain text with asserts
"""

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from opd.config.choices import Positive
from opd.types import Prompt, Verdict
from opd.verify.sandbox import Limits, NoIsolation, Outcome, obstacle, run_python

_FENCED = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_MAX_PROGRAM_CHARACTERS = 100_000
_SHOWN = 300  # characters of an input, an output or an error in the feedback


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One check of a program: its source with what is added, its standard input, what it must say, and how the two are compared.

    compare: "words" of the output, the JSON "value", or the "last" line. shown: how feedback names the test.
    """

    source: str
    stdin: str
    expected: Any
    shown: str
    compare: Literal["words", "value", "last"] = "words"


def code_verdict(
    prompt: Prompt, text: str, *, seconds: Positive = 10.0, memory_mib: Positive = 512, partial: bool = False
) -> Verdict:
    """Right when the program passes every test; `partial` gives the share of passed tests as reward (correct still means all).

    seconds, memory_mib: limits of one test. parts: tests (share passed). The feedback shows the first failing test. With asserts the
    program shares its process with the tests and could deceive them; inputs and outputs are compared outside.
    """
    if prompt.answer is None:
        return Verdict(status="abstain", feedback="no tests")
    program = program_of(text)
    if program is None:
        return Verdict(feedback="No program was found; end with one code block.", parts={"tests": 0.0})
    limits = Limits(seconds=seconds, cpu_seconds=int(seconds) + 1, memory_bytes=int(memory_mib) << 20)
    passed, total, feedback = 0, 0, ""
    for test in tests_of(prompt, program):
        total += 1
        if feedback and not partial:
            continue
        problem = _problem(test, run_python(test.source, test.stdin.encode(), limits), limits)
        passed += not problem
        feedback = feedback or problem
    share = passed / total
    correct = passed == total
    return Verdict(reward=share if partial else float(correct), correct=correct, feedback=feedback, parts={"tests": share})


def require_isolation() -> None:
    """Raises NoIsolation (a ValueError) where programs cannot be isolated: they are then not run at all."""
    if problem := obstacle():
        raise NoIsolation(f"data.verifier code will not run programs unprotected: {problem}")


def gold_tests_problem(prompt: Prompt) -> str:
    """What is wrong with a prompt's tests: their form, or that they refuse the hint "solution" where it holds a program; "" if nothing."""
    try:
        next(tests_of(prompt, "pass"))
    except ValueError as error:
        return str(error)
    solution = prompt.hints.get("solution", "")
    if "```" not in solution:
        return ""
    verdict = code_verdict(prompt, solution)
    return "" if verdict.correct else f"the reference solution fails its own tests: {verdict.feedback}"


def program_of(text: str) -> str | None:
    """The last fenced block of a text, or the text itself where it has no fence at all; None for an open fence or nothing."""
    blocks = _FENCED.findall(text)
    program = blocks[-1] if blocks else "" if "```" in text else text
    return program if program.strip() and len(program) <= _MAX_PROGRAM_CHARACTERS else None


def tests_of(prompt: Prompt, program: str) -> Iterator[Test]:
    """The prompt's tests around a program, at least one. Raises ValueError for an answer in none of the known forms."""
    spec = _spec(prompt)
    if "asserts" in spec:
        nonce = secrets.token_hex(16)  # an early exit must not look like success
        source = f"{program}\n\n{spec['asserts']}\n\nprint(input())\n"
        yield Test(source=source, stdin=nonce + "\n", expected=nonce, shown="the asserts", compare="last")
        return
    for given, expected in zip(spec["inputs"], spec["outputs"], strict=True):
        if name := spec.get("fn_name"):
            yield Test(
                source=_CALL.format(program=program, name=json.dumps(name)), stdin=json.dumps(given), expected=expected,
                shown=f"{name}({', '.join(map(repr, given))})", compare="value",
            )  # fmt: skip
        else:
            yield Test(source=program, stdin=given, expected=expected, shown=f"input {given!r}")


_CALL = """{program}

def _call():
    import json, os, sys
    said, sys.stdout = os.dup(1), sys.stderr
    arguments, name = json.load(sys.stdin), {name}
    function = globals()[name] if name in globals() else getattr(Solution(), name)
    os.write(said, json.dumps(function(*arguments)).encode())

_call()
"""


def _spec(prompt: Prompt) -> dict[str, Any]:
    answer = prompt.answer or ""
    try:
        spec = json.loads(answer)
    except json.JSONDecodeError:
        spec = {"asserts": answer} if "assert" in answer else None
    where = f"prompt {prompt.id!r}: the tests in its answer"
    if not isinstance(spec, dict):
        raise ValueError(f"{where} are {answer[:60]!r}; write JSON with inputs and outputs (fn_name for calls), or asserts")
    if "asserts" in spec:
        return spec
    inputs, outputs = spec.get("inputs"), spec.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise ValueError(f"{where} need as many inputs as outputs, and at least one; found keys {', '.join(spec) or 'none'}")
    kind = list if spec.get("fn_name") else str
    if not all(isinstance(one, kind) for one in inputs):
        raise ValueError(f"{where}: every input must be a {'list of arguments (fn_name is given)' if kind is list else 'text (standard input)'}")
    return spec


def _problem(test: Test, outcome: Outcome, limits: Limits) -> str:
    """What the program did wrong, for the student to read; "" for a passed test."""
    if outcome.status == "time":
        return f"{test.shown[:_SHOWN]}: no end within {limits.seconds:g} seconds."
    if outcome.status == "output":
        return f"{test.shown[:_SHOWN]}: more than {limits.output_bytes} bytes of output."
    said = outcome.stdout.decode(errors="replace")
    if outcome.exit_code:
        lines = outcome.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {outcome.exit_code}"]
        return f"{test.shown[:_SHOWN]}: {lines[-1][:_SHOWN]}"
    if _agrees(test, said):
        return ""
    if test.compare == "last":
        return "The program ended before its tests did."
    return f"{test.shown[:_SHOWN]}: expected {str(test.expected)[:_SHOWN]!r}, found {said[:_SHOWN]!r}."


def _agrees(test: Test, said: str) -> bool:
    match test.compare:
        case "words":
            return said.split() == str(test.expected).split()
        case "last":
            return said.strip().splitlines()[-1:] == [test.expected]
        case "value":
            try:
                return json.loads(said) == test.expected
            except (ValueError, RecursionError):  # no JSON, an integer longer than Python reads, or nested too deeply
                return False
