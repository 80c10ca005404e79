"""Programs as answers: every form of tests, by hand; deceptions that do not work; a code verifier does not start without isolation."""

import json

import pytest

from opd.types import Prompt
from opd.verify import code as code_module
from opd.verify import gold_problem, judge, make_verifier, patterns, simple
from opd.verify.code import code_verdict, program_of

ECHO = {"inputs": ["3 4\n", "10 -2\n"], "outputs": ["7\n", "8\n"]}
CALL = {"inputs": [[3, 4], [10, -2]], "outputs": [7, 8], "fn_name": "add"}
ASSERTS = {"asserts": "assert add(3, 4) == 7\nassert add(10, -2) == 8"}


def prompt(tests, **hints):
    return Prompt(id="p", messages=({"role": "user", "content": "q"},), answer=tests if isinstance(tests, str) else json.dumps(tests), hints=hints)


def fenced(program):
    return f"I add.\n```python\n{program}\n```"


@pytest.mark.parametrize(
    ("tests", "program", "share"),
    [
        (ECHO, "a, b = map(int, input().split())\nprint(a + b)", 1.0),
        (ECHO, "a, b = map(int, input().split())\nprint(a + abs(b))", 0.5),
        (CALL, "def add(a, b):\n    print('noise')\n    return a + b", 1.0),
        (CALL, "class Solution:\n    def add(self, a, b):\n        return a + b", 1.0),
        (CALL, "def add(a, b):\n    return max(a + b, 8)", 0.5),
        (ASSERTS, "def add(a, b): return a + b", 1.0),
        (ASSERTS, "def add(a, b): return a - b", 0.0),
        ("assert add(1, 1) == 2", "def add(a, b): return a + b", 1.0),
    ],
)
def test_every_form_of_tests(tests, program, share):
    verdict = code_verdict(prompt(tests), fenced(program), partial=True)
    assert (verdict.reward, verdict.parts["tests"], verdict.correct) == (share, share, share == 1.0)
    assert code_verdict(prompt(tests), fenced(program)).reward == float(share == 1.0)


@pytest.mark.parametrize(
    ("tests", "program", "said"),
    [
        (ASSERTS, "import os\nos._exit(0)", "ended before its tests"),
        (ASSERTS, "raise SystemExit(0)", "ended before its tests"),
        (CALL, "import os\nos._exit(0)", "expected '7'"),
        (CALL, "class Always:\n    def __eq__(self, o): return True\ndef add(a, b): return Always()", "TypeError"),
        (ECHO, "while True: pass", "no end within 1 seconds"),
        (ECHO, "x = (", "SyntaxError"),
        (ECHO, "print(open('/etc/hostname').read())", "FileNotFoundError"),
    ],
)
def test_what_does_not_pass_says_why(tests, program, said):
    verdict = code_verdict(prompt(tests), fenced(program), seconds=1.0)
    assert (verdict.status, verdict.correct, verdict.reward) == ("score", False, 0.0)
    assert said in verdict.feedback


def test_the_last_block_counts_and_an_open_fence_does_not():
    assert program_of("```python\nx = 1\n```\nbetter:\n```py\nx = 2\n```") == "x = 2\n"
    assert program_of("print(1)") == "print(1)"
    assert program_of("```python\nx = 1") is None
    assert not code_verdict(prompt(ECHO), "```python\nx = 1").correct


def test_broken_tests_are_an_error_and_never_a_zero():
    for tests in ({"inputs": ["1"]}, "3", {"inputs": [1], "outputs": ["1"]}, {"inputs": [], "outputs": []}):
        assert judge(code_verdict, prompt(tests), fenced("pass")).status == "error"


def test_gold_answers_are_tests_that_the_reference_passes():
    verify = make_verifier("code")
    assert gold_problem(verify, prompt(ECHO)) == ""
    assert "as many inputs" in gold_problem(verify, prompt({"inputs": ["1"]}))
    right, wrong = (fenced(f"a, b = map(int, input().split())\nprint(a {sign} b)") for sign in "+-")
    assert gold_problem(verify, prompt(ECHO, solution=right)) == ""
    assert "fails its own tests" in gold_problem(verify, prompt(ECHO, solution=wrong))


def test_refuses_to_start_without_isolation(monkeypatch):
    monkeypatch.setattr(code_module, "obstacle", lambda: "unshare: refused")
    with pytest.raises(ValueError, match="will not run programs unprotected: unshare: refused"):
        make_verifier("code")


@pytest.mark.parametrize(
    ("text", "correct", "keys"),
    [
        ('so {"a": 1, "b": [2]}', True, 1.0),
        ('{"b": [2], "a": 1}', True, 1.0),
        ('{"a": 1}', False, 0.5),
        ('{"a": {"a": 1}, "b": [2]}', False, 0.5),
        ("none", False, 0.0),
    ],
)
def test_json(text, correct, keys):
    verdict = make_verifier("json")(prompt({"a": 1, "b": [2]}), text)
    assert (verdict.correct, verdict.parts["keys"]) == (correct, keys)


@pytest.mark.parametrize(
    ("gold", "text", "correct"),
    [
        ({"a": 1}, '{"a": ' + "1" * 5000 + "}", False),  # Python refuses such an integer
        ({"a": 1}, '{"a": true}', False),
        ({"a": 1}, '{"a": 1.0}', True),
        ([1, [True]], "[1, [1]]", False),
        ({"a": 1}, "[" * 100_000, False),
        ({"a": 1}, '["' * 100_000, False),
        ({"a": 1}, "[1, " * 300 + "[1," * 100_000 + '{"a": 1}', False),
        ({"a": 1}, "{[" * 2000 + '{"a": 1}', True),
    ],
)
def test_no_json_of_a_student_is_an_error_or_takes_long(gold, text, correct):
    attempts = []

    class CountedDecoder(json.JSONDecoder):
        def raw_decode(self, s, idx=0):
            attempts.append(idx)
            return super().raw_decode(s, idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simple, "_DECODER", CountedDecoder(parse_int=simple._integer))
        verdict = judge(make_verifier("json"), prompt(gold), text)
    assert (verdict.status, verdict.correct) == ("score", correct)
    assert len(attempts) <= simple._PATIENCE // 100 + 1


def test_json_in_chosen_keys():
    verify = make_verifier({"json": {"keys": ["a"]}})
    assert verify(prompt({"a": 1, "b": 2}), '{"a": 1, "b": 3}').correct
    assert not verify(prompt({"a": 1, "b": 2}), '{"a": 2, "b": 2}').correct


def test_regex():
    verify = make_verifier({"regex": {"pattern": r"Answer: (\w+)"}})
    assert verify(prompt("yes"), "Answer: no\nAnswer: yes").correct
    assert not verify(prompt("yes"), "yes").correct
    assert judge(make_verifier({"regex": {"pattern": "("}}), prompt("yes"), "yes").status == "error"


def test_a_pattern_that_would_take_years_is_an_error_within_its_deadline(monkeypatch):
    monkeypatch.setattr(patterns, "DEADLINE_SECONDS", 0.1)
    verdict = judge(make_verifier({"regex": {"pattern": r"(a|aa)+$"}}), prompt("yes"), "a" * 80 + "b")
    assert verdict.status == "error" and "took longer than 0.1 seconds on this text" in verdict.feedback
