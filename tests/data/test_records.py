"""Every kind of source gives the same prompts; every preset reads a record of the form that its page shows; what is left out is counted."""

import csv
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from opd.build.problems import load_problems
from opd.config.recipe import Recipe
from opd.data.presets import PRESETS, find_preset
from opd.data.records import read_records
from opd.data.selection import between, contaminated, pass_rates
from opd.prompts import content_id, read_prompts
from opd.types import Prompt

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {path.stem: yaml.safe_load(path.read_text()).get("data", {}) for path in sorted((ROOT / "recipes/runs").glob("*.yaml"))}
ROWS = [{"question": f"How much is {n}, plus {n}?", "answer": f"It is {2 * n}\n#### {2 * n}", "domain": "sums"} for n in range(12)]


def lay_down(folder, rows=ROWS):
    """The rows in every format, by suffix."""
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "d.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")
    for name, delimiter in (("d.csv", ","), ("d.tsv", "\t")):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return folder


def recipe(path, **data):
    return Recipe(data={"path": str(path), **data}, eval={"num_problems": 0, "final_problems": 0})


def test_every_format_gives_the_same_records(tmp_path):
    lay_down(tmp_path)
    for name in ("d.jsonl", "d.json", "d.parquet", "d.csv", "d.tsv"):
        found = [record for _, record in read_records(str(tmp_path / name))]
        assert found == ROWS, name
        prompts, _ = read_prompts(read_records(str(tmp_path / name), limit=3))
        assert [(p.answer, p.domain) for p in prompts] == [("0", "sums"), ("2", "sums"), ("4", "sums")], name
        assert len({p.id for p in prompts}) == 3, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"nothing", "a.parquet: not a Parquet file"),
        ("a.csv", b"question,answer\nq\n", r"a.csv:2: the row has not the 2 fields of the header"),
        ("a.csv", b"question,answer\n\xff,1\n", "a.csv: not UTF-8"),
        ("a.json", b"[1]", r"a.json\[0\]: expected a JSON object, found int"),
        ("a.json", b"[{]", "a.json:1: malformed JSON"),
        ("a.json", b"3", "a.json: expected a list of objects, found int"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_records(str(tmp_path / name)))


def test_json_lines_under_the_name_of_json(tmp_path):
    (tmp_path / "d.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [record for _, record in read_records(str(tmp_path / "d.json"))] == ROWS


def test_a_hub_name_that_cannot_be_reached_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"'nobody/nothing' is no file here.*data.subset and data.split.*or give a local file"):
        list(read_records("nobody/nothing"))


