import json
from itertools import islice
from pathlib import Path

import pytest

from opd import prompts
from opd.data.records import existing_file, read_records
from opd.prompts import (
    PromptStream,
    check_lengths,
    content_id,
    shuffled_stream,
    split_prompts,
    task_prompts,
    task_stream,
)
from opd.types import Prompt
from opd.verify import make_verifier

SAMPLE = Path(__file__).parent / "gsm8k_like.jsonl"
GSM8K = Path(__file__).resolve().parents[3] / "shared/data/gsm8k"
needs_gsm8k = pytest.mark.skipif(
    not (GSM8K / "train.jsonl").is_file(), reason="GSM8K is not beside this checkout; the made-up sample is tested"
)


def read_prompts(path, **options):
    return prompts.read_prompts(read_records(str(path)), origin=str(path), **options)[0]


def write(tmp_path, *lines, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def numbered(n):
    return [Prompt(id=str(i), messages=({"role": "user", "content": f"q{i}"},), answer=str(i)) for i in range(n)]


def test_made_up_gsm8k_sample():
    prompts = read_prompts(SAMPLE, verify=make_verifier("gsm8k"))
    assert len(prompts) == 16
    assert prompts[1].answer == "1,240"
    assert prompts[1].hints["solution"] == "It carries 4 * 310 = 1240 people a day.\n#### 1,240"
    assert prompts[1].id == content_id(prompts[1].messages) == "q-58735f3e968c"
    assert prompts[1].messages == ({"role": "user", "content": json.loads(SAMPLE.read_text().splitlines()[1])["question"]},)


@needs_gsm8k
@pytest.mark.parametrize(("name", "number"), [("train", 7473), ("test", 1319)])
def test_every_gold_answer_of_gsm8k_is_accepted(name, number):
    prompts = read_prompts(GSM8K / f"{name}.jsonl", verify=make_verifier("gsm8k"))
    assert len(prompts) == number
    assert all("<<" not in p.hints["solution"] and "####" in p.hints["solution"] for p in prompts)


def test_columns_of_every_kind(tmp_path):
    path = write(
        tmp_path,
        {"problem": "p?", "gold": 7, "why": "because", "extra": None, "junk": [1]},
        {"problem": [{"role": "system", "content": "s"}, {"role": "user", "content": "r?"}], "gold": "8", "why": "so", "extra": "x"},
    )
    first, second = read_prompts(
        path, columns={"prompt": "problem", "answer": "gold", "solution": "why", "trick": "extra"}, system="Think."
    )
    assert first.messages == ({"role": "system", "content": "Think."}, {"role": "user", "content": "p?"})
    assert (first.answer, first.hints) == ("7", {"junk": "[1]", "solution": "because"})
    assert second.messages == ({"role": "system", "content": "s"}, {"role": "user", "content": "r?"})
    assert second.hints == {"solution": "so", "trick": "x"}


def test_known_columns_need_no_mapping(tmp_path):
    path = write(
        tmp_path,
        {"id": 5, "prompt": "p", "answer": "1", "demonstration": "d", "facts": "f", "domain": "sums"},
        "",
        {"question": "q", "answer": 2.5},
    )
    first, second = read_prompts(path)
    assert (first.id, first.hints, first.domain) == ("5", {"demonstration": "d", "facts": "f"}, "sums")
    assert (second.id, second.answer, second.domain) == (content_id(second.messages), "2.5", "")


def test_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"question": "q", "answer": "1"}).encode())
    assert read_prompts(path)[0].answer == "1"


GOOD = {"question": "q", "answer": "#### 1"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "data.jsonl is empty: it holds no record"),
        (["", "  "], "is empty"),
        ([GOOD, "{broken"], "data.jsonl:2: malformed JSON"),
        ([GOOD, "", "[1, 2]"], "data.jsonl:3: expected a JSON object, found list"),
        (
            [{"answer": "1", "problem": "p"}],
            r"data.jsonl:1: the record has no prompt or question \(it has answer, problem\); name its column",
        ),
        ([GOOD, {"question": "r", "gold": "1"}], "data.jsonl:2: the record has no answer"),
        ([{"question": "q", "answer": None}], "data.jsonl:1: the record has no answer"),
        ([{"question": "q", "answer": ["1"]}], "data.jsonl:1: answer must be a text or a number, found list"),
        ([{"question": "q", "answer": True}], "answer must be a text or a number, found bool"),
        ([{"question": "q", "answer": "why ####  "}], r"data.jsonl:1: the answer is empty; mend.*data.repair=\[incomplete\]"),
        ([{"question": 5, "answer": "1"}], "data.jsonl:1: the prompt must be a text or a list"),
        ([{"question": " ", "answer": "1"}], "data.jsonl:1: the prompt must end with a non-empty user message"),
        ([{"prompt": [{"role": "user"}], "answer": "1"}], "data.jsonl:1: the prompt must be a text or a list"),
        ([{"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}], "must end with a non-empty user message"),
        ([{"prompt": [], "answer": "1"}], "must end with a non-empty user message"),
        ([GOOD, {"question": "r", "answer": "1"}, GOOD], "data.jsonl:3: this record has the prompt of line 1"),
        ([{**GOOD, "id": "a"}, {"question": "r", "answer": "1", "id": "a"}], "data.jsonl:2: this record has the id of line 1"),
        ([GOOD, {"question": "r", "answer": "(((("}], r"data.jsonl:2: the gold answer '\(\(\(\(' cannot be graded"),
    ],
)
def test_bad_files_name_file_line_and_fix(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path, *lines), verify=make_verifier("math"))


