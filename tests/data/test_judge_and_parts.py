"""Verifiers made of others: a model as judge, sums of parts, cached verdicts, reward functions as `verifiers` and TRL call them."""

import importlib
import json
import multiprocessing
import sys
import types
from pathlib import Path

import pytest
import torch

from opd.build.judge import open_judge
from opd.build.problems import load_problems
from opd.cli import main
from opd.config.load import load_recipe
from opd.prompts import read_prompts
from opd.types import Prompt, Verdict
from opd.verify import as_verifier, gold_choice, judge, judge_all, make_verifier, reads_of, version_of
from opd.verify.cache import VerdictCache, cached
from opd.verify.judge_model import Reading, conversation, judge_verifier, read_pattern, read_reply

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "models/expr-base")
EXPRESSIONS = ["Q(1+2)+3\n", "Q(2*3)+4\n", "Q6*(5+1)\n"]


def prompt(answer="4", question="2+2?", **more):
    return Prompt(id="p", messages=({"role": "user", "content": question},), answer=answer, **more)


# A model as judge


def reply(text, pattern=r"(?i)verdict:\W*(yes|no|\d+(?:\.\d+)?)", **more):
    return read_reply(text, Reading(pattern=read_pattern(pattern), **more))


def test_a_reply_is_a_verdict_a_number_or_an_abstention():
    assert reply("It is fine.\nVerdict: yes") == Verdict(reward=1.0, correct=True, feedback="It is fine.\nVerdict: yes", parts={"judge": 1.0})
    assert (reply("verdict: yes ... no: **Verdict: No**").reward, reply("Verdict: no").correct) == (0.0, False)
    seven = reply("Verdict: 7", best=10.0, correct_at=0.7)
    assert seven.reward == pytest.approx(0.7) and seven.correct and not reply("Verdict: 6", best=10.0, correct_at=0.7).correct
    assert reply("Verdict: 99", best=10.0).reward == 1.0
    assert reply("I cannot say.").status == "abstain" and "no verdict: 'I cannot say.'" in reply("I cannot say.").feedback
    assert reply("maybe", r"\w+").status == "abstain"  # found, but no word that is known
    assert reply(None).status == "error" and "longer than the judge's context" in reply(None).feedback


def test_the_request_shows_everything_once_and_leaves_braces_of_the_attempt():
    shown = conversation("{question}|{answer}|{solution}|{attempt}", "Be strict.", prompt(hints={"solution": "s"}), "\\boxed{4} {answer}")
    assert shown == ({"role": "system", "content": "Be strict."}, {"role": "user", "content": "2+2?|4|s|\\boxed{4} {answer}"})
    assert len(conversation("{attempt}", "", prompt(), "x")) == 1


