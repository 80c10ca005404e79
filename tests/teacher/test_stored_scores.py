"""Scores of a fixed teacher in a file: the same training without a teacher, what may not be stored, and what is said when scores are missing."""

import json
import sqlite3
from itertools import islice
from pathlib import Path

import pytest
import torch

from opd.api import train
from opd.build import pretrained, student, system
from opd.build.spending import num_devices
from opd.cli import main
from opd.config.load import load_recipe
from opd.preflight.report import examine
from opd.run.folder import read_lines
from opd.scoring import score
from opd.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
TEACHER = str(ROOT / "models/expr-teacher")
CHANGES = {
    "teacher": {"external": {"path": TEACHER}}, "model.path": str(ROOT / "models/expr-base"), "data.path": "kd.jsonl", "data.verifier": "exact",
    "sampling.max_tokens": 40, "rollout.prompts": 4, "rollout.source": {"dataset": "solution"}, "group": 1, "steps": 3, "learner.kind": "torch",
    "objective": [{"distill": "forward_kl", "support": {"teacher_topk": {"k": 8}}}], "eval.num_problems": 0, "eval.final_problems": 0,
}  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = TASKS["expr"]
    lines = [
        {"prompt": [dict(message) for message in prompt.messages], "answer": prompt.answer, "solution": prompt.hints["solution"]}
        for prompt in islice(task.prompts("train", 0, task.difficulties[0]), 24)
    ]
    unique = {json.dumps(line["prompt"]): json.dumps(line) for line in lines}
    (tmp_path / "kd.jsonl").write_text("\n".join(unique.values()) + "\n")
    return len(unique)


def trained(name, **changes):
    return train("opd_full", {**CHANGES, **changes, "name": name, "track.wandb": "disabled"}, quiet=True)


def rows(folder):
    return list(read_lines(folder / "metrics.jsonl"))


