"""N steps are k steps, a kill and the rest, bitwise: weights, optimizer, EMA, records; killed or asked to stop in every phase of a step."""

import json
import signal
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1

import pytest
import torch

from tests.run.forked import Fault, opd_process, recipe_file

RECIPE = {
    "method": "hybrid",
    "data": {"task": "expr", "verifier": {"fn": "tests.run.forked:coin"}},
    "group": 4,
    "steps": 22,
    "teacher": {"ema": {"rate": 0.3}},
    "optimizer": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 2},
    "eval": {"every": 3, "num_problems": 4, "final_problems": 4, "final_samples": 2},
    "checkpoint": {"every": 2},
    "track": {"wandb": "disabled", "samples_every": 4},
}
SUPPORT = "objective.1.support={student_topk: {k: 5, tail: bucket}}"
CHAIN = [  # every process goes on from the newest checkpoint; visits are counted from there
    Fault(phase="rollout", visit=1),  # before any checkpoint: the run starts anew
    Fault(phase="rollout", visit=4),
    Fault(phase="views", visit=2),
    Fault(phase="prepare", visit=2),
    Fault(phase="teacher", visit=2),
    Fault(phase="join", visit=2),
    Fault(phase="learn", visit=2),
    Fault(phase="checkpoint", visit=1, where="middle"),
    Fault(phase="evaluate", visit=1, number=SIGTERM, where="start"),  # of step 3, which is saved; its evaluation is made up for
    Fault(phase="teacher", visit=2, number=SIGTERM, where="start"),  # the average is in the student's place: it must not be saved as such
    Fault(phase="prepare", visit=1, number=SIGUSR1, where="start"),
    Fault(phase="sync", visit=3),
    Fault(phase="evaluate", visit=2),
    Fault(phase="learn", visit=2, number=SIGINT, where="start"),
    Fault(phase="rollout", visit=2, number=SIGUSR1, where="start"),
    Fault(phase="checkpoint", visit=2, number=SIGKILL),
    Fault(phase="evaluate", visit=2, number=SIGTERM, where="end"),
]


def without_times(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "rate/"))} for row in rows]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b if not hasattr(a, "__dict__") else True


def saved(folder):
    """Everything in the newest checkpoint but times."""
    newest = max((folder / "checkpoints").glob("step-*"))
    state = json.loads((newest / "state.json").read_text())
    state["progress"]["totals"].pop("seconds/total")
    state["progress"].pop("role_seconds")
    state["last"] = {name: value for name, value in state["last"].items() if not name.startswith("seconds/")}
    tensors = {path.name: torch.load(path, weights_only=False) for path in sorted(newest.rglob("*.pt"))}
    return newest.name, state, tensors, (newest / "model/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_killed_and_stopped_in_every_phase_the_run_ends_bitwise_as_if_it_had_not(tmp_path, kind):
    recipe = recipe_file(tmp_path, **RECIPE, learner={"kind": kind})
    assert opd_process(tmp_path, "train", recipe, SUPPORT, "name=whole")[0] == 0
    for fault in CHAIN:
        status, said = opd_process(tmp_path, "train", recipe, SUPPORT, "name=broken", fault=fault)
        expected = {SIGKILL: -signal.SIGKILL, SIGINT: 130}.get(fault.number, 0)
        assert status == expected, f"{fault}: {said}"
        if fault.number != SIGKILL:
            assert json.loads((tmp_path / "runs/broken/status.json").read_text())["state"] == "preempted", fault
            assert "run the same command to go on" in said
    status, said = opd_process(tmp_path, "train", recipe, SUPPORT, "name=broken")
    assert status == 0 and "resumed after step" in said
    whole, broken = tmp_path / "runs/whole", tmp_path / "runs/broken"
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert without_times(broken / name) == without_times(whole / name)
    assert len(without_times(whole / "metrics.jsonl")) == 22
    assert len({row["reward/mean"] for row in without_times(whole / "metrics.jsonl")}) > 3  # the coin fell both ways
    assert same(saved(broken), saved(whole))
    for pattern in ("samples/*", "generations/*", "model/*", "chosen.json"):
        files = sorted(path.relative_to(whole) for path in whole.glob(pattern))
        assert files == sorted(path.relative_to(broken) for path in broken.glob(pattern)) != []
        for file in files:
            assert (whole / file).read_bytes() == (broken / file).read_bytes(), file
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    status, said = opd_process(tmp_path, "train", recipe, SUPPORT, "name=whole")
    assert status == 0 and {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before  # finished: nothing is done


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_a_finished_run_goes_on_to_more_steps_bitwise_as_if_they_had_been_asked_for_at_once(tmp_path, kind):
    recipe = recipe_file(tmp_path, **{**RECIPE, "optimizer": {"lr": 1e-2, "warmup_steps": 2}, "steps": 5}, learner={"kind": kind})
    assert opd_process(tmp_path, "train", recipe, SUPPORT, "name=whole", "steps=5")[0] == 0
    for steps in (3, 5, 5):
        status, said = opd_process(tmp_path, "train", recipe, SUPPORT, "name=grown", f"steps={steps}")
        assert status == 0, said
    assert "is finished: nothing to do" in said
    whole, grown = tmp_path / "runs/whole", tmp_path / "runs/grown"
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert without_times(grown / name) == without_times(whole / name)
    assert same(saved(grown), saved(whole)) and saved(whole)[0] == "step-000005"
    assert (grown / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    record = json.loads((grown / "resolved.json").read_text())
    assert record["recipe"]["steps"] == 5 and record["extended"] == [{"from": 3, "to": 5}]
    status, said = opd_process(tmp_path, "train", recipe, SUPPORT, "name=grown", "steps=4")
    assert status == 2 and "steps: 5 -> 4" in said


def test_a_falling_learning_rate_goes_on_only_where_the_user_says_so(tmp_path):
    recipe = recipe_file(tmp_path, **{**RECIPE, "optimizer": {"schedule": "linear"}, "steps": 2, "eval": {"every": 0}})
    assert opd_process(tmp_path, "train", recipe, SUPPORT, "name=falls")[0] == 0
    status, said = opd_process(tmp_path, "train", recipe, SUPPORT, "name=falls", "steps=4")
    assert status == 2 and said.count("\n") == 1
    assert "optimizer.schedule=linear" in said and "launch.extend=true" in said and "init=runs/falls" in said
    assert opd_process(tmp_path, "train", recipe, SUPPORT, "name=falls", "steps=4", "launch.extend=true")[0] == 0
    rows = without_times(tmp_path / "runs/falls/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[2]["learning_rate"] == pytest.approx(0.4375e-4)  # 4/8 and 3/8 of 1e-4