def test_a_real_engine_judges_a_batch_in_one_call_as_one_by_one():
    """The judge is the embedded base: asked an expression, it works it out, and its last digit is read as a mark out of six."""
    choice = {"judge": {"model": MODEL, "ask": "{attempt}", "verdict": r"(\d)\s*$", "best": 6.0, "max_tokens": 64}}
    verify = make_verifier(choice, open_judge)
    asked = [(prompt(), text) for text in EXPRESSIONS]
    together = judge_all(verify, asked)
    assert together == [judge(verify, *pair) for pair in asked]
    replies = open_judge(MODEL, "", 64)([({"role": "user", "content": text},) for text in EXPRESSIONS])
    assert [verdict.reward * 6 for verdict in together] == pytest.approx([float(said.strip()[-1]) for said in replies])
    assert len({verdict.reward for verdict in together}) > 1 and {verdict.status for verdict in together} == {"score"}
    wordy = make_verifier({"judge": {"model": MODEL, "ask": "{attempt}", "max_tokens": 64}}, open_judge)
    assert [verdict.status for verdict in judge_all(wordy, asked)] == ["abstain"] * 3  # it has never heard of verdicts
    long = make_verifier({"judge": {"model": MODEL, "ask": "{attempt}", "max_tokens": 500}}, open_judge)
    assert [verdict.status for verdict in judge_all(long, [(prompt(), "1" * 40), asked[0]])] == ["error", "abstain"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "needs model=FOLDER"),
        ({"model": MODEL, "ask": "Is it right?"}, "never shows the answer: write {attempt}"),
        ({"model": MODEL, "verdict": "(a"}, "no regular expression"),
        ({"model": MODEL, "verdict": "(a)(b)"}, "has 2 groups"),
        ({"model": MODEL, "max_tokens": 512}, "the judge has 512 positions"),
        ({"modle": MODEL}, "unknown parameter 'modle' .did you mean 'model'"),
        ({"model": "models/none"}, "no model folder 'models/none'"),
        ({"model": MODEL, "server": "http://127.0.0.1:9/v1"}, "nothing answers at"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_at_once(parameters, message):
    with pytest.raises(ValueError, match=message):
        make_verifier({"judge": parameters}, open_judge)


def test_a_failing_engine_is_an_error_for_every_answer_never_a_zero():
    def broken(conversations):
        raise RuntimeError("gone")

    verify = judge_verifier(broken, "{attempt}", "", Reading(pattern=read_pattern("x")))
    assert [verdict.status for verdict in judge_all(verify, [(prompt(), "a"), (prompt(), "b")])] == ["error", "error"]


# A reward of several parts


def half(prompt, text):
    return 0.5


def picky(prompt, text):
    return None if "?" in text else 3.0


SUM = {
    "sum": {
        "of": {
            "answer": "math",
            "half": {"verifier": {"fn": "opd_test_parts:half"}, "weight": 0.2},
            "picky": {"verifier": {"fn": "opd_test_parts:picky"}, "weight": 0.1, "clip": [0, 1]},
        }
    }
}


@pytest.fixture
def own_functions(monkeypatch):
    module = types.ModuleType("opd_test_parts")
    module.half, module.picky = half, picky
    monkeypatch.setitem(sys.modules, "opd_test_parts", module)


def test_parts_are_clipped_weighed_and_added(own_functions):
    verify = make_verifier(SUM)
    right, wrong = judge_all(verify, [(prompt(), "#### 4"), (prompt(), "#### 5")])
    assert right.reward == pytest.approx(1.0 + 0.2 * 0.5 + 0.1 * 1.0) and right.correct
    assert wrong.reward == pytest.approx(0.2) and not wrong.correct and wrong.feedback == "The final answer 5 is wrong."
    assert dict(right.parts) == {"answer": 1.0, "half": 0.5, "picky": 1.0}
    clipped = make_verifier({"sum": {**SUM["sum"], "clip": [0, 1]}})
    assert judge(clipped, prompt(), "#### 4").reward == 1.0
    other = make_verifier({"sum": {**SUM["sum"], "correct": "half"}})
    assert not judge(other, prompt(), "#### 4").correct


def test_a_part_without_a_verdict_takes_the_whole_with_it(own_functions):
    verdict = judge(make_verifier(SUM), prompt(), "? #### 4")
    assert (verdict.status, verdict.feedback) == ("abstain", "part picky: ")
    broken = make_verifier({"sum": {"of": {"answer": "math", "json": "json"}}})
    assert judge(broken, prompt(answer="x1"), "#### 4").status == "error"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"of": {}}, "sum.of is {}; write"),
        ({"of": {"a": "maths"}}, "unknown name 'maths' .did you mean 'math'"),
        ({"of": {"a": {"verifier": "math", "wieght": 1}}}, "sum.of.a: unknown key 'wieght' .did you mean 'weight'"),
        ({"of": {"a": {"verifier": "math", "weight": "much"}}}, "sum.of.a.weight is 'much'; it must be a number"),
        ({"of": {"a": {"verifier": "math", "clip": [1, 0]}}}, "write .lowest, highest."),
        ({"of": {"a": "math"}, "correct": "b"}, "sum.correct is 'b'.*no part; parts: a"),
        ({"of": {"a": "math"}, "clip": 3}, "sum.clip is 3; it must be a list or null"),
    ],
)
def test_a_sum_that_makes_no_sense_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make_verifier({"sum": given})


