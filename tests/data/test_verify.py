import json
import os
import signal
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.types import Prompt, Verdict
from opd.verify import MathVerifier, as_verifier, final_answer, gold_problem, judge, make_verifier
from opd.verify import math as math_module
from opd.verify.adapt import checked
from opd.verify.answers import last_number, marked_answer, read_number

SAMPLE = Path(__file__).parent / "gsm8k_like.jsonl"


def prompt(answer, **more):
    return Prompt(id="p", messages=({"role": "user", "content": "q"},), answer=answer, **more)


@pytest.fixture(scope="module")
def math():
    verifier = MathVerifier(deadline_seconds=5.0)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 6*7\n#### 42", "42"),
        ("#### 41\nno, wait\n####42\nmore words", "42"),
        ("thus \\boxed{42}.", "42"),
        ("\\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
        ("#### 41 but \\boxed{42}", "42"),
        ("\\boxed{41}\n#### $42$", "42"),
        ("\\boxed{42", None),
        ("####", None),
        ("the answer is 42", None),
        ("", None),
    ],
)
def test_marked_answer(text, answer):
    assert marked_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("1,000", 1000),
        ("1,234,567.50", Fraction(2469135, 2)),
        ("-12", -12),
        ("$18.00", 18),
        ("-$5", -5),
        ("$-5", -5),
        ("\\$3", 3),
        ("50%", 50),
        ("50\\%", 50),
        ("3/4", Fraction(3, 4)),
        (".5", Fraction(1, 2)),
        ("42.", 42),
        ("007", 7),
        ("18 dollars", 18),
        ("18 red balls left.", 18),
        ("1,00", None),
        ("1,0000", None),
        ("3/0", None),
        ("2 million", None),
        ("4 5", None),
        ("x", None),
        ("", None),
        ("9" * 101, None),
        ("\\frac12", None),
        ("1e5", None),
    ],
)
def test_read_number(text, value):
    assert read_number(text) == value


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("we get 10-3 = 7 apples", "7"),
        ("10-3", "3"),
        ("it is -3.", "-3"),
        ("pay $1,250.75 now", "$1,250.75"),
        ("v2 beats x1", None),
        ("1/2 of it", "1/2"),
        ("12, 13", "13"),
        ("none", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_every_made_up_gold_answer_is_right_and_its_neighbours_are_wrong(math):
    for row in map(json.loads, SAMPLE.read_text().splitlines()):
        item = prompt(row["answer"])
        gold = read_number(row["answer"].rpartition("####")[2])
        assert math(item, row["answer"]) == Verdict(reward=1.0, correct=True, parts={"marked": 1.0, "answer": 1.0})
        for wrong in (gold + 1, -gold, gold * 10, gold + Fraction(1, 10)):
            verdict = math(item, f"#### {float(wrong)}")
            assert (verdict.status, verdict.reward, verdict.correct) == ("score", 0.0, False), wrong


def test_math_forms_of_one_answer(math):
    for text in ("#### 1000", "#### 1,000", "\\boxed{1{,}000}", "I think it is $1,000.00", "\\boxed{10^3}", "#### 1000 dollars"):
        assert math(prompt("1,000"), text).correct, text
    half = prompt("\\frac{1}{2}")
    for text in ("\\boxed{0.5}", "\\boxed{\\frac12}", "#### 1/2", "\\boxed{\\frac{2}{4}}"):
        assert math(half, text).correct, text
    for text in ("\\boxed{2}", "\\boxed{\\frac{1}{3}}", "#### x"):
        verdict = math(half, text)
        assert (verdict.status, verdict.correct, verdict.reward) == ("score", False, 0.0), text
    assert math(prompt("\\sqrt{8}"), "\\boxed{2\\sqrt{2}}").correct
    assert not math(prompt("\\sqrt{8}"), "\\boxed{3\\sqrt{2}}").correct


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("4", ["x=4", "2+2=4", "f(2)=4", "\\frac{12}{3} = 4", "2(2)=2\\cdot 2=4", "4=4"], ["3=4", "2+3=4", "(3=4)", "3.5=4", "2+2=3=4", "4=3"]),
        ("0.333", ["\\frac13=0.333", "1/3=0.333"], ["1=0.333", "0.34=0.333"]),
        ("\\frac{1}{2}", ["0.5=\\frac12", "2^{-1}=\\frac12", "50\\%=\\frac12"], ["1=\\frac12"]),
        ("11", ["3=11_2", "3_{10}=11_2", "1 km=11 m"], ["3=11"]),  # bases and units: no plain arithmetic
        ("2.5", ["2\\frac12=2.5", "2 \\frac{1}{2}=2.5"], ["2=2.5"]),  # math-verify may read a product
        ("3=4", ["3=4"], []),  # the gold answer itself
    ],
)  # fmt: skip
def test_an_equation_counts_by_its_right_side_unless_it_equates_different_numbers(math, gold, right, wrong):
    for answer in (*right, *wrong):
        verdict = math(prompt(gold), f"\\boxed{{{answer}}}")
        assert (verdict.status, verdict.correct) == ("score", answer in right), answer


