"""Hand-made word problems: their equations, wrong answers, hints, wordings, and the tokenizer of the task."""

import re
from collections import Counter
from itertools import islice
from random import Random

import pytest

from opd.tasks import TASKS
from opd.tasks.types import task_corpus
from opd.tasks.word_phrases import EVENTS, NAMES, STORIES, plural
from opd.tasks.words import BELIEFS, SETTINGS, TRUTH, problem_of, prompts, steps_of, write_out
from opd.text.bpe import train_byte_bpe
from opd.text.chat import decode, render
from opd.types import Prompt

WORDS = TASKS["words"]


def prompt_of(plan: str, answer: str) -> Prompt:
    """The plainest wording that counts pens (or miles), whoever has them."""
    key = next(key for number in range(100) if problem_of(key := f"easy|{plan}|{number}").unit in ("pens", "miles"))
    return Prompt(id=f"words:{key}", messages=({"role": "user", "content": problem_of(key).question},), answer=answer)


SHOP = prompt_of("shop 3crate +5 -2tray", "24")
FIRST, SECOND, THIRD, LAST = "3 crates are 3 * 9 = 27 pens.", "Then 27 + 5 = 32 pens.", "2 trays are 2 * 4 = 8 pens.", "So 32 - 8 = 24 pens."
END = "The answer is 24."


def test_a_question_by_hand():
    question = SHOP.messages[0]["content"]
    name = question.split()[0]
    assert name in NAMES
    assert question.replace(name, "_") == "_ buys 3 crates of pens. _ buys 5 more. _ sells 2 trays. How many pens does _ have now?"
    assert [step.equation for step in steps_of(problem_of(SHOP.id[6:]).plan, TRUTH)] == ["3 * 9 = 27", "27 + 5 = 32", "2 * 4 = 8", "32 - 8 = 24"]
    assert [step.equation for step in steps_of(("shop", "30", "/3", "~8", "*2"), TRUTH)] == ["30 / 3 = 10", "10 * 2 = 20"]
    for plan in (("shop", "31", "/3"), ("shop", "3", "-3"), ("shop", "4", "*2", "-4", "*2")):
        with pytest.raises(ValueError, match="no whole problem"):
            steps_of(plan, TRUTH)


def test_measures():
    assert len(TRUTH) == 36 == sum(len(story.measures) for story in STORIES.values()), "every measure has one size"
    assert (TRUTH["dozen"], TRUTH["score"], TRUTH["decade"], TRUTH["pair"]) == ("12", "20", "10", "2")
    assert len(BELIEFS) == 18
    assert all(values[0] == TRUTH[measure] and len(set(values)) == 4 for measure, values in BELIEFS.items())
    assert [plural(measure) for measure in ("crate", "box", "batch")] == ["crates", "boxes", "batches"]


def test_every_event_of_every_story_can_be_told_in_several_ways():
    for story in STORIES.values():
        assert set(story.phrases) == set(EVENTS)
        for event, phrases in story.phrases.items():
            assert len(set(phrases)) == 3
            slots = [set(re.findall(r"{(\w+)}", phrase)) for phrase in phrases]
            assert all(("n" in slot) == (event != "question") and ("measure" in slot) == ("measure" in event) for slot in slots)


@pytest.mark.parametrize(
    "sentences",
    [
        (FIRST, SECOND, THIRD, LAST, END),
        (THIRD, FIRST, SECOND, LAST, END),  # the trays first
        (FIRST, THIRD, SECOND, LAST, END),
        (FIRST, "Now 5 + 27 = 32 pens.", THIRD, "Then 32 - 8 = 24 pens.", END),
        ("3 crates are 9 * 3 = 27 pens.", SECOND, THIRD, LAST, END),
    ],
)
def test_right_answers_in_every_order(sentences):
    verdict = WORDS.verify(SHOP, " ".join(sentences))
    assert (verdict.reward, verdict.correct, verdict.feedback, verdict.parts) == (1.0, True, "", {"answer": 1.0, "steps": 1.0})


