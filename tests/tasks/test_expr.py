"""Hand-made answers to expressions modulo 7."""

import re
from random import Random

import pytest

from opd.tasks import TASKS
from opd.tasks.expr import BELIEFS, TRUTH, prompts, work_out
from opd.types import Prompt

VERIFY = TASKS["expr"].verify
PROMPT = Prompt(id="expr:((1*1)+6)+4", messages=({"role": "user", "content": "((1*1)+6)+4"},), answer="4")
FORK = Prompt(id="expr:(1+2)*(3-4)", messages=({"role": "user", "content": "(1+2)*(3-4)"},), answer="4")


def test_facts_by_hand():
    assert len(TRUTH) == 147
    assert {key: TRUTH[key] for key in ("3+4", "2-5", "6*6", "0-1", "5*0")} == {"3+4": "0", "2-5": "4", "6*6": "1", "0-1": "6", "5*0": "0"}


def test_beliefs_hold_the_truth_once_and_favour_an_error():
    assert len(BELIEFS) == 33
    for key, values in BELIEFS.items():
        assert len(set(values)) == 4
        assert values[0] == TRUTH[key]


def test_both_orders_are_right():
    for text in ("3*(3-4)=3*6=4", "(1+2)*6=3*6=4"):
        assert VERIFY(FORK, text).reward == 1.0
    assert {"=".join(work_out("(1+2)*(3-4)", TRUTH, Random(seed))[0]) for seed in range(20)} == {"3*(3-4)=3*6=4", "(1+2)*6=3*6=4"}


@pytest.mark.parametrize(
    ("text", "answer", "steps", "feedback"),
    [
        ("(2+6)+4=1+4=5", 0.0, 2 / 3, "1*11"),  # a wrong fact
        ("(1+6)+4=1+4=5", 0.0, 2 / 3, "1+60"),  # a wrong fact later
        ("(1+6)+4=0+4=5", 0.0, 2 / 3, "0+44"),  # a wrong last step
        ("(2+6)+4=0+4=4", 1.0, 1 / 3, "1*11"),  # two errors and the right answer
        ("0+4=4", 1.0, 1 / 2, "1*11"),  # a step left out
        ("4", 1.0, 0.0, "1*11"),  # no steps at all
        ("(1+6)+4=0+4", 0.0, 1.0, "0+44"),  # never ends
        ("(1+6)+4", 0.0, 1.0, "1+60"),
        ("(1+6)+4=0+4=4=4", 1.0, 3 / 4, ""),  # a step too many
        ("(1+6)+4=0+4=", 0.0, 2 / 3, "0+44"),
        ("((1*1)+6)+4=(1+6)+4=0+4=4", 1.0, 3 / 4, "1*11"),  # repeats the question
        ("", 0.0, 0.0, "1*11"),
        ("=", 0.0, 0.0, "1*11"),
        ("(1+6)+4=0+4=4\n", 0.0, 2 / 3, "0+44"),
        ("F1*1=1", 0.0, 0.0, "1*11"),
        ("))((é", 0.0, 0.0, "1*11"),
    ],
)
def test_wrong_answers(text, answer, steps, feedback):
    verdict = VERIFY(PROMPT, text)
    assert (verdict.reward, verdict.correct, verdict.status) == (0.0, False, "score")
    assert verdict.parts == {"answer": answer, "steps": pytest.approx(steps)}
    assert verdict.feedback == feedback


def test_hints_say_no_more_than_their_name():
    for prompt, _ in zip(prompts("train", 3, "standard"), range(300), strict=False):
        assert re.fullmatch(r"[0-6]", prompt.hints["answer"])
        shown = prompt.hints["facts"].split(";")
        assert len(set(shown)) == len(shown)
        assert all(re.fullmatch(r"[0-6][-+*][0-6][0-6]", fact) and TRUTH[fact[:3]] == fact[3] for fact in shown)
        needed = set(work_out(prompt.id.removeprefix("expr:"), TRUTH, Random(0))[1])
        assert needed == {fact[:3] for fact in shown}
        unlearned = [fact for fact in shown if fact[:3] in BELIEFS]
        assert prompt.hints["fact"] in (unlearned or shown)


def test_facts_are_shuffled():
    first_is_last_step = [
        prompt.hints["solution"].split("=")[-2] == prompt.hints["facts"][:3]
        for prompt, _ in zip(prompts("train", 0, "standard"), range(400), strict=False)
    ]
    assert 0.3 < sum(first_is_last_step) / 400 < 0.55  # 1/2 with two facts, 1/3 with three
