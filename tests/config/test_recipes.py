"""Recipes: typed, unknown keys refused with the nearest name, methods beneath runs, overrides on top."""

import pytest

from opd.config.load import differences, load_recipe, merge, parse_overrides, parse_recipe, recipe_hash


def test_overrides_win_over_run_over_method(tmp_path, monkeypatch):
    (tmp_path / "recipes/methods").mkdir(parents=True)
    (tmp_path / "recipes/methods/toy.yaml").write_text("group: 8\nsteps: 7\nteacher: {ema: {rate: 0.5}}\nobjective: [{nll: {}}]\n")
    (tmp_path / "run.yaml").write_text("method: toy\nsteps: 9\nteacher: frozen\noptimizer: {lr: 0.1, clip: 2.0}\n")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("run.yaml", ["optimizer.lr=3e-4", "objective.0.coef=0.5"])
    assert (recipe.group, recipe.steps, recipe.optimizer.lr, recipe.optimizer.clip) == (8, 9, 3e-4, 2.0)
    assert recipe.signals["main"].weights == "frozen" and recipe.objective == [{"nll": {}, "coef": 0.5}]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["optimzer.lr=1"], "did you mean 'optimizer'?"),
        (["optimizer.lrr=1"], "unknown key 'optimizer.lrr' (did you mean 'optimizer.lr'?)"),
        (["optimizer.lr=fast"], "optimizer.lr: must be a number (found 'fast')"),
        (["optimizer.lr=-1"], "optimizer.lr: must be above 0"),
        (["rollout.filter=mixed"], "'none' or 'mixed_groups'"),
        (["group=0"], "group: must be above 0"),
        (["lr"], "write key=value"),
        (["method=grpo_"], "no recipe 'grpo_' (did you mean 'grpo'?)"),
        (["model.lora.rnk=2"], "did you mean 'model.lora.rank'?"),
    ],
)
def test_a_mistake_gets_a_sentence_with_the_fix(changes, expected):
    with pytest.raises(ValueError, match=".") as caught:
        parse_recipe({}, changes)
    assert expected in str(caught.value)


def test_missing_file_and_bad_yaml(tmp_path):
    with pytest.raises(ValueError, match="no recipe 'nowhere.yaml'"):
        load_recipe("nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="bad.yaml: not valid YAML"):
        load_recipe(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="expected a mapping"):
        load_recipe(str(tmp_path / "list.yaml"))


def test_sugar_and_signals_cannot_disagree():
    with pytest.raises(ValueError, match="one or the other"):
        parse_recipe({"teacher": "live", "signals": {"main": {"weights": "frozen", "view": "plain"}}})


def test_choices_are_replaced_whole_and_mappings_merge():
    assert merge({"teacher": {"ema": {"rate": 1}}, "a": {"b": 1, "c": 2}}, {"teacher": {"external": {}}, "a": {"b": 3}}) == {
        "teacher": {"external": {}},
        "a": {"b": 3, "c": 2},
    }


def test_hash_ignores_name_and_logging_and_nothing_else():
    base = parse_recipe({})
    assert recipe_hash(base) == recipe_hash(parse_recipe({"name": "x", "track": {"wandb": "disabled"}}))
    assert recipe_hash(base) != recipe_hash(parse_recipe({"seed": 1}))
    whole, streamed = ([parse_recipe({"data": {"path": "x.jsonl", "stream": s, "buffer": b}}) for b in (64, 128)] for s in (False, True))
    assert recipe_hash(whole[0]) == recipe_hash(whole[1]) and recipe_hash(whole[0].data) == recipe_hash(whole[1].data)
    assert len({recipe_hash(one.data) for one in [whole[0], *streamed]}) == 3


def test_differences_name_every_leaf():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}}) == ["a.c: 2 -> 5", "d: 3 -> None"]


def test_override_values_are_yaml_and_scientific_numbers():
    assert parse_overrides(["a=3e-4", "b=true", "c={frozen: 1}", "d=", "e=text"]) == {
        "a": 3e-4,
        "b": True,
        "c": {"frozen": 1},
        "d": "",
        "e": "text",
    }


def test_off_is_a_word_in_an_override_too():
    assert load_recipe("opsd_expr", ["guard.action=off"]).guard.action == "off"
