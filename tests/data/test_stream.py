"""data.stream: the same prompts whatever interrupts them, bounded in memory, filters as records come, and what a stream cannot do."""

import json
from collections import Counter
from itertools import count

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from opd.build import problems as building
from opd.build.problems import check_fits_memory, load_problems
from opd.config.load import parse_recipe
from opd.data import tables
from opd.data.records import read_records
from opd.data.stream import LazyStream
from opd.prompts import content_id, judged_record
from opd.run.folder import read_lines
from tests.run.forked import SHAPE, Fault, opd_process, recipe_file


def record(n, **more):
    return {"question": f"What is {n} + {n}?", "answer": str(2 * n), "solution": f"{n} + {n} = {2 * n}", **more}


def write(folder, records, name="data.jsonl"):
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
    elif name.endswith(".csv"):
        path.write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in records))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def stream_of(path, *, buffer=5, seed=0, repair=(), first=0):
    def judge(place, found):
        return judged_record(found, {}, "", place, {}, None)

    return LazyStream(lambda n: read_records(str(path), start=n, lazy=True), judge, buffer=buffer, seed=seed, repair=frozenset(repair), first=first)


def number(n):
    """The id of record n."""
    return content_id([{"role": "user", "content": record(n)["question"]}])


def ids(prompts):
    return [prompt.id for prompt in prompts]


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "data.csv"])
def test_every_record_once_a_pass_and_a_resume_at_any_point_gives_the_same(tmp_path, name):
    path = write(tmp_path, [record(n) for n in range(23)], name)
    whole = ids(stream_of(path).take(60))
    first, second = whole[:23], whole[23:46]
    assert sorted(first) == sorted(second) and len(set(first)) == 23 and first != second
    assert first != [number(n) for n in range(23)], "the buffer shuffles"
    for cut in (0, 1, 7, 22, 23, 24, 41, 46, 59):
        interrupted = stream_of(path)
        before = ids(interrupted.take(cut))
        state = json.loads(json.dumps(interrupted.state()))
        again = stream_of(path)
        again.load_state(state)
        assert again.state() == state
        assert before + ids(again.take(60 - cut)) == whole, f"cut after {cut}"


def test_the_seed_and_the_pass_decide_the_order(tmp_path):
    path = write(tmp_path, [record(n) for n in range(40)])
    assert ids(stream_of(path, seed=1).take(40)) != ids(stream_of(path).take(40))
    assert ids(stream_of(path, buffer=1).take(40)) == [number(n) for n in range(40)], "a buffer of one keeps the file's order"


def test_a_draw_is_uniform_over_the_buffer(tmp_path):
    path = write(tmp_path, [record(n) for n in range(4)])
    first = Counter(stream_of(path, buffer=4, seed=seed).take(1)[0].id for seed in range(4000))
    assert len(first) == 4 and all(abs(n - 1000) < 4 * 27.4 for n in first.values())  # standard deviation of one count: 27.4


def test_no_more_is_read_or_kept_than_the_buffer_needs():
    """Endless data: it would never end otherwise."""
    seen = []

    def read(start):
        for n in count(start):
            seen.append(n)
            yield f"endless:{n + 1}", record(n)

    stream = LazyStream(read, lambda place, found: judged_record(found, {}, "", place, {}, None), buffer=8, seed=0, repair=frozenset())
    for taken in (1, 50):
        stream.take(taken)
    assert len(seen) == 50 + 8 and len(stream.state()["buffer"]) == 7


def test_filters_count_as_records_come(tmp_path):
    records = [record(n) for n in range(12)]
    records[3], records[5] = {"question": "no answer"}, {"answer": "1"}
    path = write(tmp_path, records)
    stream = stream_of(path, repair={"incomplete"}, buffer=3)
    stream.only("odd", lambda prompt: int(prompt.answer) % 4 == 0)
    taken = stream.take(6)
    assert sorted(int(p.answer) for p in taken) == [0, 4, 8, 12, 16, 20]
    assert {name: meter.mean for name, meter in stream.meters().items()} == {"data/left_out/incomplete": 2, "data/left_out/odd": 4, "data/passes": 0}
    stream.take(1)
    assert stream.meters()["data/passes"].mean == 1
    with pytest.raises(ValueError, match=r"data.jsonl:4: the record has no answer"):
        stream_of(path).take(1)


def test_a_file_that_became_shorter_is_noticed(tmp_path):
    path = write(tmp_path, [record(n) for n in range(20)])
    stream = stream_of(path)
    stream.take(9)
    state = stream.state()
    write(tmp_path, [record(n) for n in range(6)])
    with pytest.raises(ValueError, match=r"fewer records than when the checkpoint was written \(6 of 13\)"):
        stream_of(path).load_state(state)


def data_recipe(path, **data):
    return parse_recipe({"data": {"path": str(path), "stream": True, **data}, "eval": {"num_problems": 2, "final_problems": 2}, "method": "opsd"})


def test_problems_of_a_stream(tmp_path):
    path = write(tmp_path, [record(n) for n in range(300)])
    found = load_problems(data_recipe(path, buffer=4), None)
    assert (ids(found.dev), ids(found.test)) == ([number(0), number(1)], [number(2), number(3)])
    assert len(found.train) == 256 and sorted(ids(found.stream.take(296))) == sorted(number(n) for n in range(4, 300))
    assert "the next prompt is one of 4" in found.notes[0] and "duplicates are not looked for" in found.notes[0]
    assert "the first 4 records of the data are held out" in found.notes[1]