RECORDS = {  # one record a preset, with the columns that its page shows
    "gsm8k": ({"question": "q", "answer": "so <<1+1=2>>2\n#### 2"}, "2", "so 2\n#### 2"),
    "math": ({"problem": "q", "level": "Level 1", "type": "Algebra", "solution": "thus $\\boxed{\\frac{1}{2}}$"}, "\\frac{1}{2}", "thus"),
    "dapo_math": ({"prompt": "q", "solution": "34", "data_source": "math_dapo", "ability": "MATH"}, "34", None),
    "deepmath": ({"question": "q", "final_answer": "0", "difficulty": 4.5, "topic": "Calculus", "r1_solution_1": "so 0"}, "0", "so 0"),
    "openthoughts_math": ({"problem": "q", "solution": "so \\boxed{7}", "source": "olympiads"}, "7", "so"),
    "sciknoweval": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "", "answerKey": "B", "type": "mcq", "domain": "Biology"},
        "B",
        None,
    ),
    "mmlu_pro": ({"question": "q", "options": ["x", "y"], "answer": "B", "answer_index": 1, "category": "law"}, "B", None),
    "mbpp": (
        {"task_id": 1, "text": "q", "code": "def f(): return 1", "test_list": ["assert f() == 1"], "test_setup_code": ""},
        "assert f() == 1",
        "def f",
    ),
    "taco": (
        {"question": "q", "input_output": '{"inputs": ["1"], "outputs": ["1"]}', "difficulty": "EASY", "starter_code": "def f(x):"},
        '{"inputs"',
        None,
    ),
}
AWKWARD = {  # records that such sets hold beside the ordinary ones: no final answer, no choices, no parsable answer
    "openthoughts_math": {"problem": "prove it", "solution": "QED", "source": "olympiads"},
    "math": {"problem": "draw it", "level": "Level 1", "type": "Geometry", "solution": "a figure"},
    "deepmath": {"question": "odd", "final_answer": "((((", "difficulty": 4.5, "topic": "Calculus", "r1_solution_1": "so"},
    "sciknoweval": {
        "question": "open", "choices": {"text": [], "label": []}, "answer": "long", "answerKey": "", "type": "open-ended-qa", "domain": "Biology"
    },
    "mbpp": {"task_id": 2, "text": "no tests", "code": "pass", "test_list": [], "test_setup_code": ""},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(tmp_path, name):
    record, answer, solution = RECORDS[name]
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    [prompt] = load_problems(recipe(tmp_path / "d.jsonl", preset=name), None).train
    assert prompt.messages[0]["content"].startswith("q")
    assert prompt.answer.startswith(answer)
    assert (solution or "") in prompt.hints.get("solution", "")
    assert ("solution" in prompt.hints) == (solution is not None)
    if name in ("sciknoweval", "mmlu_pro"):
        assert prompt.messages[0]["content"] == "q\nA. x\nB. y"


@pytest.mark.parametrize("shipped", [name for name, data in SHIPPED.items() if data.get("preset") in AWKWARD])
def test_shipped_recipes_leave_out_what_their_data_set_is_known_to_hold_beside(tmp_path, shipped):
    data = SHIPPED[shipped]
    name = data["preset"]
    rows = [RECORDS[name][0], AWKWARD[name], RECORDS[name][0]]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_problems(recipe(tmp_path / "d.jsonl", preset=name, repair=data["repair"]), None)
    assert len(found.train) == 1 and len(found.notes) == 2 and any(note.startswith("1 duplicate records left out") for note in found.notes)


def test_open_questions_without_choices_stay_as_they_are():
    preset = PRESETS["sciknoweval"]
    for none in (None, {"text": [], "label": []}, {"text": None, "label": None}):
        assert preset.record(AWKWARD["sciknoweval"] | {"choices": none})["question"] == "open"


def test_a_program_that_is_called_is_shown_how_it_begins():
    preset, record = PRESETS["taco"], RECORDS["taco"][0]
    assert preset.record(record)["question"] == "q\n\nBegin with this code:\n```python\ndef f(x):\n```"
    assert preset.record(record | {"starter_code": None})["question"].endswith("Read standard input and write standard output.")


def test_a_data_set_whose_script_is_not_run_says_what_to_download(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="'BAAI/TACO' is no file here.*Note: its loading script is not run: hf download BAAI/TACO"):
        load_problems(recipe("", preset="taco"), None)


def test_arrow_files_as_the_datasets_library_writes_them(tmp_path):
    datasets.Dataset.from_list([RECORDS["taco"][0] | {"question": f"q{n}"} for n in range(5)]).save_to_disk(tmp_path / "saved")
    [file] = (tmp_path / "saved").glob("*.arrow")
    assert [record["question"] for _, record in read_records(str(file), start=2)] == ["q2", "q3", "q4"]
    assert len(load_problems(recipe(file, preset="taco"), None).train) == 5
    (tmp_path / "no.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="no.arrow: not an Arrow stream"):
        list(read_records(str(tmp_path / "no.arrow")))


def test_a_preset_that_does_not_fit_and_one_that_does_not_exist(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"q": 1}) + "\n")
    with pytest.raises(ValueError, match="d.jsonl:1: not a record of the preset .*it has q.*data.columns"):
        load_problems(recipe(tmp_path / "d.jsonl", preset="gsm8k"), None)
    with pytest.raises(ValueError, match="no data set 'gsm9k' .did you mean 'gsm8k'"):
        find_preset("gsm9k")


def test_trl_columns_are_known():
    [prompt], _ = read_prompts([("a:1", {"prompt": [{"role": "user", "content": "q"}], "privileged_context": "secret", "answer": "1"})])
    assert (prompt.hints, prompt.answer) == ({"solution": "secret"}, "1")