def test_training_on_stored_scores_equals_training_with_the_teacher_and_loads_none(workplace, monkeypatch, capfd):
    said = score("opd_full", {**CHANGES, "out": "s.sqlite"})
    assert f"signal main: {workplace} answers scored, {workplace} stored; 8 compared with the live teacher" in said
    assert "signals.main.scores=s.sqlite" in said
    again = score("opd_full", {**CHANGES, "out": "s.sqlite"})
    assert f"signal main: 0 answers scored, {workplace} stored" in again
    live = trained("live")
    loaded, load_model = [], pretrained.load_model
    monkeypatch.setattr(pretrained, "load_model", lambda path, **options: loaded.append(Path(path).name) or load_model(path, **options))
    monkeypatch.setattr(system, "external_model", lambda *a: pytest.fail("the teacher was loaded"))
    stored = trained("stored", **{"signals.main.scores": "s.sqlite"})
    assert loaded == ["expr-base"]
    for mine, theirs in zip(rows(stored), rows(live), strict=True):
        read, before = theirs["tokens/teacher"], 0 if theirs["step"] == 1 else rows(live)[theirs["step"] - 2]["tokens/teacher"]
        assert (mine["tokens/teacher"], mine["tokens/teacher_read"]) == (0, read - before) and "tokens/teacher_read" not in theirs
        assert mine["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-5) and mine["loss/total"] > 0.01
    ours, other = (student.pretrained.load_model(str(folder / "model")) for folder in (stored, live))
    for a, b in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_a_frozen_self_teacher_under_a_view_can_be_stored(workplace):
    changes = {**CHANGES, "teacher": "frozen", "view": "solution"}
    score("opd_full", {**changes, "out": "s.sqlite", "problems": 5, "check": 5})
    with pytest.raises(ValueError, match=r"s.sqlite lacks the scores of \d of 4 answers: run opd score"):
        trained("few", **{"teacher": "frozen", "view": "solution", "signals.main.scores": "s.sqlite"})
    score("opd_full", {**changes, "out": "s.sqlite"})
    assert len(rows(trained("all", **{"teacher": "frozen", "view": "solution", "signals.main.scores": "s.sqlite"}))) == 3


def test_a_mixture_takes_the_data_s_scores_from_the_file_and_the_rest_from_the_teacher(workplace):
    mixed = {"rollout.source": {"mixed": {"student": 0.5, "dataset": "solution"}}, "steps": 2}
    score("opd_full", {**CHANGES, **mixed, "out": "s.sqlite"})
    folder = trained("mixed", **mixed, **{"signals.main.scores": "s.sqlite"})
    for mine, theirs in zip(rows(folder), rows(trained("plain", **mixed)), strict=True):
        assert mine["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-5)


def test_scores_that_are_not_the_teacher_s_are_found_out(workplace):
    score("opd_full", {**CHANGES, "out": "s.sqlite"})
    with sqlite3.connect("s.sqlite") as db:  # scores of one answer under the key of another
        content = db.execute("SELECT content FROM scores LIMIT 1").fetchone()[0]
        db.execute("UPDATE scores SET content = ?", (content,))
    with pytest.raises(ValueError, match="differ from the live teacher's by .* nats.*Remove s.sqlite and score again"):
        score("opd_full", {**CHANGES, "out": "s.sqlite"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "live"}, "its weights move .live.; use a frozen or an external teacher"),
        ({"objective": [{"distill": "forward_kl", "support": "full"}]}, "support full reads hidden states"),
        ({"objective": [{"distill": "forward_kl", "support": {"student_topk": {"k": 4}}}]}, "ids, which change with every step"),
        ({"signals.main.scores": "none.sqlite"}, "none.sqlite does not exist: write it with opd score"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_what_can(workplace, changes, message):
    with pytest.raises(ValueError, match=message):
        trained("x", **({"signals.main.scores": "kd.jsonl"} | changes))


def test_what_cannot_be_scored_is_refused(workplace, capfd):
    cases = [
        (["score", "opd_expr"], "are not known before it"),
        (["score", "grpo_expr"], "has no teacher: nothing to score"),
        (["score", "opd_expr", "problems=many"], "problems is 'many'; it must be a whole number"),
        (["score"], "a name is missing: opd score RECIPE"),
    ]
    for words, message in cases:
        assert main(words) == 2 and message in capfd.readouterr().err, words
    (Path("text.sqlite")).write_text("no database " * 100)
    with pytest.raises(ValueError, match="no file of teacher scores"):
        score("opd_full", {**CHANGES, "out": "text.sqlite"})
    score("opd_full", {**CHANGES, "out": "s.sqlite", "problems": 4})
    with pytest.raises(ValueError, match="it holds scores of: expr-teacher .*temperature 1; this run's teacher is .*temperature 0.7"):
        trained("t", **{"signals.main.scores": "s.sqlite", "sampling.temperature": 0.7})


def test_a_served_teacher_whose_scores_are_on_file_is_neither_started_nor_planned(workplace, monkeypatch):
    """With engine: vllm beside path: no Ray, no actor, no device, no memory."""
    score("opd_full", {**CHANGES, "out": "s.sqlite"})
    served = {"teacher": {"external": {"path": TEACHER, "engine": "vllm"}}, "signals.main.scores": "s.sqlite"}
    recipe = load_recipe("opd_full", {**CHANGES, **served})
    with system.actors_of(recipe) as actors:
        assert actors is None
    assert num_devices(recipe) == 1 and num_devices(load_recipe("opd_full", {**CHANGES, "teacher": served["teacher"]})) == 2
    found, plan = examine(recipe, "h100")
    assert plan.apart == {} and "teacher main" not in plan.memory and plan.seconds["teacher"] == 0, found
    monkeypatch.setattr(system, "find_spec", lambda name: None if name in ("ray", "vllm") else True)
    assert rows(trained("served", **served))[-1]["tokens/teacher"] == 0
