"""Public suites: records written by hand after the data sets' pages, published settings, exams on local files, interrupted evaluations."""

import base64
import json
import pickle
import zlib
from pathlib import Path

import pytest

from opd.accuracy import final_results, summarise
from opd.build.problems import load_problems
from opd.cli import main
from opd.config.load import load_recipe
from opd.data import programs
from opd.data.published import FAMILIES, PLAIN, find_published, published_for
from opd.data.suites import SUITES, find_suite, suite_record
from opd.examination import run as examination
from opd.examination.exams import suite_exam
from opd.examination.options import SuiteOptions, parse_options
from opd.run.ending import summary
from opd.types import Prompt
from opd.verify import judge, read_answer

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "models/expr-base")


def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


STDIN = {"input": "3 4\n", "output": "7\n", "testtype": "stdin"}
ARENA = {"problem_idx": 7, "problem": "What is $1+2$?", "answer": "3", "problem_type": ["Algebra"]}
RECORDS = {  # suite -> (a record of the data set's shape, the answer, an answer text that is right, one that is wrong)
    "aime24": ({"id": 60, "problem": "q", "solution": "s", "answer": "204", "url": "u", "year": "2024"}, "204", "so \\boxed{204}.", "\\boxed{205}"),
    "aime25": (ARENA | {"answer": 70}, "70", "\\boxed{70}", "\\boxed{7}"),
    "aime26": (ARENA | {"answer": 277}, "277", "\\boxed{277}", "27"),
    "hmmt25": (ARENA | {"answer": "\\frac{1}{576}"}, "\\frac{1}{576}", "\\boxed{1/576}", "\\boxed{\\frac{1}{577}}"),
    "math500": (
        {"problem": "q", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "subject": "Precalculus", "level": 2, "unique_id": "test/807.json"},
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        "\\boxed{(3, \\pi/2)}",
        "\\boxed{(3, \\pi)}",
    ),
    "amc23": ({"id": 0, "question": "q", "answer": 27.0, "url": "u"}, "27", "\\boxed{27}", "\\boxed{2.7}"),
    "gsm8k": ({"question": "q", "answer": "48/2=<<48/2=24>>24\n#### 24"}, "24", "\\boxed{24}", "\\boxed{42}"),
    "gpqa_diamond": (
        {
            "Record ID": "rec1", "Question": "Which?", "Correct Answer": "right", "Incorrect Answer 1": "w1", "Incorrect Answer 2": "w2",
            "Incorrect Answer 3": "w3", "Subdomain": "x",
        },
        "D",
        "\\boxed{D}",
        "\\boxed{A}",
    ),
    "mmlu_pro": (
        {"question_id": 70, "question": "q", "options": list("abcdefghij"), "answer": "I", "answer_index": 8, "category": "business", "src": "s"},
        "I",
        "The answer is (I).",
        "I think the answer is (B).",
    ),
    "livecodebench": (
        {
            "question_title": "t", "question_content": "Add two numbers.", "platform": "atcoder", "question_id": "abc301_a", "contest_id": "c",
            "starter_code": "", "difficulty": "easy", "public_test_cases": json.dumps([STDIN]),
            "private_test_cases": packed([STDIN | {"input": "1 1\n", "output": "2\n"}]), "metadata": "{}",
        },
        None,
        "```python\nprint(sum(map(int, input().split())))\n```",
        "```python\nprint(7)\n```",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SUITES))
def test_a_record_of_every_suite_becomes_a_gradable_problem(name, tmp_path):
    record, answer, right, wrong = RECORDS[name]
    file = tmp_path / "exam.jsonl"
    file.write_text(json.dumps(record) + "\n")
    exam = suite_exam(name, SuiteOptions(names=(name,), path=str(file)), "some-model", {})
    [prompt] = exam.prompts
    assert answer is None or prompt.answer == answer
    assert judge(exam.verify, prompt, right).correct and judge(exam.verify, prompt, wrong).status == "score"
    assert not judge(exam.verify, prompt, wrong).correct
    said = prompt.messages[-1]["content"]
    assert ("boxed{}" in said) == (name != "livecodebench") and "1 problems, where the public suite has" in exam.notes[0]


