"""W&B offline: its own files hold the metrics under our names, a samples table and the config; texts stay out when told so."""

import json
import struct
from signal import SIGKILL

import pytest
from wandb.proto import wandb_internal_pb2

from tests.run.forked import Fault, opd_process, recipe_file

BLOCK = 32768
RECIPE = {
    "method": "opsd",
    "steps": 4,
    "data": {"task": "", "path": "data.jsonl", "system": "You are a walrus.", "verifier": "exact"},
    "model": {"vocabulary": 300, "shape": {"hidden_size": 32, "num_hidden_layers": 1, "head_dim": 16}},
    "eval": {"every": 2, "num_problems": 2, "final_problems": 0},
    "checkpoint": {"every": 2},
}
DATA = "".join(json.dumps({"question": f"zebra {n}?", "answer": f"giraffe {n}", "solution": f"a gnu makes it giraffe {n}"}) + "\n" for n in range(8))
WORDS = ("zebra", "giraffe", "gnu", "walrus")


def records(path):
    """The records of an offline file: LevelDB's log format after a header of 7 bytes, which belong to the first block."""
    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def wandb_runs(folder):
    """Every W&B run of a run folder in order: (id, config, metrics by step, all bytes of its files)."""
    found = []
    for path in sorted((folder / "wandb").glob("*run-*"), key=lambda path: path.stat().st_mtime_ns):
        [file] = path.glob("*.wandb")
        config, history = {}, {}
        for record in records(file):
            if record.HasField("run"):
                assert path.name.endswith(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                history.setdefault(row.get("_step", record.history.step.num), {}).update(row)
        found.append((path.name.rsplit('-', 1)[1], config, history, b"".join(p.read_bytes() for p in path.rglob("*") if p.is_file())))
    return found


@pytest.mark.slow
def test_offline_runs_keep_names_table_config_and_id_over_a_kill(tmp_path):
    (tmp_path / "data.jsonl").write_text(DATA)
    recipe = recipe_file(tmp_path, **RECIPE, track={"wandb": "offline", "samples_every": 2})
    status, said = opd_process(tmp_path, "train", recipe, "name=r", fault=Fault(phase="rollout", visit=4))
    assert status == -SIGKILL, said
    status, said = opd_process(tmp_path, "train", recipe, "name=r")
    assert status == 0 and "resumed after step 2" in said
    first, second = wandb_runs(tmp_path / "runs/r")
    assert first[0] == second[0] != ""
    rows = [json.loads(line) for line in (tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()]
    history = second[2]
    assert {3, 4} <= set(history)
    for row in rows[2:]:
        logged = history[row["step"]]
        for name, value in row.items():
            if isinstance(value, float):
                assert logged[name] == pytest.approx(value), name
    assert "eval/dev" in history[4] and history[4]["samples/_type"] == "table-file"
    [table] = (tmp_path / "runs/r/wandb").glob("offline-run*/files/media/table/samples_4_*.table.json")
    table = json.loads(table.read_text())
    assert table["columns"] == ["prompt", "completion", "reward", "correct", "finish"] and table["data"][0][0].startswith("zebra")
    assert second[1]["optimizer"]["lr"] == 1e-4 and second[1]["data"]["system"] == "You are a walrus."
    for word in ("zebra", "walrus"):
        assert word.encode() in second[3]


@pytest.mark.slow
def test_one_key_keeps_texts_out_and_another_keeps_wandb_out(tmp_path):
    (tmp_path / "data.jsonl").write_text(DATA)
    recipe = recipe_file(tmp_path, **RECIPE, track={"wandb": "offline", "samples_every": 2, "texts": False})
    status, said = opd_process(tmp_path, "train", recipe, "name=r")
    assert status == 0, said
    [(_, config, history, content)] = wandb_runs(tmp_path / "runs/r")
    assert history[4]["loss/total"] > 0 and config["steps"] == 4
    for word in WORDS:
        assert word.encode() not in content, word
    assert "zebra" in (tmp_path / "runs/r/samples/step-000004.jsonl").read_text()  # the run folder keeps everything
    status, said = opd_process(tmp_path, "train", recipe, "name=q", "track.wandb=disabled", "steps=1")
    assert status == 0 and not (tmp_path / "runs/q/wandb").exists()
    imported = (tmp_path / "modules").read_text().split()
    assert "opd.api" in imported and "opd.run.track" not in imported and "wandb" not in imported
