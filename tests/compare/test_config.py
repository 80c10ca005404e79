import json

import fake_runs
import pytest

from opd.comparison.config import UNLIMITED_STEPS, arm_overrides, arm_recipe, load_comparison, parse_comparison

MINIMAL = {"name": "x", "arms": {"grpo": {"recipe": "grpo"}}, "budget": {"steps": 5}}


def changed(**changes):
    return {**MINIMAL, **changes}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed(sedes=[0]), r"unknown key 'sedes' \(did you mean 'seeds'\?\)"),
        (changed(arms={"a": {"recip": "grpo"}}), "recip"),
        (changed(budget={}), "exactly one"),
        (changed(budget={"steps": 5, "seconds": 2}), "exactly one"),
        (changed(baseline="grop"), "did you mean 'grpo'"),
        (changed(arms={"a": {"recipe": "grpo", "train": False}}), "no arm trains"),
        (changed(seeds=[0, 0]), "repeat"),
        (changed(arms={"a/b": {"recipe": "grpo"}}), "names a folder"),
        (changed(tune={"grid": {"optimizer.lr": [1e-4]}, "seeds": [0]}), "also reported seeds"),
        (changed(tune={"grid": {}}), "tune.grid needs"),
        (changed(target=1.2), "target"),
    ],
)
def test_mistakes_are_refused_with_the_fix(raw, message):
    with pytest.raises(ValueError, match=message):
        parse_comparison(raw)


def test_a_mistake_in_an_arm_is_found_before_any_run(tmp_path):
    path = fake_runs.comparison_yaml(tmp_path, ["base", "grpo"], tune=False)
    raw = json.loads(path.read_text())
    raw["arms"]["grpo"]["set"]["optimizer.learning_rate"] = 1e-3
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="arm 'grpo'.*learning_rate"):
        load_comparison(str(path))


def test_a_mistake_in_the_grid_is_found_before_any_run(tmp_path):
    path = fake_runs.comparison_yaml(tmp_path, ["base", "grpo"])
    with pytest.raises(ValueError, match="arm 'grpo'.*lrr"):
        load_comparison(str(path), {"tune": {"grid": {"optimizer.lrr": [1.0]}}})


@pytest.mark.parametrize(
    ("by", "sentence"),
    [
        ("fake_runs:fake_trian", "arm 'grpo': by: module 'fake_runs' has no function 'fake_trian'"),
        ("fake_runs", "arm 'grpo': by: 'fake_runs' names no function; write package.module:function"),
        ("nowhere:train", "cannot import 'nowhere'.*working directory"),
        ("needs_more:train", "cannot import 'needs_more'.*pip install a_package_that_is_not_here"),
    ],
)
def test_a_function_of_an_outside_arm_that_is_not_there_is_found_before_any_run(tmp_path, monkeypatch, by, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_here\n")
    path = fake_runs.comparison_yaml(tmp_path, ["base", "grpo"])
    raw = json.loads(path.read_text())
    raw["arms"]["grpo"]["by"] = by
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=sentence):
        load_comparison(str(path))


def test_overrides_reach_the_comparison(tmp_path):
    path = fake_runs.comparison_yaml(tmp_path, ["base", "grpo"])
    comparison = load_comparison(str(path), ["seeds=[4, 5]", "budget.generated_tokens=2000", "workers=1"])
    assert (comparison.seeds, comparison.budget.generated_tokens, comparison.workers) == ([4, 5], 2000, 1)


def test_numbers_that_yaml_reads_as_text_are_numbers():
    comparison = parse_comparison(changed(tune={"grid": {"optimizer.lr": ["1e-4", "3e-4"]}}))
    assert comparison.tune.points() == [{"optimizer.lr": 1e-4}, {"optimizer.lr": 3e-4}]


def test_budgets_become_recipe_keys():
    comparison = parse_comparison(changed(budget={"generated_tokens": 500}))
    assert arm_overrides(comparison, "grpo", 3, {}) == {"steps": UNLIMITED_STEPS, "budget.generated_tokens": 500, "seed": 3}
    comparison = parse_comparison(changed(budget={"seconds": 9}))
    assert arm_overrides(comparison, "grpo", 3, {}) == {"steps": UNLIMITED_STEPS, "budget.seconds": 9.0, "seed": 3}
    comparison = parse_comparison(changed(budget={"generated_tokens": 500}, arms={"grpo": {"recipe": "grpo", "set": {"steps": 40}}}))
    assert arm_overrides(comparison, "grpo", 3, {})["steps"] == 40  # a schedule needs its own length


def test_a_search_never_looks_at_test(tmp_path):
    comparison = load_comparison(str(fake_runs.comparison_yaml(tmp_path, ["base", "grpo"])))
    recipe = arm_recipe(comparison, "grpo", 1000, {"optimizer.lr": 1e-3}, tuning=True)
    assert recipe.eval.temperatures == [] and recipe.optimizer.lr == 1e-3 and recipe.seed == 1000
    assert arm_recipe(comparison, "grpo", 0, {}).eval.temperatures == [1.0, 0.0]
    assert arm_recipe(comparison, "base", 0, {}).eval.temperatures == comparison.base_temperatures
