import itertools
import json
import math
import random
import statistics

import pytest
import torch
from opd_rollout.types import Completion

from opd.accuracy import clustered_stderr, interval, majority_vote, pass_at, powers, smallest_difference, summarise, write_evaluation
from opd.eval import Codec, EvalSettings, evaluate
from opd.types import Prompt, Verdict


class ScriptedEngine:
    """Answers from a table: prompt ids -> the token ids of its samples in turn."""

    def __init__(self, answers, finish="stop"):
        self.answers, self.finish, self.seen = answers, finish, []

    def generate(self, requests, sampling):
        self.seen.append((requests, sampling))
        turns = {ids: itertools.cycle(answers) for ids, answers in self.answers.items()}
        return [
            Completion(
                token_ids=(ids := next(turns[request.prompt_ids])),
                logprobs=torch.zeros(len(ids)),
                loss_mask=torch.ones(len(ids), dtype=torch.bool),
                source="student",
                temperature=sampling.temperature,
                finish=self.finish,
                versions=((0, 0, len(ids)),),
            )
            for request in requests
        ]


def prompt(name, answer):
    return Prompt(id=name, messages=({"role": "user", "content": name},), answer=answer)


PROMPTS = [prompt("p0", "1"), prompt("p1", "2")]
CODEC = Codec(
    encode=lambda prompt: (int(prompt.id[1:]),),
    decode=lambda ids: "".join(map(str, ids)),
    answer=lambda prompt, text: text[-1:],
)
SETTINGS = EvalSettings(suite="digits", split="test", samples=4, temperature=1.0, max_tokens=8, stop_ids=(9,), seed=3)
ENGINE_ANSWERS = {(0,): [(1,), (1,), (5, 1), (2,)], (1,): [(3,), (3,), (2,), (2,)]}


def verify(prompt, text):
    return Verdict(reward=float(text[-1] == prompt.answer), correct=text[-1] == prompt.answer)


def test_row_by_hand():
    row = evaluate(ScriptedEngine(ENGINE_ANSWERS), PROMPTS, verify, CODEC, SETTINGS, step=7).row
    assert (row["step"], row["suite"], row["split"], row["n_problems"], row["k"]) == (7, "digits", "test", 2, 4)
    assert row["decoding"] == "temperature 1.0"
    assert row["avg@k"] == pytest.approx((0.75 + 0.5) / 2)
    assert row["pass@k"] == 1.0
    assert row["pass_at"] == pytest.approx({"1": 0.625, "2": (1.0 + 5 / 6) / 2, "4": 1.0})
    assert row["maj@k"] == pytest.approx((1.0 + 0.5) / 2)  # p1: "3" and "2" tie
    assert row["stderr"] == pytest.approx(0.25 / math.sqrt(2) / math.sqrt(2))
    assert (row["tokens"], row["length"], row["truncated"], row["unjudged"]) == (9, 9 / 8, 0.0, 0)


def test_greedy_takes_one_answer_and_says_so():
    engine = ScriptedEngine(ENGINE_ANSWERS, finish="length")
    settings = EvalSettings(suite="digits", split="dev", samples=4, temperature=0.0, max_tokens=8, stop_ids=(9,), seed=3)
    row = evaluate(engine, PROMPTS, verify, CODEC, settings).row
    assert (row["decoding"], row["k"], row["avg@k"], row["truncated"]) == ("greedy", 1, 0.5, 1.0)
    requests, sampling = engine.seen[0]
    assert len(requests) == 2 and sampling.temperature == 0 and sampling.stop_ids == (9,)


def test_answers_of_a_prompt_are_adjacent_and_every_seed_differs():
    engine = ScriptedEngine(ENGINE_ANSWERS)
    evaluate(engine, PROMPTS, verify, CODEC, SETTINGS)
    requests = engine.seen[0][0]
    assert [request.prompt_ids for request in requests] == [(0,)] * 4 + [(1,)] * 4
    assert len({request.seed for request in requests}) == 8