def test_wrong_column_names(tmp_path):
    path = write(tmp_path, {"problem": "p", "gold": "1"})
    with pytest.raises(ValueError, match=r"data.jsonl:1: no column 'problme' \(did you mean 'problem'\?\); the record has problem, gold"):
        read_prompts(path, columns={"prompt": "problme", "answer": "gold"})


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match="data.jsonl:2: not UTF-8"):
        read_prompts(path)


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, GOOD, name="train.jsonl")
    with pytest.raises(ValueError, match=r"trian.jsonl does not exist \(did you mean 'train.jsonl'\?\)"):
        existing_file(tmp_path / "trian.jsonl")
    with pytest.raises(ValueError, match="is a folder; give a file in it: train.jsonl"):
        existing_file(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        existing_file(tmp_path / "no" / "such" / "folder.jsonl")


def test_shuffled_stream_is_seeded_complete_and_endless():
    prompts = numbered(10)
    ids = [p.id for p in shuffled_stream(prompts, 3).take(30)]
    assert [sorted(ids[i : i + 10]) for i in (0, 10, 20)] == [sorted(map(str, range(10)))] * 3
    assert ids[:10] != ids[10:20]
    assert ids == [p.id for p in shuffled_stream(prompts, 3).take(30)]
    assert ids != [p.id for p in shuffled_stream(prompts, 4).take(30)]
    with pytest.raises(ValueError, match="no prompts"):
        shuffled_stream([], 0)


def test_stream_resumes_anywhere_from_plain_values():
    whole = [p.id for p in shuffled_stream(numbered(7), 1).take(40)]
    for cut in (0, 1, 7, 13, 39):
        first = shuffled_stream(numbered(7), 1)
        first.take(cut)
        state = json.loads(json.dumps(first.state()))
        second = shuffled_stream(numbered(7), 1)
        second.take(3)
        second.load_state(state)
        assert [p.id for p in second.take(40 - cut)] == whole[cut:]


def test_split_prompts_is_disjoint_and_ignores_order():
    prompts = numbered(50)
    train, held = split_prompts(prompts, 12)
    assert len(held) == 12
    assert sorted(p.id for p in train + held) == sorted(p.id for p in prompts)
    assert {p.id for p in split_prompts(prompts[::-1], 12)[1]} == {p.id for p in held}
    assert {p.id for p in held} <= {p.id for p in split_prompts(prompts, 20)[1]}
    for number in (0, 50, 51):
        with pytest.raises(ValueError, match=f"cannot hold out {number} of 50"):
            split_prompts(prompts, number)


def test_check_lengths():
    prompts = numbered(12)
    check_lengths(prompts, lambda p: p.messages[0]["content"], 3)
    with pytest.raises(ValueError, match=r"2 of 12 prompts are longer than 2 tokens \(the longest, '11', has 3\)"):
        check_lengths(prompts, lambda p: p.messages[0]["content"], 2)


def test_task_streams():
    for split in ("train", "pretrain_base", "dev"):
        whole = task_stream("expr", split, 5).take(40)
        first = task_stream("expr", split, 5)
        assert first.take(17) == whole[:17]
        resumed = task_stream("expr", split, 5)
        resumed.load_state(first.state())
        assert resumed.take(23) == whole[17:]
    assert task_stream("expr", "train", 6).take(5) != task_stream("expr", "train", 5).take(5)


def test_finite_split_starts_again():
    dev = task_prompts("expr", "dev", 10_000)
    assert len({p.id for p in dev}) == len(dev) >= 512
    again = task_stream("expr", "dev", 0).take(len(dev) + 3)
    assert again == [*dev, *dev[:3]]
    assert task_prompts("expr", "dev", 7, seed=99) == dev[:7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exprs", "train", 0), r"no embedded task 'exprs' \(did you mean 'expr'"),
        (("expr", "train", 0, "eazy"), r"no difficulty 'eazy' \(did you mean 'easy'"),
        (("expr", "validation", 0), "task expr has no split 'validation'"),
    ],
)
def test_unknown_names_of_tasks(arguments, message):
    with pytest.raises(ValueError, match=message):
        task_stream(*arguments)


def test_stream_that_ends_is_our_mistake():
    with pytest.raises(AssertionError, match="ended"):
        PromptStream(lambda: islice(iter(numbered(2)), 2)).take(3)
