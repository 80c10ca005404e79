"""W&B offline: its own files hold the metrics under our names, a samples table and the config; texts stay out when told so."""

import json
from signal import SIGKILL

import pytest
import wandb

from opd.launcher.sweep import marked, marked_processes
from opd.run.offline import read_offline
from opd.run.track import WandbSink
from opd.run.training import TOKEN_COLUMNS, token_rows
from tests.run.forked import Fault, opd_process, recipe_file

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


def wandb_runs(folder):
    """Every W&B run of a run folder in order: (id, config, metrics by step, all bytes of its files)."""
    found = []
    for path in sorted((folder / "wandb").glob("*run-*"), key=lambda path: path.stat().st_mtime_ns):
        [file] = path.glob("*.wandb")
        config, history, run_id = {}, {}, path.name.rsplit("-", 1)[1]
        try:
            run = read_offline(file)
            assert run.run_id == run_id
            config, history = run.config, {row["_step"]: row for row in run.history}
        except ValueError as error:  # killed before W&B wrote its first record
            assert "holds no W&B run" in str(error)
        found.append((run_id, config, history, b"".join(p.read_bytes() for p in path.rglob("*") if p.is_file())))
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


def opened(folder, run_id="", **labels):
    return WandbSink(folder=folder, project="p", mode="offline", config={"seed": 1}, run_id=run_id, texts=True, labels=labels)


def offline_files(folder):
    wandb.teardown()  # its service has then written everything
    return [read_offline(path) for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)]


def test_group_job_type_tags_alerts_summary_and_a_resume_under_one_id(tmp_path):
    first = opened(tmp_path, group="comparison", job_type="grpo", tags=["reported", "seed-1"])
    first.log({"loss/total": 0.5}, 1)
    first.alert("run: dev_fall", "step 1: dev accuracy 0.4, at best 0.8")
    first.finish(failed=True)
    again = opened(tmp_path, run_id=first.run_id, group="comparison", job_type="grpo", tags=["reported", "seed-1"])
    again.log({"loss/total": 0.25}, 2)
    again.summarise({"test/greedy/avg@k": 0.75})
    again.finish(failed=False)
    one, two = offline_files(tmp_path)
    assert one.run_id == two.run_id == first.run_id and one.config["seed"] == 1
    assert {(run.group, run.job_type, run.tags) for run in (one, two)} == {("comparison", "grpo", ("reported", "seed-1"))}
    assert one.alerts == (("run: dev_fall", "step 1: dev accuracy 0.4, at best 0.8"),) and not two.alerts
    assert [(row["_step"], row["loss/total"]) for run in (one, two) for row in run.history] == [(1, 0.5), (2, 0.25)]
    assert two.summary["test/greedy/avg@k"] == 0.75


def test_a_row_a_token_of_the_first_answers():
    record = {
        "prompt_id": "p", "member": 1, "tokens": ["a", "b"], "student_logp": [-1.0, None], "entropy": None, "advantage": {"policy": [0.5, 0.25]},
        "signals": {"main": {"logp": [-0.5, -0.25]}}, "columns": {"loss/total": [0.1, 0.2]},
    }  # fmt: skip
    bare = {**record, "signals": {}, "advantage": {}, "columns": {}, "entropy": [0.1, 0.2]}
    assert len(TOKEN_COLUMNS) == 9
    assert token_rows([record, bare, bare], most=2) == [
        ["p", 1, 0, "a", -1.0, None, 0.5, 0.5, 0.1],
        ["p", 1, 1, "b", None, None, None, 0.25, 0.2],
        ["p", 1, 0, "a", -1.0, 0.1, None, None, None],
        ["p", 1, 1, "b", None, 0.2, None, None, None],
    ]


@pytest.mark.slow
def test_a_comparison_is_one_group_with_an_arm_a_job_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation = {"num_problems": 2, "final_problems": 2, "final_samples": 2}
    recipe = recipe_file(tmp_path, method="rloo", group=2, eval=evaluation, track={"samples_every": 1})
    arms = {name: {"recipe": recipe, "set": {"optimizer.lr": rate}} for name, rate in (("slow", 1e-5), ("fast", 1e-3))}
    comparison = {"name": "c", "arms": arms, "seeds": [0], "budget": {"steps": 1}, "wandb": "offline", "project": "q", "workers": 1}
    (tmp_path / "c.yaml").write_text(json.dumps(comparison))
    status, said = opd_process(tmp_path, "compare", "c.yaml")
    assert status == 0, said
    runs = [read_offline(path) for path in tmp_path.glob("runs/c/runs/*/*/wandb/offline-run-*/*.wandb")]
    assert sorted((run.group, run.job_type, run.tags) for run in runs) == [("c", arm, ("reported", "seed-0")) for arm in ("fast", "slow")]
    for run in runs:
        assert run.history[-1]["tokens/student"] > 0 and 0 <= run.summary["test/temperature 1.0/avg@k"] <= 1
        assert any(name.startswith("tokens/_type") for row in run.history for name in row)
    tables = list(tmp_path.glob("runs/c/runs/*/*/wandb/offline-run-*/files/media/table/tokens_1_*.table.json"))
    assert len(tables) == 2 and json.loads(tables[0].read_text())["columns"] == list(TOKEN_COLUMNS)


def test_wandb_has_ended_before_a_runs_processes_are_swept(tmp_path):
    wandb.teardown()  # of tests before: its process would be nobody's
    with marked_processes() as mark:
        sink = WandbSink(folder=tmp_path, project="q", mode="offline", config={}, run_id="", texts=False, labels={})
        assert marked(mark)
        sink.finish(failed=False)
        assert not marked(mark)  # else it is killed, and the exit of this process says so in thirty lines