def test_exams_and_pass_rates_filter_a_stream(tmp_path):
    path = write(tmp_path, [record(n) for n in range(30)])
    exam = write(tmp_path, [record(9), record(11)], "exam.jsonl")
    rates = tmp_path / "rates.jsonl"
    lines = [{"problem": number(n), "status": "score", "correct": n % 2 == 0} for n in range(30)]
    rates.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = data_recipe(
        path, eval_path=str(exam), decontaminate={"against": [str(exam)], "ngram": 4}, pass_rate={"file": str(rates), "low": 0.0, "high": 0.5}
    )
    found = load_problems(recipe, None)
    assert set(ids(found.stream.take(13))) == {number(n) for n in set(range(1, 30, 2)) - {9, 11}}
    left = {name: meter.mean for name, meter in found.stream.meters().items()}
    assert (left["data/left_out/contaminated"], left["data/left_out/pass_rate"]) == (2, 15)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"repair": ["duplicate"]}, "data.repair=[duplicate] compares every record with all before it, which a stream does not keep"),
        ({"path": "x.json"}, "is one JSON value, which is read whole: convert it to JSONL"),
        ({"path": "", "task": "expr"}, "an embedded task is made as it is read; leave data.stream out"),
        ({"path": "short.jsonl"}, "holds no record to train on after the 4 that are held out: lower eval.num_problems"),
        ({"path": "bad.jsonl"}, "bad.jsonl:6: malformed JSON"),
        ({"path": "none.jsonl"}, "none.jsonl does not exist"),
    ],
)
def test_what_a_stream_cannot_do_is_said_at_load(tmp_path, monkeypatch, data, sentence):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [record(n) for n in range(9)])
    write(tmp_path, [record(n) for n in range(4)], "short.jsonl")
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(record(n)) + "\n" for n in range(5)) + "{oops\n")
    with pytest.raises(ValueError, match=".") as caught:
        load_problems(data_recipe(**{"path": "data.jsonl", **data}), None)
    assert sentence in str(caught.value)


def test_a_file_larger_than_memory_is_not_read_whole(tmp_path, monkeypatch):
    path = write(tmp_path, [record(n) for n in range(30)])
    with pytest.raises(ValueError, match=r"would be read whole into 0.0 GiB of memory: data.stream=true reads it"):
        check_fits_memory(str(path), path.stat().st_size)
    check_fits_memory(str(path), 2 * path.stat().st_size)
    monkeypatch.setattr(building, "machine_memory", lambda: 10)
    assert load_problems(data_recipe(path), None) and load_problems(data_recipe(path, stream=False, limit=20), None)
    with pytest.raises(ValueError, match=r"data.stream=true"):
        load_problems(data_recipe(path, stream=False), None)


@pytest.mark.slow
def test_a_killed_run_ends_bitwise_as_if_it_had_not_been(tmp_path):
    """A bad record and a long one on the way, several passes, a filter with refills; killed in the middle of a pass."""
    records = [record(n) for n in range(11)]
    records[6], records[8] = {"question": "?"}, record(8, question="Long " * 80)
    write(tmp_path, records)
    data = {"task": "", "path": "data.jsonl", "stream": True, "buffer": 3, "repair": ["incomplete", "too_long"], "max_prompt_tokens": 60}
    keys = {"method": "opsd", "steps": 9, "data": data, "checkpoint": {"every": 2}, "rollout": {"prompts": 2}}
    recipe = recipe_file(tmp_path, **keys, model={"vocabulary": 300, "shape": SHAPE})
    assert opd_process(tmp_path, "train", recipe, "name=whole")[0] == 0
    status, said = opd_process(tmp_path, "train", recipe, "name=broken", fault=Fault(phase="teacher", visit=6))
    assert status == -9, said
    status, said = opd_process(tmp_path, "train", recipe, "name=broken")
    assert status == 0 and "resumed after step 4" in said and "data: streamed" in said
    files = [read_lines(tmp_path / "runs" / name / "metrics.jsonl") for name in ("whole", "broken")]
    rows = [[{k: v for k, v in row.items() if not k.startswith(("seconds", "rate"))} for row in lines] for lines in files]
    assert rows[0] == rows[1]
    last = rows[0][-1]  # 18 draws of 9 prompts: the second pass is at its end, the third begins with the next draw
    assert (last["data/passes"], last["data/left_out/incomplete"], last["data/left_out/too_long"]) == (1, 2, 2)
    drawn = [[row["prompts"] for row in read_lines(tmp_path / "runs" / name / "ledger.jsonl")] for name in ("whole", "broken")]
    assert drawn[0] == drawn[1] and (tmp_path / "runs/whole/model/model.safetensors").read_bytes() == (
        tmp_path / "runs/broken/model/model.safetensors"
    ).read_bytes()


def test_a_data_set_of_the_hub_is_streamed_from_a_record_on(tmp_path, monkeypatch):
    """The library's own streaming over a local file in the place of the hub; nothing but the rows that are drawn is asked for."""
    path = write(tmp_path, [record(n) for n in range(20)])
    real, asked = datasets.load_dataset, []

    def fake_load(name, subset, *, split, streaming):
        asked.append((name, subset, split, streaming))
        return real("json", data_files=str(path), split="train", streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(tables.datasets, "load_dataset", fake_load)
    places = [place for place, _ in read_records("owner/name", start=17, lazy=True)]
    assert places == ["owner/name/train[17]", "owner/name/train[18]", "owner/name/train[19]"] and asked == [("owner/name", None, "train", True)]
    recipe = data_recipe("owner/name", buffer=4)
    whole = load_problems(recipe, None).stream
    broken = load_problems(recipe, None).stream
    taken = ids(whole.take(40))
    broken.take(11)
    again = load_problems(recipe, None).stream
    again.load_state(json.loads(json.dumps(broken.state())))
    assert ids(again.take(29)) == taken[11:] and all(streaming for *_, streaming in asked)