def test_a_crashing_verifier_leaves_the_denominators():
    def crashes_on_five(prompt, text):
        if text.startswith("5"):
            raise RuntimeError("boom")
        return verify(prompt, text)

    result = evaluate(ScriptedEngine(ENGINE_ANSWERS), PROMPTS, crashes_on_five, CODEC, SETTINGS)
    assert result.row["unjudged"] == 1
    assert result.row["avg@k"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert result.row["pass@k"] == 1.0  # p0 has three judged answers only: pass@4 rests on p1
    broken = next(line for line in result.generations if line["status"] == "error")
    assert broken["feedback"] == "RuntimeError: boom" and broken["correct"] is False


def test_files_are_written_and_named_by_the_row(tmp_path):
    result = evaluate(ScriptedEngine(ENGINE_ANSWERS), PROMPTS, verify, CODEC, SETTINGS, step=20)
    write_evaluation(tmp_path, result)
    row = json.loads((tmp_path / "eval.jsonl").read_text())
    assert row["generations"] == "generations/digits-test-temperature-1.0-step-000020.jsonl"
    lines = [json.loads(line) for line in (tmp_path / row["generations"]).read_text().splitlines()]
    assert len(lines) == 8 and lines[2]["text"] == "51" and lines[2]["correct"] is True and lines[2]["sample"] == 2


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "no problems"),
        ([PROMPTS[0], PROMPTS[0]], {}, "ids repeat"),
    ],
)
def test_bad_input_is_refused(prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(ScriptedEngine({}), prompts, verify, CODEC, SETTINGS)


def test_pass_at_equals_enumeration():
    for n, correct, k in [(5, 2, 3), (4, 0, 2), (4, 4, 2), (6, 1, 6), (16, 3, 4)]:
        answers = [True] * correct + [False] * (n - correct)
        draws = [any(draw) for draw in itertools.combinations(answers, k)]
        assert pass_at(n, correct, k) == pytest.approx(statistics.fmean(draws))
    with pytest.raises(ValueError, match="at least 3"):
        pass_at(2, 1, 3)


def test_majority_ties_split_and_empty_answers_do_not_vote():
    assert majority_vote(["a", "a", "b"], [True, True, False]) == 1.0
    assert majority_vote(["a", "b", "c"], [True, False, False]) == pytest.approx(1 / 3)
    assert majority_vote(["", "", "a"], [False, False, True]) == 1.0
    assert majority_vote(["", ""], [False, False]) == 0.0
    assert majority_vote(["a", "a", "b"], [True, False, False]) == 0.5  # same answer, one with wrong steps


def test_clustered_stderr_ignores_repeats_of_a_problem():
    assert clustered_stderr([0.0, 1.0, 1.0, 0.0]) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert clustered_stderr([0.4]) == 0.0
    lines = [
        {"problem": str(p), "status": "score", "correct": p < 2, "answer": "a", "length": 1, "finish": "stop"} for p in range(4) for _ in range(8)
    ]
    assert summarise(lines, 8)["stderr"] == pytest.approx(math.sqrt(1 / 3) / 2)


def test_powers():
    assert powers(1) == [1]
    assert powers(4) == [1, 2, 4]
    assert powers(12) == [1, 2, 4, 8, 12]


def test_interval_by_hand_and_within_its_bounds():
    low, high = interval([0.0] * 30)  # z = 2.0452 (29 degrees of freedom): 0 to z^2 / (30 + z^2)
    assert low == 0.0 and high == pytest.approx(2.04523**2 / (30 + 2.04523**2), abs=1e-4)
    assert interval([1.0] * 30) == pytest.approx([1 - high, 1.0])
    assert interval([0.5]) == [0.0, 1.0] == interval([])
    narrow, wide = interval([0.4, 0.6] * 50), interval([0.0, 1.0] * 50)
    assert narrow[1] - narrow[0] < 0.25 * (wide[1] - wide[0]) and sum(narrow) == pytest.approx(1.0)


@pytest.mark.parametrize(("hardness", "k"), [((0.0, 0.05, 0.1), 4), ((0.1, 0.5, 0.9), 4), ((0.02, 0.3, 1.0), 1), ((0.9, 1.0, 1.0), 8)])
def test_intervals_hold_the_truth_as_often_as_they_say(hardness, k):
    """Problems drawn from three kinds, 30 an exam, 2,000 exams."""
    rng, held = random.Random(1), 0
    truth = statistics.fmean(hardness)
    for _ in range(2000):
        values = [statistics.fmean(rng.random() < p for _ in range(k)) for p in rng.choices(hardness, k=30)]
        low, high = interval(values)
        held += low <= truth <= high
    assert 0.93 <= held / 2000 <= 0.995


def test_smallest_difference_by_hand_and_by_simulation():
    answers = [[True, True, False, False]] * 50 + [[True] * 4] * 50  # means 0.5 and 1: variance 0.0631, noise 0.5 * 0.25 / 3
    best, worst = smallest_difference(answers)
    assert best == pytest.approx(2.8016 * math.sqrt(2 * 0.5 * 0.25 / 3 / 100), rel=1e-3)
    assert worst == pytest.approx(2.8016 * math.sqrt(2 * 0.0625 * 100 / 99 / 100), rel=1e-3)
    assert smallest_difference([[False]] * 30)[1] > 0.1  # thirty failures show no small difference
    assert smallest_difference([[True]]) == [1.0, 1.0]
    best, worst = smallest_difference([[False, False]] * 4)  # nobody disagrees with himself: one answer in ten is still within reason
    assert best == pytest.approx(2.8016 * math.sqrt(2 * 0.1 * 0.9 / 2 / 4), rel=1e-3) and best < worst
    rng, seen, p, k = random.Random(2), 0, 0.4, 8
    best, _ = smallest_difference([[rng.random() < p for _ in range(k)] for _ in range(100)])
    for _ in range(1000):  # two models equal on every problem but for `best`: a paired test sees it in 80 % of exams
        gaps = [(sum(rng.random() < p + best for _ in range(k)) - sum(rng.random() < p for _ in range(k))) / k for _ in range(100)]
        seen += abs(statistics.fmean(gaps)) > 1.984 * statistics.stdev(gaps) / 10
    assert 0.70 <= seen / 1000 <= 0.90
