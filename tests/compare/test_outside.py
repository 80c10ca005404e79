import json

import pytest

from opd.comparison.outside import train_sft
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
    assert json.loads((tmp_path / "run" / "status.json").read_text())["why"] == "trained by trl's SFTTrainer"


def test_a_recipe_that_samples_from_the_student_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set rollout.source"):
        train_sft("recipes/runs/grpo_expr.yaml", SMALL, tmp_path / "run")
    assert not (tmp_path / "run").exists()