def test_repair_leaves_out_and_counts(tmp_path):
    rows = [*ROWS, ROWS[3], {"question": "no answer"}, {"question": "odd", "answer": "#### ((("}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first_problem = {"duplicate": "record has no answer", "incomplete": "has the prompt of line 4", "ungradable": "has the prompt of line 4"}
    for kind, message in first_problem.items():
        with pytest.raises(ValueError, match=message):
            load_problems(recipe(tmp_path / "d.jsonl", repair=[kind]), None)
    found = load_problems(recipe(tmp_path / "d.jsonl", repair=["duplicate", "incomplete", "ungradable"]), None)
    assert len(found.train) == 12
    told = [note.partition(" (first: ") for note in found.notes]
    assert [told for told, _, _ in told] == [f"1 {kind} records left out" for kind in ("duplicate", "incomplete", "ungradable")]
    assert "d.jsonl:15: the gold answer '((('" in told[2][2] and "mend" not in told[2][2]


def asked(name, text):
    system = {"role": "system", "content": "Think step by step, all of you, and then say it."}
    return Prompt(id=name, messages=(system, {"role": "user", "content": text}))


def test_contamination_by_hand():
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
    exam = [asked("e1", " ".join(words)), asked("e2", "What is two plus two?"), asked("e3", "What is two plus two times two?")]
    train = [
        asked("same", "Well: " + ", ".join(words[:13]).upper() + "!"),
        asked("twelve", " ".join(words[:12]) + " and another thing"),
        asked("short", "what is TWO, plus two"),
        asked("shorter", "what is two"),
        asked("five words inside", "Here is a question for you to solve with care: what is two plus two?"),
        asked("seven words inside", "Here is a question for you to solve with care: what is two plus two times two?"),
        asked("part of seven", "Here is a question for you to solve with care: what is two plus two times three?"),
        asked("other", "Nothing of the kind stands in any exam that we know of today or will know"),
    ]
    assert contaminated(train, exam) == {"same": "e1", "short": "e2", "seven words inside": "e3"}
    assert contaminated(train, exam, ngram=12) == {"same": "e1", "twelve": "e1", "short": "e2", "seven words inside": "e3"}
    assert contaminated(train, []) == {}


def test_decontamination_in_a_recipe(tmp_path):
    lay_down(tmp_path)
    exam = tmp_path / "exam.jsonl"
    exam.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    found = load_problems(recipe(tmp_path / "d.jsonl", decontaminate={"against": [str(exam)]}), None)
    assert [p.messages[0]["content"] for p in found.train] == [row["question"] for row in ROWS[4:]]
    assert "4 of 12 prompts share 13 words in a row" in found.notes[-1]
    exam.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(ValueError, match="leaves no prompt"):
        load_problems(recipe(tmp_path / "d.jsonl", decontaminate={"against": [str(exam)]}), None)


def test_pass_rates_of_a_generations_file(tmp_path):
    lay_down(tmp_path)
    names = [content_id([{"role": "user", "content": row["question"]}]) for row in ROWS]
    lines = [
        {"problem": names[n], "status": "error" if sample == 3 else "score", "correct": sample < n} for n in range(12) for sample in range(4)
    ]
    path = tmp_path / "generations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [pass_rates(path)[names[n]] for n in range(5)] == [0.0, 1 / 3, 2 / 3, 1.0, 1.0]
    found = load_problems(recipe(tmp_path / "d.jsonl", pass_rate={"file": str(path)}), None)
    assert [p.id for p in found.train] == names[1:3]
    assert found.notes == ("2 of 12 prompts have a pass rate from 0.1 to 0.9",)
    with pytest.raises(ValueError, match="no prompt has a pass rate from 0.4 to 0.5"):
        load_problems(recipe(tmp_path / "d.jsonl", pass_rate={"file": str(path), "low": 0.4, "high": 0.5}), None)
    with pytest.raises(ValueError, match="1 of 1 prompts have no pass rate"):
        between([asked("x", "y")], {}, 0.0, 1.0)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="generations.jsonl:1: not a line of a generations file"):
        pass_rates(path)