def test_a_question_that_a_suite_asks_twice_counts_twice(tmp_path):
    file = tmp_path / "exam.jsonl"
    file.write_text(2 * (json.dumps(RECORDS["mmlu_pro"][0]) + "\n"))
    exam = suite_exam("mmlu_pro", SuiteOptions(names=("mmlu_pro",), path=str(file)), "m", {})
    first, again = [prompt.id for prompt in exam.prompts]
    assert again == f"{first}-2" and exam.prompts[0].messages == exam.prompts[1].messages
    file.write_text(2 * (json.dumps(RECORDS["aime25"][0]) + "\n"))
    with pytest.raises(ValueError, match="this record has the id of line 1"):
        suite_exam("aime25", SuiteOptions(names=("aime25",), path=str(file)), "m", {})


def test_choices_are_shuffled_by_the_question_alone_and_named_by_letter():
    record = RECORDS["gpqa_diamond"][0]
    letters = set()
    for number in range(40):
        shown = suite_record(find_suite("gpqa_diamond"), record | {"Question": f"Which of {number}?"})
        line = next(line for line in shown["question"].splitlines() if line.endswith(". right"))
        assert line[0] == shown["answer"]
        letters.add(line[0])
    assert letters == set("ABCD")
    assert suite_record(find_suite("gpqa_diamond"), record)["answer"] == "D"


def test_a_file_in_our_own_columns_serves_every_suite(tmp_path):
    file = tmp_path / "exam.jsonl"
    file.write_text(json.dumps({"question": "A or B?\nA. x\nB. y", "answer": "B"}) + "\n")
    for name in ("aime25", "gpqa_diamond", "math500"):
        exam = suite_exam(name, SuiteOptions(names=(name,), path=str(file)), "m", {}) if name != "aime25" else None
        assert exam is None or exam.prompts[0].answer == "B"
    file.write_text(json.dumps({"text": "q", "gold": "B"}) + "\n")
    with pytest.raises(ValueError, match="exam.jsonl:1: not a problem of this suite .*it has text, gold.*expected the columns of https"):
        suite_exam("aime25", SuiteOptions(names=("aime25",), path=str(file)), "m", {})


def test_livecodebench_tests_are_read_without_unpickling():
    record = RECORDS["livecodebench"][0]
    assert json.loads(programs.tests_of_record(record)) == {"inputs": ["3 4\n", "1 1\n"], "outputs": ["7\n", "2\n"]}
    call = {"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}
    functional = record | {"public_test_cases": json.dumps([call]), "private_test_cases": "[]", "metadata": '{"func_name": "total"}'}
    assert json.loads(programs.tests_of_record(functional)) == {"inputs": [[[1, 2], 3]], "outputs": [6], "fn_name": "total"}

    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    evil = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(ValueError, match="pickle of more than a text .*not read"):
        programs.tests_of_record(record | {"private_test_cases": evil})
    with pytest.raises(ValueError, match="cannot be read"):
        programs.tests_of_record(record | {"private_test_cases": "%%%"})
    with pytest.raises(ValueError, match="known: stdin, or functional with a name"):
        programs.tests_of_record(functional | {"metadata": "{}"})


@pytest.mark.parametrize(
    ("model", "thinking", "expected"),
    [
        ("Qwen3-8B", None, (0.6, 0.95, 20, 38912)),
        ("Qwen3-8B", False, (0.7, 0.8, 20, 32768)),
        ("Qwen3-4B-Thinking-2507", None, (0.6, 0.95, 20, 81920)),
        ("Qwen3-30B-A3B-Instruct-2507", None, (0.7, 0.8, 20, 16384)),
        ("DeepSeek-R1-Distill-Qwen-7B", None, (0.6, 0.95, 0, 32768)),
        ("Llama-3.2-3B-Instruct", None, (0.6, 0.9, 0, 8192)),
        ("gemma-3-4b-it", None, (1.0, 0.95, 64, 8192)),
        ("Qwen3-8B-Base", None, (1.0, 1.0, 0, 32768)),
        ("my-model", None, (1.0, 1.0, 0, 32768)),
    ],
)
def test_published_settings_go_by_the_model(model, thinking, expected):
    found = published_for(model, thinking, {})
    assert (found.temperature, found.top_p, found.top_k, found.max_tokens) == expected


def test_a_generation_config_that_samples_speaks_for_an_unknown_model():
    found = published_for("my-model", None, {"do_sample": True, "temperature": 0.3, "top_p": 0.5, "top_k": 9})
    assert (found.temperature, found.top_p, found.top_k, found.source) == (0.3, 0.5, 9, "the model's generation_config.json")
    assert published_for("my-model", None, {"temperature": 0.3}) == PLAIN
    assert find_published("deepseek-r1").temperature == 0.6 and all(each.source for each in FAMILIES)
    with pytest.raises(ValueError, match="did you mean 'qwen3'"):
        find_published("qwen")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "aime24", "suite.sampels": 3}, "unknown key 'sampels' .did you mean 'samples'"),
        ({"suite.samples": 3}, "needs a suite: add suite=NAME"),
        ({"suite": ["aime24", "aime25"], "suite.path": "x"}, "one at a time"),
        ({"suite": "aime24", "data.task": "expr"}, "two sources of problems"),
        ({"suite": "aime24", "split": "dev"}, "for a suite write suite.split"),
        ({"split": "tests"}, "write split=train, dev or test"),
        ({"suite": "aime24", "suite.temperature": -1}, "suite: temperature"),
    ],
)
def test_what_is_typed_wrong_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_options(changes)