def test_math_without_a_mark_takes_the_last_number_unless_told_not_to(math):
    assert math(prompt("7"), "10 - 3 = 7").parts == {"marked": 0.0, "answer": 1.0}
    strict = MathVerifier(marked=True)
    assert strict(prompt("7"), "10 - 3 = 7") == Verdict(feedback="No final answer was found.", parts={"marked": 0.0, "answer": 0.0})
    assert strict(prompt("7"), "#### 7").correct
    assert strict._servers is None  # plain numbers need no child process


@pytest.mark.parametrize("text", ["", "no number here", "#### ", "\\boxed{}", "\\boxed{" * 2000, "#### " + "1+" * 5000 + "1"])
def test_math_text_without_a_usable_answer_is_wrong_not_an_error(math, text):
    verdict = math(prompt("5"), text)
    assert (verdict.status, verdict.reward, verdict.correct) == ("score", 0.0, False)


def test_math_without_gold_abstains(math):
    assert math(prompt(None), "#### 4").status == "abstain"


def test_unreadable_gold_is_an_error(math):
    verdict = math(prompt("(((("), "#### 4")
    assert verdict.status == "error"
    assert "gold answer '(((('" in verdict.feedback


def test_missed_deadline_is_an_error_and_the_next_answer_is_graded(tmp_path, monkeypatch):
    """A child that hangs on one gold answer, in C code that no Python signal handler could interrupt."""
    real = math_module._WORKER.read_text()
    line = "    expected = _read(gold)\n"
    hanging = real.replace(line, '    while "sinh" in gold:\n        sum(range(10**9))\n' + line)
    assert hanging != real
    worker = tmp_path / "worker.py"
    worker.write_text(hanging)
    monkeypatch.setattr(math_module, "_WORKER", worker)
    verifier = MathVerifier(deadline_seconds=0.5)
    assert verifier(prompt("\\sqrt{8}"), "\\boxed{2\\sqrt{2}}").correct
    parent, server = verifier._servers.process, verifier._servers.first
    seen = [server]
    for _ in range(4):
        verdict = verifier(prompt("\\sinh{1}"), "\\boxed{x}")
        assert (verdict.status, verdict.reward) == ("error", 0.0)
        assert "0.5 seconds" in verdict.feedback
        assert ends(seen[-1]), "the hanging server must be gone"
        assert verifier(prompt("\\sqrt{8}"), "\\boxed{2\\sqrt{2}}").correct
        seen.append(verifier._servers.first)
    assert parent is verifier._servers.process and parent.poll() is None, "servers are forked, without loading anything again"
    assert len(set(seen)) == 5
    verifier.close()
    assert parent.poll() is not None and ends(seen[-1])