def test_every_part_has_a_curve_and_a_judge_may_be_one(own_functions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verifier = {"sum": {"of": {"task": "task", "half": {"verifier": {"fn": "opd_test_parts:half"}, "weight": 0.5}}}}
    from opd.api import train

    small = {"steps": 2, "eval.num_problems": 0, "eval.final_problems": 0, "track.wandb": "disabled", "rollout.prompts": 4, "data.verifier": verifier}
    folder = train(str(ROOT / "recipes/runs/grpo_expr.yaml"), small, tmp_path / "run", quiet=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["reward/half"] == 0.5 and row["reward/mean"] == pytest.approx(row["reward/task"] + 0.25)
        assert row["accuracy/train"] == pytest.approx(row["reward/task"])


# Verdicts given before


def counting(calls):
    def verify(prompt, text):
        calls.append(text)
        if text == "broken":
            raise RuntimeError("no")
        return Verdict(reward=0.25, correct=False, feedback=text, parts={"x": 1.0}, status="abstain" if text == "abstain" else "score")

    return verify


def test_a_cached_verdict_is_given_once_and_errors_are_not_kept(tmp_path):
    calls = []
    cache = VerdictCache(tmp_path / "new/v.sqlite", "v1")
    verify = cached(counting(calls), cache)
    asked = [(prompt(), text) for text in ("a", "b", "a", "broken", "abstain")]
    first = judge_all(verify, asked)
    assert calls == ["a", "b", "broken", "abstain"] and first[0] == first[2]
    again = judge_all(verify, asked)
    assert calls == ["a", "b", "broken", "abstain", "broken"] and again == first and (cache.hits, cache.misses) == (1 + 4, 4 + 1)
    cache.close()
    judge_all(cached(counting(calls), VerdictCache(tmp_path / "new/v.sqlite", "v1")), asked[:2])
    assert len(calls) == 5
    judge_all(cached(counting(calls), VerdictCache(tmp_path / "new/v.sqlite", "v2")), asked[:1])  # another version of the verifier
    judge_all(cached(counting(calls), VerdictCache(tmp_path / "new/v.sqlite", "v1")), [(prompt("5"), "a")])  # another gold answer
    assert calls[5:] == ["a", "a"]
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(ValueError, match="text is no verdict cache"):
        VerdictCache(tmp_path / "text", "v1")


def test_math_answers_share_a_verdict_where_their_final_answers_agree(tmp_path):
    calls, maths = [], make_verifier("math")

    def verify(prompt, text):
        calls.append(text)
        return maths(prompt, text)

    seen = cached(verify, VerdictCache(tmp_path / "v", "v", reads_of("math")))
    texts = ["so #### 4", "thus\n#### 4", "it is 4", "clearly 4", "#### 5"]
    verdicts = judge_all(seen, [(prompt(), text) for text in texts])
    assert verdicts == [maths(prompt(), text) for text in texts] and calls == ["so #### 4", "it is 4", "#### 5"]


def write_many(file, start):
    verify = cached(lambda prompt, text: Verdict(reward=float(text)), VerdictCache(Path(file), "v"))
    for n in range(start, start + 100):
        judge_all(verify, [(prompt(), str(n))])


def test_processes_share_a_cache(tmp_path):
    file = str(tmp_path / "v")
    workers = [multiprocessing.get_context("spawn").Process(target=write_many, args=(file, start)) for start in (0, 50)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    calls = []
    verdicts = judge_all(cached(counting(calls), VerdictCache(Path(file), "v")), [(prompt(), str(n)) for n in range(150)])
    assert not calls and [verdict.reward for verdict in verdicts] == list(map(float, range(150)))


def test_a_version_names_source_and_parameters(own_functions):
    assert version_of("math") != version_of({"math": {"marked": True}})
    one, two = version_of({"fn": "opd_test_parts:half"}), version_of({"fn": "opd_test_parts:picky"})
    assert "return 0.5" in one and one != two and "return 0.5" in version_of(SUM)
    with pytest.raises(ValueError, match="have no version; leave the cache out"):
        version_of("x", eval("lambda prompt, text: 1"))


def test_a_version_changes_with_what_the_function_s_file_holds_beside_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    versions = []
    for name, helper in (("opd_test_one", "1.0"), ("opd_test_two", "0.0")):
        (tmp_path / f"{name}.py").write_text(f"def helper():\n    return {helper}\n\n\ndef reward(prompt, text):\n    return helper()\n")
        versions.append(version_of("x", importlib.import_module(name).reward))
    assert versions[0] != versions[1]


def test_a_recipe_uses_the_cache(tmp_path):
    lines = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"data.path": str(tmp_path / "d.jsonl"), "data.verdict_cache": str(tmp_path / "v.sqlite")}
    changes |= {"eval.num_problems": 0, "eval.final_problems": 0}
    problems = load_problems(load_recipe("grpo", changes), None)
    verdicts = judge_all(problems.verify, [(prompt, f"#### {prompt.answer}") for prompt in problems.train])
    assert all(verdict.correct for verdict in verdicts) and (tmp_path / "v.sqlite").stat().st_size > 0


# Gold answers


def test_every_gold_answer_that_fails_is_listed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    lines = [{"question": f"q{n}", "answer": f"#### {n}" if n % 3 else "#### \\frac{"} for n in range(90)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["check", "gsm8k_tiny", "data.path=d.jsonl"]
    assert main(words) == 2
    said = capfd.readouterr()
    text = said.out + said.err
    assert "30 of 90 records have a gold answer that cannot be graded" in text and "data.repair=[ungradable]" in text
    assert "d.jsonl:1: the gold answer" in text and "d.jsonl:58: the gold answer" in text and "... and 10 more" in text


def test_a_sum_grades_golds_by_its_correct_part():
    assert gold_choice("math") == "math" and gold_choice({"fn": "a:b"}) is None and gold_choice("regex") is None
    assert gold_choice({"choice": {"letters": "AB"}}) == {"choice": {"letters": "AB"}}
    of = {"style": {"fn": "a:b"}, "answer": {"verifier": {"math": {"marked": True}}, "weight": 2}}
    assert gold_choice({"sum": {"of": of, "correct": "answer"}}) == {"math": {"marked": True}} and gold_choice({"sum": {"of": of}}) is None


# Reward functions as other libraries call them


def exact(completion, answer):
    return completion[-1]["content"] == answer


async def awaited(prompt, completion, **kwargs):
    return float(kwargs["info"]["id"] == "p" and kwargs["state"]["answer"] == "4" and prompt[0]["role"] == "user")


def of_state(state, completion=None):
    return len(state["completion"][0]["content"]) / 10


def trl(completions, answer, **kwargs):
    return [float(completion[0]["content"] == gold) for completion, gold in zip(completions, answer, strict=True)]


def test_reward_functions_of_verifiers_and_trl_are_accepted():
    assert as_verifier(exact)(prompt(), "4").correct and not as_verifier(exact)(prompt(), "5").correct
    assert as_verifier(awaited)(prompt(), "x").reward == 1.0
    assert as_verifier(of_state)(prompt(), "abc").reward == pytest.approx(0.3)
    assert as_verifier(trl)(prompt(), "4").correct
    assert as_verifier(lambda prompt, text: torch.tensor(0.5))(prompt(), "4").reward == 0.5


def trl_column(completions, ground_truth, **kwargs):
    return [float(completion[0]["content"] == truth) + 10 * ("other" in kwargs) for completion, truth in zip(completions, ground_truth, strict=True)]


def test_further_columns_of_a_record_are_hints_and_reach_functions_by_name():
    record = {"question": "q", "answer": "4", "ground_truth": 4, "other": [1, "x"], "image": b"1", "none": None}
    [read], _ = read_prompts([("d:1", record)])
    assert read.hints == {"ground_truth": "4", "other": '[1, "x"]'}
    assert as_verifier(trl_column)(read, "4").reward == 11.0
    assert as_verifier(lambda completion, ground_truth, **kwargs: ground_truth == "4")(read, "x").correct
    missing = judge(as_verifier(trl_column), prompt(), "4")
    assert missing.status == "error" and "asks for ground_truth, which prompt 'p' has not" in missing.feedback


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict(reward="1"),  # type: ignore[arg-type]
        Verdict(reward=1.0, parts={"style": float("nan")}),
        Verdict(reward=1.0, parts={"style": "high"}),  # type: ignore[dict-item]
        Verdict(status="wrong", reward=1.0),  # type: ignore[arg-type]
    ],
)
def test_a_verdict_filled_with_what_is_none_is_an_error(verdict):
    assert judge(lambda prompt, text: verdict, prompt(), "x").status == "error"


def test_what_a_reward_function_asks_for_and_does_not_get_is_named():
    with pytest.raises(ValueError, match="asks for parser, which is not there; by name there are prompt, completion"):
        as_verifier(lambda completion, parser: 1.0)
    with pytest.raises(ValueError, match="must accept .prompt, text., or by name completion"):
        as_verifier(lambda text: 1.0)
    assert "one number a completion" in judge(as_verifier(lambda completions: 1.0), prompt(), "x").feedback


def test_a_rubric_is_a_sum_of_its_functions():
    from opd.verify import adapted

    rubric = types.SimpleNamespace(funcs=[exact, of_state], weights=[1.0, 0.1])
    verdict = judge(adapted(rubric), prompt("four"), "four")
    assert verdict.reward == pytest.approx(1.0 + 0.1 * 0.4) and verdict.correct and dict(verdict.parts) == {"exact": 1.0, "of_state": 0.4}
