import io
import json
import os
import signal
import threading
import time

import fake_runs
import pytest
from rich.console import Console

from opd.comparison.config import Budget
from opd.comparison.jobs import Job
from opd.comparison.progress import ComparisonView
from opd.comparison.runner import compare, rebuild
from opd.comparison.workers import Functions, Outcome
from opd.errors import Preempted
from opd.run.folder import write_json


def functions(train=fake_runs.fake_train):
    return Functions(train=train, evaluate=fake_runs.fake_evaluate)


def written(root):
    return {path: path.stat().st_mtime_ns for path in root.glob("fake/**/status.json")}


def test_a_comparison_runs_reuses_and_reports_failures(tmp_path, capsys):
    path = fake_runs.comparison_yaml(tmp_path / "in", ["base", "grpo", "opd", "hybrid", "idle"], seeds=(0, 1), tokens=12_000, tune=False)
    page = compare(str(path), functions=functions(fake_runs.failing_train), root=tmp_path, quiet=True)
    html = page.read_text()
    assert "hybrid, seed 1: failed: its process died (exit status 9); see logs/" in html
    assert "idle, seeds 0, 1: failed: RuntimeError: loss is not finite" in html
    record = json.loads((page.parent / "comparison.json").read_text())
    assert [row["state"] for row in record["runs"]].count("finished") == 6
    assert "loss is not finite" in "".join(log.read_text() for log in (page.parent / "logs").glob("*.log"))

    before = written(tmp_path)
    assert len(before) == 6
    assert rebuild(json_comparison(path), root=tmp_path).read_text() == html
    compare(str(path), functions=functions(), root=tmp_path, quiet=False)
    after = written(tmp_path)
    assert {path: after[path] for path in before} == before and len(after) == 9  # only what had failed ran again
    shown = capsys.readouterr()
    assert "[9/9] " in shown.err and "report: " in shown.out and "did not finish" not in page.read_text()


def json_comparison(path):
    from opd.comparison.config import load_comparison

    return load_comparison(str(path))


def test_a_changed_arm_runs_again_and_the_search_comes_first(tmp_path):
    path = fake_runs.comparison_yaml(tmp_path / "in", ["grpo", "opd"], seeds=(0,), tokens=6_000, workers=1)
    tune = {"tune": {"grid": {"optimizer.lr": [1e-4, 3e-4]}}}
    page = compare(str(path), tune, functions=functions(), root=tmp_path, quiet=True)
    record = json.loads((page.parent / "comparison.json").read_text())
    assert [row["tuning"] for row in record["runs"]] == [True] * 4 + [False] * 2
    assert set(record["chosen"]) == {"grpo", "opd"}
    before = written(tmp_path)
    compare(str(path), {**tune, "budget.generated_tokens": 7_000}, functions=functions(), root=tmp_path, quiet=True)
    assert len(written(tmp_path)) == 2 * len(before)


def slow_train(recipe, overrides, folder):
    """Trains until it is told to stop, then says that it was preempted."""
    stopped = []  # a list, not an Event: a handler that sets the Event while its lock is held waits for itself
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "status.json", {"state": "running", "step": 0, "steps": 1, "why": ""})
    deadline = time.monotonic() + 60
    while not stopped and time.monotonic() < deadline:
        time.sleep(0.02)
    write_json(folder / "status.json", {"state": "preempted", "step": 0, "steps": 1, "why": "preempted (SIGTERM)"})
    return folder


def test_an_interruption_stops_the_workers_and_the_same_call_goes_on(tmp_path):
    path = fake_runs.comparison_yaml(tmp_path / "in", ["grpo", "opd"], seeds=(0,), tokens=6_000, tune=False)
    folder = tmp_path / "fake" / "runs"

    def interrupt():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(list(folder.glob("*/*/status.json"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Preempted, match="Ctrl-C"):
        compare(str(path), functions=functions(slow_train), root=tmp_path, quiet=True)
    thread.join()
    assert [json.loads(path.read_text())["state"] for path in folder.glob("*/*/status.json")] == ["preempted"] * 2
    page = compare(str(path), functions=functions(), root=tmp_path, quiet=True)
    assert "did not finish" not in page.read_text()


def test_a_run_past_its_limit_is_ended_and_reported(tmp_path):
    path = fake_runs.comparison_yaml(tmp_path / "in", ["grpo"], seeds=(0,), tokens=6_000, tune=False, workers=1)
    page = compare(str(path), {"limit_seconds": 8.0}, functions=functions(slow_train), root=tmp_path, quiet=True)
    assert "grpo, seed 0: failed: longer than limit_seconds=8: ended" in page.read_text()


def test_an_outside_arm_is_trained_by_its_own_function(tmp_path):
    path = fake_runs.comparison_yaml(tmp_path / "in", ["grpo", "opd"], seeds=(0,), tokens=6_000, tune=False, workers=1)
    raw = json.loads(path.read_text())
    raw["arms"]["opd"]["by"] = "fake_runs:fake_train"
    path.write_text(json.dumps(raw))
    page = compare(str(path), functions=functions(fake_runs.failing_train), root=tmp_path, quiet=True)
    assert "did not finish" not in page.read_text()


def test_lines_of_a_finished_run_are_not_wrapped_where_there_is_no_terminal(tmp_path):
    told = io.StringIO()
    view = ComparisonView("c", 2, console=Console(file=told, width=40))
    for done in range(2):
        job = Job(
            arm="opsd_frozen", seed=done, tuning=False, point={}, recipe="r", overrides={}, folder=tmp_path / "r", by="", budget=Budget(steps=9)
        )
        view.done(Outcome(job=job, state="failed", why="a reason that is longer than the forty columns of this line", seconds=3.0, reused=False))
    first, second = told.getvalue().splitlines()
    assert first.startswith("[1/2] ") and first.endswith("s left") and second.endswith("columns of this line")
