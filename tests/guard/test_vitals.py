import numpy as np
import pytest
import torch
from opd_rollout.types import Completion

from opd.guard.vitals import announced, distinct, duplicates, leaked, ngrams, repeated, text_vitals, whole_groups
from opd.text.token_class import answer_span, class_shares, token_classes
from opd.types import Judged, Prompt, Verdict


def answer(ids, *, prompt="p", text="", expected="42", group=0, member=0, question="What is it?", prompt_ids=(1, 2)):
    completion = Completion(
        token_ids=tuple(ids), logprobs=torch.zeros(len(ids)), loss_mask=torch.ones(len(ids), dtype=torch.bool), source="student", temperature=1.0,
        finish="stop", versions=(),
    )  # fmt: skip
    asked = Prompt(id=prompt, messages=({"role": "user", "content": question},), answer=expected)
    return Judged(prompt=asked, prompt_ids=prompt_ids, completion=completion, text=text, verdict=Verdict(), group=group, member=member)


def test_ngrams_are_equal_exactly_for_equal_runs():
    a = ngrams([5, 6, 7, 5, 6], 2)
    assert a[0] == a[3] and len(np.unique(a)) == 3 and len(ngrams([1], 2)) == 0
    assert ngrams([1, 2], 2)[0] != ngrams([2, 1], 2)[0]


def test_distinct_and_repeated_by_hand():
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == pytest.approx(2 / 4)
    assert distinct([[1]], 2) is None
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4], 4) == pytest.approx(1 - 4 / 5)
    assert repeated([1, 2, 3], 4) == 0.0


def test_duplicates_are_across_prompts_only():
    same = [answer([7, 8], prompt="a"), answer([7, 8], prompt="a"), answer([9], prompt="b")]
    assert duplicates(same) == 0.0
    assert duplicates([*same, answer([9], prompt="c")]) == pytest.approx(2 / 4)
    assert duplicates(same[:2]) is None


def test_a_leak_is_in_the_view_and_not_in_the_prompt():
    view = (1, 2, 30, 31, 32, 33)
    seen = [answer([5, 30, 31, 32, 6]), answer([30, 31, 5, 32]), answer([1, 2, 5, 5])]
    assert leaked(seen, [view] * 3, 3) == pytest.approx(1 / 3)
    assert leaked(seen, [view] * 3, 2) == pytest.approx(2 / 3)  # (1, 2) is the prompt's own
    assert leaked(seen, [None, (1, 2), None], 2) is None


def test_announced_needs_a_long_answer_and_a_question_without_it():
    early, late = "42 it is. " + "x" * 100, "y" * 100 + " so 42"
    assert announced([answer([1], text=early), answer([1], text=late)]) == 0.5
    assert announced([answer([1], text="42 short")]) is None
    assert announced([answer([1], text=early, question="Is it 42?")]) is None
    assert announced([answer([1], text="420 is not it " + "x" * 90)]) == 0.0


def test_groups_stay_whole():
    many = [answer([n], group=n // 4, member=n % 4) for n in range(16)]
    assert [one.group for one in whole_groups(many, 9)] == [0] * 4 + [1] * 4
    assert len(whole_groups(many, 1)) == 4


def test_vitals_of_a_step():
    two = [answer([1, 2, 3], prompt="a", group=0), answer([1, 2, 3], prompt="b", group=1)]
    found = text_vitals(two, lambda judged: {"main": [(9, 1, 2, 3)] * 2}, answers=8, ngram=3)
    assert found["text/leak/main"] == 1.0 and found["text/duplicates"] == 1.0 and found["text/distinct_2"] == 0.5 and "text/announced" not in found
    assert text_vitals([], lambda judged: {}, answers=8, ngram=3) == {}


@pytest.mark.parametrize(
    ("tokens", "expected", "classes"),
    [
        (["(", "1", "+", "2", ")", "=", "3", "<|end|>"], "3", ["reasoning"] * 6 + ["answer", "style"]),
        (["Wait", ",", " so", " 2", "*", "3"], "7", ["filler", "reasoning", "filler", *["reasoning"] * 3]),
        (["2", "\n", "#### ", "6"], "6", ["reasoning", "style", "style", "answer"]),
        (["**", "Step", "**", " x", "$", "y", "$"], None, ["style", "reasoning", "style", "reasoning", "style", "reasoning", "style"]),
        (["- ", "a", "\n", "#", " b"], None, ["style", "reasoning", "style", "style", "reasoning"]),
        (["It", " is", " \\boxed{", "4", "2", "}", "."], "42", [*["reasoning"] * 3, "answer", "answer", "reasoning", "reasoning"]),
        (["2", "-", "1"], None, ["reasoning"] * 3),
        ([], None, []),
    ],
)
def test_token_classes(tokens, expected, classes):
    assert token_classes(tokens, expected) == classes


def test_answer_spans():
    def at(text, expected=None):
        start, end = answer_span(text, expected)
        return text[start:end]

    assert at("a=1=2") == "2" and at("The answer is 7.") == "7" and at("x #### 9\nmore") == "9" and at(r"\boxed{\frac{1}{2}} ok") == r"\frac{1}{2}"
    assert at("first 12 then 12 apples", "12") == "12" and answer_span("first 12 then 12 apples", "12")[0] == 14
    assert at("nothing", "12") == "" and at("112", "12") == ""


def test_class_shares_count_characters():
    assert class_shares("so ab") == {"style": 0.0, "filler": 0.5}
    assert class_shares("**ab**") == {"style": pytest.approx(4 / 6), "filler": 0.0}
    assert class_shares("") == {"style": 0.0, "filler": 0.0}