def test_settings_of_a_suite_can_be_changed_and_say_so(tmp_path):
    file = tmp_path / "e.jsonl"
    file.write_text(json.dumps(RECORDS["aime24"][0]) + "\n")
    exam = suite_exam("aime24", SuiteOptions(names=("aime24",), path=str(file), temperature=0.9, samples=5, problems=1), "Qwen3-8B", {})
    [decoding] = exam.decodings
    assert (decoding.temperature, decoding.top_p, decoding.samples) == (0.9, 0.95, 5)
    assert "changed here: temperature" in decoding.published.source and "the first 1 of 30 problems" in exam.notes[0]
    with pytest.raises(ValueError, match="greedy answers are all the same"):
        suite_exam("aime24", SuiteOptions(names=("aime24",), path=str(file), temperature=0, samples=5), "m", {})


@pytest.fixture
def exam_file(tmp_path):
    file = tmp_path / "exam.jsonl"
    file.write_text("".join(json.dumps({"question": f"{n}+1", "answer": str(n + 1)}) + "\n" for n in range(6)))
    return str(file)


def test_opd_eval_on_a_local_suite_with_a_real_model(exam_file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["eval", MODEL, "suite=gsm8k", f"suite.path={exam_file}", "suite.samples=2", "suite.max_tokens=8"]
    assert main(words) == 0 and main(words) == 0
    said = capfd.readouterr()
    assert said.out.count("gsm8k test, temperature 1.0: avg@2 ") == 2 and "100.0 % cut at max_tokens" in said.out
    assert "6 problems x 2 answers of at most 8 tokens" in said.err and "not comparable with published numbers" in said.err
    folder = tmp_path / "runs/eval-expr-base"
    [row] = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]  # the second call replaced the first's
    assert row["truncated"] == 1.0 and row["n_problems"] == 6 and len((folder / row["generations"]).read_text().splitlines()) == 12
    assert main([*words, "suite.max_tokens=600"]) == 2 and "the model has 512 positions" in capfd.readouterr().err
    assert main(["eval", MODEL, "suite=aime24"]) == 2
    said = capfd.readouterr().err
    assert "'HuggingFaceH4/aime_2024' is no file here" in said and "suite.path=FILE.jsonl" in said


