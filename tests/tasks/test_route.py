"""Hand-made walks in the world of route."""

import re
from collections import Counter
from itertools import product
from random import Random

import pytest

from opd.tasks import TASKS
from opd.tasks.route import BELIEFS, EXITS, MAX_MOVES, PLACES, TRUTH, exits_of, prompts, shortest_moves, walk
from opd.types import Prompt

VERIFY = TASKS["route"].verify


def prompt_of(question: str) -> Prompt:
    return Prompt(id=f"route:{question}", messages=({"role": "user", "content": question},))


def follow(start: str, moves: str) -> str:
    text, place = "", start
    for exit_ in moves:
        place = TRUTH[place + exit_]
        text += exit_ + place
    return text


def test_world():
    assert len(TRUTH) == 72
    for place in PLACES:
        targets = {TRUTH[place + exit_] for exit_ in EXITS}
        assert len(targets) == 3
        assert place not in targets
    assert len(BELIEFS) == 12
    assert all(values[0] == TRUTH[key] and len(set(values)) == 4 for key, values in BELIEFS.items())


def test_shortest_walks_against_exhaustive_search():
    for prompt, _ in zip(prompts("train", 0, "easy"), range(15), strict=False):
        question = prompt.id.removeprefix("route:")
        _, via, goal = question.split(">")
        shortest = shortest_moves(question)
        found = [
            text
            for number in range(1, shortest + 1)
            for moves in product(EXITS, repeat=number)
            if (text := follow(question[0], "".join(moves)))[-1] == goal and via in text[1::2]
        ]
        assert {len(text) // 2 for text in found} == {shortest}
        assert {walk(question, TRUTH, Random(seed)) for seed in range(40)} <= set(found)


def test_every_right_walk_within_the_limit_counts():
    question = next(prompts("train", 0, "easy")).id.removeprefix("route:")
    _, via, goal = question.split(">")
    counts: Counter[bool] = Counter()
    for moves in product(EXITS, repeat=6):
        text = follow(question[0], "".join(moves))
        right = text[-1] == goal and (via in text[1:-2:2])
        counts[right] += 1
        assert VERIFY(prompt_of(question), text).correct == right
    assert counts[True] > 1
    assert counts[False] > 1


def test_too_many_moves():
    question = next(prompts("train", 0, "easy")).id.removeprefix("route:")
    text = walk(question, TRUTH, Random(0))
    goal = text[-1]
    loop = next(moves for moves in product(EXITS, repeat=MAX_MOVES - 1) if follow(goal, "".join(moves))[-1] == goal)
    verdict = VERIFY(prompt_of(question), text + follow(goal, "".join(loop)))
    assert verdict.parts == {"answer": 0.0, "steps": 1.0}
    assert not verdict.correct
    assert TRUTH[verdict.feedback[:2]] == verdict.feedback[2]


def test_wrong_answers():
    for prompt, _ in zip(prompts("train", 1, "standard"), range(60), strict=False):
        question, gold = prompt.id.removeprefix("route:"), prompt.hints["solution"]
        num_moves = len(gold) // 2
        for step in range(num_moves):
            claimed = gold[2 * step + 1]
            wrong = next(place for place in PLACES if TRUTH[(gold[2 * step - 1] if step else question[0]) + gold[2 * step]] != place)
            verdict = VERIFY(prompt, gold[: 2 * step + 1] + wrong + gold[2 * step + 2 :])
            assert (verdict.reward, verdict.correct) == (0.0, False)
            assert verdict.parts["answer"] == 1.0  # the moves still lead there
            assert verdict.parts["steps"] < 1.0
            assert verdict.feedback == exits_of(question, gold)[step] + claimed
        for text in (gold[:-2], gold[:2]):  # never arrives
            verdict = VERIFY(prompt, text)
            assert verdict.parts == {"answer": 0.0, "steps": 1.0}
            assert TRUTH[verdict.feedback[:2]] == verdict.feedback[2]


@pytest.mark.parametrize("text", ["", "1", "a", "1a2", "11aa", "1a 2b", "4a", "1A", "é", "F1a", "1a\n", "1a2b3", ","])
def test_garbage(text):
    prompt = next(prompts("train", 0, "standard"))
    verdict = VERIFY(prompt, text)
    assert (verdict.reward, verdict.correct, verdict.parts) == (0.0, False, {"answer": 0.0, "steps": 0.0})
    assert TRUTH[verdict.feedback[:2]] == verdict.feedback[2]


def test_the_place_between_must_be_visited():
    for prompt, _ in zip(prompts("train", 2, "standard"), range(300), strict=False):
        start, via, goal = prompt.id.removeprefix("route:").split(">")
        direct = next((e for e in EXITS if TRUTH[start + e] == goal), None)
        if direct:
            verdict = VERIFY(prompt, direct + goal)
            assert verdict.parts == {"answer": 0.0, "steps": 1.0}
            return
    raise AssertionError("no question with a direct exit to its goal")


def test_hints_say_no_more_than_their_name():
    for prompt, _ in zip(prompts("train", 3, "standard"), range(300), strict=False):
        question, gold = prompt.id.removeprefix("route:"), prompt.hints["solution"]
        assert re.fullmatch(r"[123]{3,5}", prompt.hints["answer"])
        assert prompt.hints["answer"] == gold[0::2]
        shown = prompt.hints["facts"].split(",")
        assert len(set(shown)) == len(shown)
        assert all(TRUTH[fact[:2]] == fact[2] and len(fact) == 3 for fact in shown)
        assert {fact[:2] for fact in shown} == set(exits_of(question, gold))
        unlearned = [fact for fact in shown if fact[:2] in BELIEFS]
        assert prompt.hints["fact"] in (unlearned or shown)
