"""Answers ahead of the learner with two ranks: the synchronous loop where nothing may be old, one rank's numbers, and a resume bit by bit."""

import pytest
import yaml
from pytest import approx

from tests.run.launched import TINY, finish, lines, opd, start, status, survivors, wait_for

pytestmark = pytest.mark.slow
STEPS = 12
CHANGES = {
    "engine": {"kind": "process"},
    "steps": STEPS,
    "eval": {"every": 4, "num_problems": 2, "final_problems": 0},
    "checkpoint": {"every": 4},
    "optimizer": {"lr": 1e-3},
}
AHEAD_OF_NOTHING = """
import opd.api
from opd import loop_async


def train(recipe, system, run, clock):
    ahead = opd.api.Ahead(system.source, clock.check, clock.ranks)
    try:
        return loop_async.train(opd.api.replace(system, source=ahead), ahead, run, recipe.steps, loop_async.Asynchrony(max_staleness=0))
    finally:
        ahead.close()


opd.api.train_as_asked = train


def verdict(prompt, text):
    return float(len(text) % 2)
"""
PLAIN = "def verdict(prompt, text):\n    return float(len(text) % 2)\n"


def run(folder, name, *words, **changes):
    (folder / "r.yaml").write_text(yaml.safe_dump({**TINY, **CHANGES, **changes}))
    code, said = opd(folder, "train", "r.yaml", f"name={name}", *words)
    assert code == 0, said
    assert survivors(folder) == []
    return folder / "runs" / name


def rows(folder):
    left_out = ("seconds", "rate/", "staleness/")
    return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in lines(folder / "metrics.jsonl")]


def weights(folder):
    return (folder / "model/model.safetensors").read_bytes()


def test_with_staleness_0_it_is_the_synchronous_loop_bit_for_bit(tmp_path):
    """The loop is put in the place of the other by the verifier's module, which every rank imports."""
    judged = {"data": {"task": "expr", "verifier": {"fn": "judges:verdict"}}}
    (tmp_path / "judges.py").write_text(PLAIN)
    plain = run(tmp_path, "plain", "learner.ranks=2", **judged)
    (tmp_path / "judges.py").write_text(AHEAD_OF_NOTHING)
    ahead = run(tmp_path, "ahead", "learner.ranks=2", **judged)
    assert {row["staleness/mean"] for row in lines(ahead / "metrics.jsonl")} == {0.0}, "the other loop ran"
    assert rows(ahead) == rows(plain) and len(rows(plain)) == STEPS
    assert weights(ahead) == weights(plain)


def test_one_step_ahead_two_ranks_train_as_one_and_resume_bitwise(tmp_path):
    ahead = ["asynchrony.max_staleness=1", "objective.0.weight={engine_ratio: {high: 2.0}}"]
    alone = run(tmp_path, "alone", *ahead)
    two = run(tmp_path, "two", *ahead, "learner.ranks=2")
    for one, both in zip(lines(alone / "metrics.jsonl"), lines(two / "metrics.jsonl"), strict=True):
        assert both["loss/total"] == approx(one["loss/total"], rel=1e-3, abs=1e-6)
        assert both["tokens/student"] == one["tokens/student"] and both["staleness/mean"] == one["staleness/mean"]
    assert [row["staleness/mean"] for row in lines(two / "metrics.jsonl")][1:4] == [1.0, 1.0, 1.0]

    words = ["train", "r.yaml", "name=stopped", *ahead, "learner.ranks=2"]
    process = start(tmp_path, *words)
    wait_for(lambda: len(lines(tmp_path / "runs/stopped/metrics.jsonl")) >= 2)
    process.terminate()
    code, said = finish(process, tmp_path)
    assert code == 0 and status(tmp_path / "runs/stopped")["state"] == "preempted", said
    code, said = opd(tmp_path, *words)
    assert code == 0 and "resumed after step" in said, said
    assert rows(tmp_path / "runs/stopped") == rows(two) and weights(tmp_path / "runs/stopped") == weights(two)
    assert survivors(tmp_path) == []