def test_a_caller_that_gives_up_waits_for_no_fork(tmp_path, monkeypatch):
    """The process that forks is stopped: the spare server still answers, and the answer that hangs still ends at its deadline."""
    real = math_module._WORKER.read_text()
    line = "    expected = _read(gold)\n"
    worker = tmp_path / "worker.py"
    worker.write_text(real.replace(line, '    while "sinh" in gold:\n        sum(range(10**9))\n' + line))
    monkeypatch.setattr(math_module, "_WORKER", worker)
    verifier = MathVerifier(deadline_seconds=1.5)
    assert verifier(prompt("\\sqrt{8}"), "\\boxed{2\\sqrt{2}}").correct
    parent = verifier._servers.process
    until = time.monotonic() + 10
    while len(verifier._servers._ready) < 2 and time.monotonic() < until:
        verifier(prompt("\\sqrt{8}"), "\\boxed{2\\sqrt{2}}")  # takes the spare as it comes
    os.kill(parent.pid, signal.SIGSTOP)
    assert "1.5 seconds" in verifier(prompt("\\sinh{1}"), "\\boxed{x}").feedback
    assert verifier(prompt("\\sqrt{8}"), "\\boxed{2\\sqrt{2}}").correct
    os.kill(parent.pid, signal.SIGCONT)
    assert "1.5 seconds" in verifier(prompt("\\sinh{1}"), "\\boxed{x}").feedback
    assert verifier(prompt("\\sqrt{8}"), "\\boxed{2\\sqrt{2}}").correct
    verifier.close()


def ends(pid):
    """Whether the process is gone, or a zombie that only waits for its new parent, within five seconds."""
    stat, until = Path(f"/proc/{pid}/stat"), time.monotonic() + 5
    while time.monotonic() < until:
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


def test_a_server_that_dies_of_an_answer_is_replaced(tmp_path, monkeypatch):
    real = math_module._WORKER.read_text()
    line = "    expected = _read(gold)\n"
    deadly = real.replace(line, '    if "sinh" in gold:\n        os.kill(os.getpid(), signal.SIGSEGV)\n' + line)
    worker = tmp_path / "worker.py"
    worker.write_text(deadly)
    monkeypatch.setattr(math_module, "_WORKER", worker)
    verifier = MathVerifier(deadline_seconds=5.0)
    for _ in range(3):
        verdict = verifier(prompt("\\sinh{1}"), "\\boxed{x}")
        assert (verdict.status, verdict.feedback) == ("error", "math-verify's process died of this answer")
        assert verifier(prompt("\\sqrt{8}"), "\\boxed{2\\sqrt{2}}").correct
    os.kill(verifier._servers.process.pid, signal.SIGKILL)  # the parent of all servers, too
    verifier._servers.process.wait(10)
    os.kill(verifier._servers.first, signal.SIGKILL)
    assert verifier(prompt("\\sqrt{8}"), "\\boxed{2\\sqrt{2}}").correct
    verifier.close()


def test_hostile_powers_end_in_a_verdict(math):
    hasty = MathVerifier(deadline_seconds=1.0)
    for body in ("9^{9^{9^{9}}}", "(" * 400 + "x" + ")" * 400, "(x+y+z)^{5000}", "\\sum_{n=1}^{10^9} n!"):
        text = f"\\boxed{{{body}}}"
        verdict = hasty(prompt("\\frac{1}{2}"), text)
        assert verdict.status == "error" or not verdict.correct, text
    assert math(prompt("\\frac{1}{2}"), "#### 0.5").correct


def test_math_works_outside_the_main_thread(math):
    found = []
    thread = threading.Thread(target=lambda: found.append(math(prompt("\\sqrt{8}"), "\\boxed{2\\sqrt{2}}")))
    thread.start()
    thread.join(timeout=60)
    assert [verdict.correct for verdict in found] == [True]


def test_model_text_never_reaches_a_python_parser(math, tmp_path):
    target = tmp_path / "touched"
    verdict = math(prompt("\\frac12"), f"\\boxed{{__import__('pathlib').Path('{target}').touch()}}")
    assert not verdict.correct
    assert not target.exists()


def test_exact():
    exact = make_verifier("exact")
    assert exact(prompt("New  York"), " New York\n").correct
    assert not exact(prompt("New York"), "new york").correct
    assert make_verifier({"exact": {"ignore_case": True}})(prompt("New York"), "new york").correct
    assert exact(prompt("7"), "steps\n#### 7").correct
    assert not exact(prompt("7"), "steps\n7").correct
    assert make_verifier({"exact": {"last_line": True}})(prompt("7"), "steps\n7").correct
    assert not exact(prompt("7"), "").correct
    assert exact(prompt(None), "7").status == "abstain"


