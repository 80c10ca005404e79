"""Runs by name: bare names, comparisons, stages, names that are none; and what a status says of a process that is gone."""

import json
import os
import platform
import subprocess
import sys

import pytest

from opd.cli import main
from opd.overview import overview
from opd.run.folder import status_content
from opd.run.named import find_bundle, find_run, is_gone


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Run folders: tour, tour-grpo; study with stages sft and rl; demo, a comparison of grpo (two seeds) and opsd (one, and a search)."""
    names = ["tour", "tour-grpo", "study/sft", "study/rl"]
    names += [f"demo/runs/{run}" for run in ("grpo/seed-0-00000000", "grpo/seed-1-11111111", "opsd/seed-0-22222222")]
    for name in [*names, "demo/tune/opsd/lr-1-seed-9-33333333"]:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "resolved.json").write_text("{}")
        (folder / "status.json").write_text(json.dumps(status_content("finished", "all 9 steps done", step=9, steps=9, phase="end", facts={})))
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "note.txt").write_text("")
    (tmp_path / "runs/tour-grpo/bundles").mkdir()
    for step in (1, 2):
        (tmp_path / f"runs/tour-grpo/bundles/step-{step:06d}.safetensors").write_text("")
    (tmp_path / "runs/study/rl/bundles").mkdir()
    (tmp_path / "runs/study/rl/bundles/step-000007.safetensors").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("tour", "tour"), ("runs/tour", "tour"), ("tour/", "tour"), ("study/rl", "study/rl"), ("demo/opsd", "demo/runs/opsd/seed-0-22222222"),
        ("runs/demo/grpo/seed-1", "demo/runs/grpo/seed-1-11111111"), ("demo/runs/grpo/seed-0-00000000", "demo/runs/grpo/seed-0-00000000"),
    ],
)  # fmt: skip
def test_a_name_under_runs_is_a_run(runs, name, folder):
    assert find_run(name).resolve() == runs / folder
    assert find_run(runs / folder) == runs / folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("toru", r"neither toru nor runs/toru exists \(did you mean runs/tour"),
        ("runs/rll", r"runs/rll does not exist \(did you mean runs/study/rl\?\)"),
        ("zzzzzzz", r"neither zzzzzzz nor runs/zzzzzzz exists; `opd show` lists the runs here"),
        ("study", "runs/study holds several runs: name one of runs/study/rl, runs/study/sft"),
        ("demo", r"runs/demo is a comparison of grpo \(2 runs\), opsd \(1 run\): name one of its runs, e.g. runs/demo/runs/grpo/seed-0-00000000"),
        ("demo/grpo", "holds several runs: name one of runs/demo/runs/grpo/seed-0-00000000, runs/demo/runs/grpo/seed-1-11111111"),
        ("models/base", "models/base is no run folder"),
        ("note.txt", "note.txt is a file"),
    ],
)
def test_what_is_no_run_is_answered_with_the_runs_that_may_be_meant(runs, name, said):
    with pytest.raises(ValueError, match=said):
        find_run(name)


@pytest.mark.parametrize("command", ["inspect", "eval", "ledger", "doctor", "bundle", "publish", "replay", "simulate", "diff"])
def test_every_command_that_reads_runs_takes_names_and_answers_in_one_sentence(runs, command, capfd):
    more = ["step=1"] if command == "bundle" else ["tour"] if command == "diff" else []
    for name in ("demo", "study", "tuor"):
        assert main([command, name, *more]) == 2
        said = capfd.readouterr().err
        expected = {"demo": "runs/demo/runs/grpo/seed-0-00000000", "study": "runs/study/rl", "tuor": "(did you mean runs/tour"}[name]
        assert said.count("\n") == 1 and expected in said


def test_a_bundle_by_its_run(runs):
    assert find_bundle("study/rl").name == "step-000007.safetensors"
    with pytest.raises(ValueError, match="runs/tour-grpo has several: name one of runs/tour-grpo/bundles/step-000001.safetensors, "):
        find_bundle("tour-grpo")
    with pytest.raises(ValueError, match="runs/tour holds no bundle yet: opd bundle runs/tour step=N makes one"):
        find_bundle("tour")


def test_a_process_that_is_gone_is_told_from_one_that_lives():
    child = subprocess.Popen([sys.executable, "-c", "import json, opd.run.named as n; print(json.dumps(n.process_facts()), flush=True); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    status = {"state": "running", **json.loads(child.stdout.readline())}
    assert status["pid"] == child.pid and not is_gone(status)
    assert is_gone({**status, "pid_started": status["pid_started"] - 1})  # the number belongs to another process now
    assert not is_gone({**status, "host": "elsewhere", "pid": 2**22 + 1}) and not is_gone({**status, "state": "finished", "pid": 2**22 + 1})
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked yet
    assert is_gone(status)
    child.wait()
    assert is_gone(status) and is_gone({"state": "running", "pid": child.pid})  # as older statuses are


def test_the_run_that_is_named_as_an_example_of_a_comparison_has_steps_to_look_at(runs):
    """The untrained arm of a comparison has examinations alone: neither inspect nor bundle could show anything of it."""
    (runs / "demo/runs/base/seed-0-44444444").mkdir(parents=True)
    (runs / "demo/runs/base/seed-0-44444444/resolved.json").write_text("{}")
    (runs / "demo/runs/opsd/seed-0-22222222/metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"base \(1 run\), grpo \(2 runs\), opsd \(1 run\): name one of its runs, e.g. runs/demo/runs/opsd/seed-0"):
        find_run("demo")


def test_show_tells_runs_that_died_and_gives_names_that_commands_take(runs):
    status = status_content("running", "", step=4, steps=1_000_000, phase="learn", facts={})
    (runs / "tour/status.json").write_text(json.dumps({**status, "pid": 2**22 + 1}))
    (runs / "tour-grpo/status.json").write_text(json.dumps({**status, "steps": 9}))
    (runs / "study/rl/status.json").write_text(json.dumps({**status, "host": f"not-{platform.node()}"}))
    (runs / "demo/runs/grpo/seed-1-11111111/status.json").write_text(json.dumps({**status, "state": "failed", "why": "broken"}))
    shown = [" ".join(line.split()) for line in overview().partition("Run folders")[2].splitlines()[1:]]
    assert shown == [
        "demo comparison, 3 runs finished; opd compare with the same words goes on; its runs: runs/demo/runs/ARM/",
        "demo/runs/grpo/seed-1-11111111 failed at step 4 broken",
        f"study/rl running on not-{platform.node()}, last heard of {status['updated']} at step 4",
        "study/sft finished at step 9/9 all 9 steps done",
        "tour stopped without a word at step 4; the same command resumes it",
        "tour-grpo running at step 4/9",
    ]
    (runs / "demo/report.html").write_text("")
    assert "demo comparison, 3 runs finished; report: runs/demo/report.html" in " ".join(overview().split())