def test_an_interrupted_evaluation_goes_on_with_the_same_result(exam_file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(examination, "BLOCK", 4)  # two problems a block
    options = {"suite": "gsm8k", "suite.path": exam_file, "suite.samples": 2, "suite.max_tokens": 8}
    whole = examination.evaluate(MODEL, options | {"out": "whole"})
    judged, calls = examination.judged_answers, []

    def interrupted(engine, prompts, *rest):
        calls.append([prompt.id for prompt in prompts])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judged(engine, prompts, *rest)

    monkeypatch.setattr(examination, "judged_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        examination.evaluate(MODEL, options | {"out": "cut"})
    again = examination.evaluate(MODEL, options | {"out": "cut"})
    assert [len(call) for call in calls] == [2, 2, 2, 2] and calls[1] == calls[2]
    same = ("avg@k", "pass@k", "tokens", "n_problems", "interval")
    assert [{key: row[key] for key in same} for row in again] == [{key: row[key] for key in same} for row in whole]
    read = [(tmp_path / where / again[0]["generations"]).read_text() for where in ("whole", "cut")]
    assert read[0] == read[1] and not list((tmp_path / "cut").glob(".*partial*"))
    assert "2 of 6 problems were answered before" in capfd.readouterr().err


def test_the_training_problems_can_be_examined_for_a_pass_rate(exam_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"data.path": exam_file, "split": "train", "eval.num_problems": 0, "eval.final_problems": 0, "eval.temperatures": [1.0]}
    [row] = examination.evaluate(MODEL, changes | {"eval.final_samples": 2, "sampling.max_tokens": 8})
    assert (row["split"], row["n_problems"], row["k"]) == ("train", 6, 2)


def test_a_gold_answer_that_the_verifier_refuses_is_left_out_listed_and_counted(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    lines = [{"question": f"{n}+1", "answer": "((((" if n == 3 else None if n == 7 else str(n + 1)} for n in range(30)]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["eval", MODEL, "suite=gsm8k", "suite.path=exam.jsonl", "suite.samples=1", "suite.max_tokens=2"]
    assert main(words) == 0
    said = capfd.readouterr()
    assert "gsm8k: 2 of 30 problems are left out" in said.err and "(28 problems, 2 left out: gold answer refused)" in said.out
    assert "exam.jsonl:4: the gold answer '(((('" in said.err and "exam.jsonl:8: the record has no answer" in said.err
    [row] = [json.loads(line) for line in (tmp_path / "runs/eval-expr-base/eval.jsonl").read_text().splitlines()]
    assert (row["n_problems"], row["left_out"]) == (28, 2)

    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(line | {"answer": "(((("} if n < 2 else line) + "\n" for n, line in enumerate(lines)))
    assert main([*words, "out=none"]) == 2 and not (tmp_path / "none").exists()
    said = capfd.readouterr().err
    assert "4 of 30 problems have no gold answer" in said and all(f"exam.jsonl:{n}: " in said for n in (1, 2, 4, 8))


def test_votes_under_a_choice_are_letters():
    prompt = Prompt(id="p", messages=(), answer="B")
    assert read_answer({"choice": {"letters": "ABCD"}})(prompt, "2 reasons, so the answer is (B). I checked 7 times") == "B"
    assert read_answer("code")(prompt, "```python\n1\n```") == "" and read_answer("math")(prompt, "\\boxed{1/2}") == "1/2"


def test_training_prompts_of_a_suite_are_found_by_its_name(tmp_path, monkeypatch):
    question = "Find the number of ordered pairs of positive integers whose product is exactly one hundred and forty four please"
    exam = [("aime:1", {"problem_idx": 1, "problem": question, "answer": 3})]
    monkeypatch.setattr("opd.data.suites.read_records", lambda path, **where: iter(exam))
    file = tmp_path / "train.jsonl"
    records = [{"question": question.upper(), "answer": "3"}, *({"question": f"{n} + {n}", "answer": str(2 * n)} for n in range(9))]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {"data.path": str(file), "data.decontaminate": {"against": ["aime25"]}, "eval.num_problems": 0, "eval.final_problems": 0}
    with pytest.raises(ValueError, match="against: 'aime52' is no suite, preset, file or hub name .did you mean 'aime2"):
        load_problems(load_recipe("sft", changes | {"data.decontaminate": {"against": ["aime52"]}}), None)
    problems = load_problems(load_recipe("sft", changes), None)
    assert len(problems.train) == 9 and any("1 of 10 prompts share 13 words in a row with aime25" in note for note in problems.notes)


def test_answers_that_nobody_judged_are_no_accuracy_of_zero(tmp_path):
    row = summarise([{"problem": "p", "status": "abstain", "length": 1, "finish": "stop", "correct": False, "answer": ""}] * 3, 3)
    row |= {"suite": "own", "split": "test", "decoding": "greedy", "step": 1}
    assert examination.result_line(row) == "own test, greedy: none of 3 answers was judged (the verifier abstained or failed)"
    (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n")
    assert "accuracy on test: no answer judged greedy" in summary(tmp_path)
    unknown = ("avg@k", "pass@k", "maj@k", "stderr", "pass@k_stderr", "maj@k_stderr")
    assert [json.loads((tmp_path / "eval.jsonl").read_text())[name] for name in unknown] == [None] * 6
    assert row["pass_at"] == {"1": None, "2": None, "3": None}
    assert final_results([row]) == {}


def test_pass_at_k_of_problems_with_fewer_judged_answers_is_not_known_rather_than_zero():
    line = {"problem": "p", "status": "score", "length": 1, "finish": "stop", "correct": True, "answer": "1"}
    row = summarise([line, line, line | {"status": "error", "correct": False}, line | {"status": "abstain"}], 4)
    assert (row["avg@k"], row["maj@k"], row["unjudged"], row["pass@k"]) == (1.0, 1.0, 2, None)
    assert row["pass_at"] == {"1": 1.0, "2": 1.0, "4": None}
    assert "pass@4 not known (no problem has 4 judged answers)" in examination.result_line(row | {"suite": "own", "split": "test", "decoding": "t"})
