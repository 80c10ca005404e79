import json
import math

import fake_runs
import numpy as np
import pytest

from opd.comparison.config import load_comparison
from opd.comparison.jobs import choose, last_line, reported_jobs, tuning_jobs
from opd.comparison.results import GREEDY, PRIMARY, best_decoding, dev_score, difference, is_untrained, learning_curve, read_run, table


def fabricate(folder, arm, seed=0, tokens=24_000, **overrides):
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"data": {"task": "expr"}, "model": {"path": "models/fake"}, "group": 8}))
    run = folder / f"{arm}-{seed}"
    fake_runs.fabricate(run, str(recipe), {"paper": arm, "seed": seed, **overrides}, tokens=tokens)
    return read_run(run, arm=arm, seed=seed)


def test_a_run_folder_is_read_to_the_last_problem(tmp_path):
    run = fabricate(tmp_path, "opd")
    assert run.finished and run.recipe["group"] == 8 and run.facts["packages"] == {"torch": "2.13.0"}
    assert run.costs == {"tokens/student": 24_000, "tokens/teacher": 24_000, "tokens/learner": 24_000, "seconds/total": pytest.approx(10.08)}
    assert [point.step for point in run.curve][:3] == [0, 2, 4]
    assert (run.curve[1].generated_tokens, run.curve[1].scored_tokens) == (2_000, 4_000)
    final = run.finals[PRIMARY]
    assert np.mean(list(final.by_problem["avg@k"].values())) == pytest.approx(final.row["avg@k"])
    assert np.mean(list(final.by_problem["pass@k"].values())) == pytest.approx(final.row["pass@k"])
    assert np.mean(list(final.by_problem["maj@k"].values())) == pytest.approx(final.row["maj@k"])


def test_a_folder_that_is_not_there_is_a_run_that_never_started(tmp_path):
    run = read_run(tmp_path / "nothing", arm="opd", seed=3)
    assert (run.state, run.finished, run.curve, run.finals) == ("missing", False, (), {})


def test_evaluations_without_a_line_of_metrics_are_left_out():
    dev = [{"step": step, "decoding": PRIMARY, "avg@k": 0.1 * step} for step in (0, 2, 4)]
    curve = learning_curve(dev, [{"step": 2, "tokens/student": 50.0, "tokens/teacher": 20.0, "tokens/learner": 30.0, "seconds/total": 1.0}])
    assert [(point.step, point.generated_tokens, point.scored_tokens) for point in curve] == [(0, 0.0, 0.0), (2, 50.0, 50.0)]


def test_differences_pair_seeds_and_problems(tmp_path):
    ours, theirs = [fabricate(tmp_path, "opd", seed) for seed in (0, 1, 2)], [fabricate(tmp_path, "grpo", seed) for seed in (1, 2, 3)]
    found = difference(ours, theirs, PRIMARY)
    assert found.shape == (2, 128)
    problem = sorted(ours[1].finals[PRIMARY].by_problem["avg@k"])[5]
    cells = [run.finals[PRIMARY].by_problem["avg@k"][problem] for run in (ours[1], theirs[0])]
    assert found[0, 5] == cells[0] - cells[1]
    assert np.array_equal(difference(theirs, ours, PRIMARY), -found)
    assert difference(ours[:1], theirs[2:], PRIMARY) is None
    assert difference(ours, [], PRIMARY) is None


def test_the_untrained_model_stands_in_for_every_seed(tmp_path):
    base, ours = [fabricate(tmp_path, "base", tokens=0)], [fabricate(tmp_path, "opd", seed) for seed in (3, 4)]
    assert is_untrained(base) and not is_untrained(ours[:1])
    found = difference(ours, base, GREEDY)
    mine = table(ours, GREEDY, "avg@k")
    assert found.shape == (2, 128)
    assert np.array_equal(mine[0] - found[0], mine[1] - found[1])


def test_best_decoding_is_chosen_on_dev(tmp_path):
    base = fabricate(tmp_path, "base", tokens=0, **{"eval.temperatures": [1.0, 0.5, 0.0]})
    assert set(base.dev) == {PRIMARY, "temperature 0.5", GREEDY}
    object.__setattr__(base, "dev", {PRIMARY: 0.3, "temperature 0.5": 0.6, GREEDY: 0.5})
    assert best_decoding(base) == "temperature 0.5"


def test_dev_scores(tmp_path):
    run = fabricate(tmp_path, "opsd_live", tokens=100_000)
    accuracies = [point.accuracy for point in run.curve]
    assert dev_score(run, "best") == max(accuracies[1:]) and dev_score(run, "final") == accuracies[-1]
    tokens = [point.generated_tokens for point in run.curve]
    assert dev_score(run, "area") == pytest.approx(np.trapezoid(accuracies, tokens) / tokens[-1])
    object.__setattr__(run, "state", "failed")
    assert dev_score(run, "best") == -math.inf


def test_the_search_chooses_on_dev_and_counts_its_cost(tmp_path):
    comparison = load_comparison(str(fake_runs.comparison_yaml(tmp_path / "in", ["base", "grpo", "opd"], tokens=20_000)))
    jobs = tuning_jobs(comparison, tmp_path)
    assert len(jobs) == 8 and {job.arm for job in jobs} == {"grpo", "opd"} and {job.seed for job in jobs} == {1000}
    for job in jobs:
        fake_runs.fake_train(job.recipe, job.overrides, job.folder)
    tuned = choose(comparison, jobs)
    scores = {trial.point["optimizer.lr"]: trial.score for trial in tuned["opd"].trials}
    assert tuned["opd"].point == {"optimizer.lr": max(scores, key=scores.__getitem__)}
    assert (tuned["opd"].runs, tuned["opd"].generated_tokens, tuned["opd"].scored_tokens) == (4, 80_000, 160_000)
    assert not any(read_run(job.folder).finals for job in jobs)
    chosen = reported_jobs(comparison, tmp_path, {arm: found.point for arm, found in tuned.items()})
    assert [(job.arm, job.seed) for job in chosen[:4]] == [("base", 0), ("grpo", 0), ("opd", 0), ("grpo", 1)]
    assert {job.overrides["optimizer.lr"] for job in chosen if job.arm == "opd"} == {tuned["opd"].point["optimizer.lr"]}


def test_a_failed_search_leaves_the_recipe_as_it_is_and_an_edge_is_named(tmp_path):
    comparison = load_comparison(str(fake_runs.comparison_yaml(tmp_path / "in", ["grpo", "opd"], tokens=20_000)))
    jobs = [job for job in tuning_jobs(comparison, tmp_path)]
    for job in jobs:
        if job.arm == "opd" and job.point["optimizer.lr"] == 1e-4:
            fake_runs.fake_train(job.recipe, job.overrides, job.folder)
    tuned = choose(comparison, jobs)
    assert tuned["grpo"].point == {} and tuned["grpo"].at_edge == ()
    assert tuned["opd"].point == {"optimizer.lr": 1e-4} and tuned["opd"].at_edge == ("optimizer.lr",)


def test_last_line_of_a_file_that_is_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_line(path) == {}
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_line(path) == {"step": 2}
    assert last_line(path, tail=4) == {}
