import json
from types import SimpleNamespace

import pytest
import torch

from opd.api import train
from opd.comparison import outside
from opd.comparison.outside import train_grpo, train_sft
from opd.comparison.results import GREEDY, PRIMARY, read_run

SMALL = {"steps": 12, "eval.every": 6, "eval.num_problems": 128, "eval.final_problems": 32, "eval.final_samples": 2}


def test_an_outside_run_is_read_like_any_other_and_learns(tmp_path):
    run = read_run(train_sft("recipes/runs/sft_expr.yaml", {**SMALL, "seed": 3}, tmp_path / "run"), arm="sft")
    assert run.finished and run.seed == 3 and set(run.finals) == {PRIMARY, GREEDY}
    assert [point.step for point in run.curve] == [0, 6, 12]
    assert run.curve[-1].generated_tokens == 0 < run.curve[1].scored_tokens < run.curve[2].scored_tokens
    assert run.curve[-1].accuracy > run.curve[0].accuracy + 0.08
    best = max(run.curve[1:], key=lambda point: point.accuracy)
    assert run.finals[PRIMARY].row["step"] == best.step
    written = (tmp_path / "run" / "eval.jsonl").stat().st_mtime_ns
    train_sft("recipes/runs/sft_expr.yaml", {**SMALL, "seed": 3}, tmp_path / "run")
    assert (tmp_path / "run" / "eval.jsonl").stat().st_mtime_ns == written  # finished: not trained again
    assert json.loads((tmp_path / "run" / "status.json").read_text())["why"] == "trained by TRL's SFTTrainer"


def test_an_evaluation_in_which_nothing_was_judged_is_no_best_one(tmp_path, monkeypatch):
    found = iter([None, 0.25, None, 0.5])
    monkeypatch.setattr(outside.api, "examine", lambda *_: SimpleNamespace(row={"avg@k": next(found)}))
    monkeypatch.setattr(outside, "write_evaluation", lambda *_: None)
    monkeypatch.setattr(outside._Watch, "_speak", lambda *_: None)
    fake_parts = SimpleNamespace(problems=SimpleNamespace(dev=["a problem"]), engine=None)
    fake_recipe = SimpleNamespace(eval=SimpleNamespace(samples=1))
    watch = outside._Watch(folder=tmp_path, recipe=fake_recipe, parts=fake_parts, model=torch.nn.Linear(1, 1), updates=1)
    seen = []
    for step in (1, 2, 3, 4):
        watch.examine_dev(step)
        seen.append(watch.best)
    assert seen == [(-1.0, 0), (0.25, 2), (0.25, 2), (0.5, 4)]


def test_a_recipe_that_samples_from_the_student_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set rollout.source"):
        train_sft("recipes/runs/grpo_expr.yaml", SMALL, tmp_path / "run")
    assert not (tmp_path / "run").exists()


GRPO = {"eval.every": 2, "eval.num_problems": 32, "eval.final_problems": 16, "eval.final_samples": 1, "optimizer.lr": 1e-4, "seed": 3}


def counted(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["tokens/student"], row["tokens/learner"]) for row in rows]


@pytest.mark.slow
def test_trl_grpo_sees_our_prompts_in_our_order_and_stops_at_the_same_budget(tmp_path, monkeypatch):
    """Answers of the embedded task are as long as their problems are deep, so equal token counts at every step mean the same problems."""
    limits = {"steps": 1_000_000, "budget.generated_tokens": 1000}
    theirs = train_grpo("recipes/runs/grpo_expr.yaml", {**GRPO, **limits}, tmp_path / "theirs")
    ours = train("recipes/runs/grpo_expr.yaml", {**GRPO, **limits, "learner.kind": "torch", "track.wandb": "disabled"}, folder=tmp_path / "ours")
    assert counted(theirs) == counted(ours) and counted(ours)[-1][1] >= 1000 > counted(ours)[-2][1]
    run = read_run(theirs, arm="grpo_trl")
    assert run.finished and [point.step for point in run.curve] == [0, 2] and set(run.finals) == {PRIMARY, GREEDY}
    status = json.loads((theirs / "status.json").read_text())
    assert status["why"] == "trained by TRL's GRPOTrainer" and status["step"] == counted(ours)[-1][0]


@pytest.mark.slow
def test_trl_grpo_learns_from_the_recipes_verifier(tmp_path):
    """A verifier that pays for small last digits alone teaches them: nothing else could."""
    own = {"data.verifier": {"fn": f"{__name__}:small_digit"}, "optimizer.lr": 1e-3, "steps": 8, "eval.every": 8}
    folder = train_grpo("recipes/runs/grpo_expr.yaml", {**GRPO, **own}, tmp_path / "run")
    dev = [json.loads(line)["avg@k"] for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert dev[1] > dev[0] + 0.2


def small_digit(prompt, text):
    return float(text[-1:] in tuple("0123"))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"rollout.filter": "mixed_groups"}, "beside the method grpo"),
        ({"method": "rloo"}, "beside the method grpo"),
        ({"steps": 1_000_000, "budget.seconds": 5}, "give the arm as many as it may need, set: {steps: 500}"),
    ],
)
def test_what_trl_grpo_cannot_stand_beside_is_refused(tmp_path, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        train_grpo("recipes/runs/grpo_expr.yaml", {**GRPO, **more}, tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").exists()