def test_choice():
    choice = make_verifier("choice")
    for text in ("B", "(B)", "The answer is B.", "A is wrong, so B", "\\boxed{B}", "#### (B)"):
        assert choice(prompt("B"), text).correct, text
        assert not choice(prompt("C"), text).correct, text
    assert choice(prompt("(B)"), "B").correct
    assert choice(prompt("B"), "Bob").feedback == "No answer was found."
    for text in ("\\boxed{B. An A and a C}", "\\boxed{(B) A or C}", "\\boxed{b}", "\\boxed{\\text{B}}", "#### B: A", "\\boxed{A, then B}"):
        assert choice(prompt("B"), text).correct and not choice(prompt("A"), text).correct, text


def test_names_and_parameters_are_checked():
    with pytest.raises(ValueError, match="unknown name 'maths' \\(did you mean 'math'"):
        make_verifier("maths")
    with pytest.raises(ValueError, match="unknown parameter 'deadline' \\(did you mean 'deadline_seconds'"):
        make_verifier({"math": {"deadline": 3}})
    with pytest.raises(ValueError, match="above 0"):
        make_verifier({"math": {"deadline_seconds": 0}})
    with pytest.raises(ValueError, match="no function 'nothing'"):
        make_verifier({"fn": "math:nothing"})


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (True, Verdict(reward=1.0, correct=True)),
        (False, Verdict()),
        (0.5, Verdict(reward=0.5)),
        (1, Verdict(reward=1.0, correct=True)),
        (np.float32(0.25), Verdict(reward=0.25)),
        (np.bool_(True), Verdict(reward=1.0, correct=True)),
        (torch.tensor(1.0), Verdict(reward=1.0, correct=True)),
        (None, Verdict(status="abstain")),
        (Verdict(reward=-1.0, feedback="no"), Verdict(reward=-1.0, feedback="no")),
    ],
)
def test_functions_of_ones_own_are_adapted(result, verdict):
    assert as_verifier(lambda prompt, text: result)(prompt("1"), "1") == verdict


@pytest.mark.parametrize("result", [float("nan"), float("inf"), "yes", [1.0]])
def test_a_result_that_is_no_verdict_becomes_an_error(result):
    verdict = judge(as_verifier(lambda prompt, text: result), prompt("1"), "1")
    assert verdict.status == "error"
    assert "return a Verdict, a bool, a finite number or None" in verdict.feedback


def test_a_function_of_one_argument_is_refused_at_once():
    with pytest.raises(ValueError, match="must accept \\(prompt, text\\)"):
        as_verifier(lambda text: 1.0)


def test_judge_keeps_the_exception():
    def broken(prompt, text):
        raise KeyError("no such unit")

    assert judge(broken, prompt("1"), "x") == Verdict(status="error", feedback="KeyError: 'no such unit'")
    assert judge(lambda p, t: Verdict(reward=float("nan")), prompt("1"), "x").status == "error"


def test_gold_problem(math):
    assert gold_problem(math, prompt("1,000")) == ""
    assert gold_problem(math, prompt("\\frac{3}{4}")) == ""
    assert "'(((('" in gold_problem(math, prompt("(((("))
    assert gold_problem(math, prompt("")) == "there is no gold answer"
    assert gold_problem(make_verifier("choice"), prompt("F")) == "the gold answer 'F' cannot be graded: No answer was found."


def test_final_answer_gives_one_spelling_an_answer():
    assert {final_answer(prompt("1"), text) for text in ("#### 1,000", "it is $1000.00", "\\boxed{1000}")} == {"1000"}
    assert final_answer(prompt("1"), "first\nParis ") == "Paris"
    assert final_answer(prompt("1"), "") == ""


def test_a_watched_verifier_keeps_its_name():
    """A run records it, and `opd bundle` compares: there nobody watches."""
    for choice in ("math", {"math": {"deadline_seconds": 1}}, "exact", "task"):
        verify = make_verifier(choice)
        watched = checked(verify, lambda: None)
        assert getattr(watched, "__qualname__", type(watched).__name__) == getattr(verify, "__qualname__", type(verify).__name__)