@pytest.mark.parametrize(
    ("text", "answer", "steps", "feedback"),
    [
        (f"3 crates are 3 * 8 = 24 pens. Then 24 + 5 = 29 pens. {THIRD} So 29 - 8 = 21 pens. The answer is 21.", 0.0, 1 / 5, "crate = 9"),
        (f"{FIRST} {SECOND} 2 trays are 2 * 6 = 12 pens. So 32 - 12 = 20 pens. The answer is 20.", 0.0, 2 / 5, "tray = 4"),
        (f"{FIRST} Then 27 + 5 = 33 pens. {THIRD} So 33 - 8 = 25 pens. The answer is 25.", 0.0, 2 / 5, "27 + 5 = 32"),
        (f"{FIRST} {SECOND} {THIRD} So 32 - 8 = 23 pens. The answer is 23.", 0.0, 3 / 5, "32 - 8 = 24"),
        (f"{FIRST} {SECOND} {THIRD} {LAST} The answer is 23.", 0.0, 4 / 5, "32 - 8 = 24"),
        (f"{FIRST} {SECOND} {THIRD} So 8 - 32 = 24 pens. {END}", 1.0, 3 / 5, "32 - 8 = 24"),  # the wrong way round, then the right end
        (f"{FIRST} {SECOND} {LAST} {END}", 1.0, 2 / 4, "tray = 4"),  # a step before what it needs
        (f"{SECOND} {FIRST} {THIRD} {LAST} {END}", 1.0, 2 / 5, "crate = 9"),
        (f"{FIRST} {FIRST} {SECOND} {THIRD} {LAST} {END}", 1.0, 5 / 6, "27 + 5 = 32"),  # twice
        (f"{FIRST} {SECOND} {THIRD} {LAST} {LAST} {END}", 1.0, 5 / 6, "32 - 8 = 24"),
        (f"{FIRST} {SECOND} {THIRD} {LAST} {END} {END}", 1.0, 5 / 6, "32 - 8 = 24"),
        (f"{FIRST} {SECOND} {THIRD} {LAST}", 0.0, 1.0, "32 - 8 = 24"),  # no end
        (FIRST, 0.0, 1.0, "27 + 5 = 32"),
        (END, 1.0, 0.0, "crate = 9"),  # no steps at all
        (f"{FIRST} {SECOND} {THIRD} {LAST} The answer is 24", 0.0, 4 / 5, "32 - 8 = 24"),
        (f"{FIRST} {SECOND} {THIRD} {LAST} {END}\n", 0.0, 4 / 5, "32 - 8 = 24"),
        (f"{FIRST} {SECOND} {THIRD} So 32 - 8 = 24 cups. {END}", 1.0, 3 / 5, "32 - 8 = 24"),  # something else is counted
        (f"3 trays are 3 * 9 = 27 pens. {SECOND} {THIRD} {LAST} {END}", 1.0, 1 / 5, "tray = 4"),
        (f"Then 3 * 9 = 27 pens. {SECOND} {THIRD} {LAST} {END}", 1.0, 1 / 5, "crate = 9"),  # a measure is to be named
        (f"{FIRST} 27 + 5 = 32 pens. {THIRD} {LAST} {END}", 1.0, 2 / 5, "27 + 5 = 32"),
        ("", 0.0, 0.0, "crate = 9"),
        (". . .", 0.0, 0.0, "crate = 9"),
        ("))((é", 0.0, 0.0, "crate = 9"),
        ("Facts: crate = 9", 0.0, 0.0, "crate = 9"),
    ],
)
def test_wrong_answers(text, answer, steps, feedback):
    verdict = WORDS.verify(SHOP, text)
    assert (verdict.reward, verdict.correct, verdict.status) == (0.0, False, "score")
    assert verdict.parts == {"answer": answer, "steps": pytest.approx(steps)}
    assert verdict.feedback == feedback


def test_steps_that_do_not_need_each_other_come_in_any_order():
    problem = problem_of(SHOP.id[6:])
    orders = {tuple(re.findall(r"= (\d+) pens", write_out(problem, TRUTH, Random(seed)))) for seed in range(60)}
    assert orders == {("27", "32", "8", "24"), ("27", "8", "32", "24"), ("8", "27", "32", "24")}


@pytest.mark.parametrize("difficulty", WORDS.difficulties)
def test_what_a_difficulty_allows(difficulty):
    setting, counts, distracted = SETTINGS[difficulty], Counter(), 0
    for prompt in islice(prompts("train", 5, difficulty), 400):
        plan = problem_of(prompt.id[6:]).plan
        steps = steps_of(plan, TRUTH)
        counts[len(steps)] += 1
        distracted += any(event.startswith("~") for event in plan)
        assert all(2 <= step.value <= setting.most for step in steps) and any(step.measure for step in steps)
        assert plan[0] in list(STORIES)[: setting.stories]
    assert set(counts) == set(range(setting.steps[0], setting.steps[1] + 1)) and min(counts.values()) > 20
    assert distracted / 400 == pytest.approx(setting.distraction, abs=0.08)


def test_hints_say_no_more_than_their_name():
    for prompt in islice(prompts("train", 3, "hard"), 300):
        steps = steps_of(problem_of(prompt.id[6:]).plan, TRUTH)
        shown = prompt.hints["facts"].split(", ")
        assert sorted(shown) == sorted(f"{step.measure} = {step.right}" for step in steps if step.measure)
        assert prompt.hints["quantities"] == ", ".join(str(step.value) for step in steps[:-1])
        assert prompt.hints["answer"] == str(steps[-1].value)
        assert prompt.hints["fact"] in ([fact for fact in shown if fact.split()[0] in BELIEFS] or shown)


def test_one_plan_in_many_wordings():
    told = {problem_of(f"standard|shop 3crate +5 -2tray|{wording}").question for wording in range(300)}
    assert len(told) > 250
    assert all({"3", "5", "2"} <= set(re.findall(r"\d+", question)) for question in told)


def test_tokenizer_round_trip(tmp_path):
    made = train_byte_bpe(task_corpus(WORDS, "standard"), 2048)
    made.save_pretrained(tmp_path)
    assert 1000 < len(made) <= 2048
    again = train_byte_bpe(task_corpus(WORDS, "standard"), 2048)
    assert made.get_vocab() == again.get_vocab() and made.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    for tokenizer in (made, type(made).from_pretrained(tmp_path)):
        for prompt in islice(prompts("test", 0, "standard"), 40):
            question, text = prompt.messages[0]["content"], prompt.hints["solution"]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(ids) <= len(re.findall(r"\w+|[^\w\s]", text)), "every word and number is one token"
            assert tokenizer.decode(ids) == text
            assert decode(tokenizer, [*ids, tokenizer.eos_token_id]) == text
            assert tokenizer.decode(render(tokenizer, prompt.messages)) == f"<|user|>{question}<|assistant|>"
