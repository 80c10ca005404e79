"""opd diff on two real tiny runs, on what was changed in copies of them, and on what a user may type wrong."""

import json
import os
import shutil

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
import yaml

from opd.cli import main
from opd.comparison.difference import EFFECTS, FACTS, KEYS, diff_runs, effect_of_key, leaves, verdict
from opd.config.recipe import Recipe

torch.set_num_threads(1)
TINY = {
    "method": "rloo",
    "model": {"shape": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}},
    "data": {"task": "expr"},
    "rollout": {"prompts": 2},
    "group": 2,
    "sampling": {"max_tokens": 8},
    "steps": 2,
    "eval": {"every": 0, "num_problems": 2, "final_problems": 4, "final_samples": 2},
    "learner": {"kind": "torch"},
    "track": {"wandb": "disabled"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with runs/a, runs/b (another rate, another objective, another seed) and runs/seed (only another seed)."""
    root = tmp_path_factory.mktemp("diff")
    (root / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["train", "tiny.yaml", "name=a"]) == 0
        assert main(["train", "tiny.yaml", "name=b", "seed=1", "optimizer.lr=1e-3", "method=dr_grpo", "eval.final_samples=4"]) == 0
        assert main(["train", "tiny.yaml", "name=seed", "seed=1"]) == 0
    return root / "runs"


def named(found, effect):
    return {f"{difference.what} {difference.key}".strip() for difference in found.of(effect)}


def changed(run, to, **facts):
    """A copy of a run whose manifest says something else."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "model"))
    manifest = json.loads((to / "resolved.json").read_text())
    for dotted, value in facts.items():
        *parents, last = dotted.split("__")
        inner = manifest
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    (to / "resolved.json").write_text(json.dumps(manifest))
    return to


def test_two_real_runs(runs):
    found = diff_runs(runs / "a", runs / "b")
    assert {"recipe optimizer.lr"} <= named(found, "yes") and any(name.startswith("recipe objective.0.") for name in named(found, "yes"))
    assert named(found, "noise") == {"recipe seed"} and named(found, "exam") == {"recipe eval.final_samples"}
    assert {"recipe name", "recipe method"} <= named(found, "no") <= {"recipe name", "recipe method", "recipe paper", "started"}
    assert not found.of("numerics") and not found.unrecorded  # one machine, one version of everything, and all of it on record
    assert [name for name, _, _ in found.results] == ["expr test, greedy", "expr test, temperature 1.0", "expr dev, temperature 1.0"]
    assert found.parts["step"] == 1
    text = verdict(found)
    assert "can explain a gap" in text and "optimizer.lr" in text and text.endswith("They were also measured differently (eval.final_samples).")


def test_the_command_prints_the_verdict_first_and_every_difference(runs, monkeypatch, capfd):
    monkeypatch.chdir(runs.parent)
    assert main(["diff", "runs/a", "runs/b"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[:3] == ["A  runs/a", "B  runs/b", ""] and "these two runs alone cannot tell" in lines[3]
    assert "  optimizer.lr: 0.0001 -> 0.001" in lines and "  seed: 0 -> 1" in lines
    assert any(line.startswith("metrics: they part at step 1") for line in lines)


def test_another_seed_is_noise(runs):
    found = diff_runs(runs / "a", runs / "seed")
    assert verdict(found) == "Nothing but the seed can have made a difference: a gap between these two is noise. Several seeds tell (opd compare)."


def test_a_copy_has_nothing_to_say_and_each_fact_its_own_effect(runs, tmp_path):
    same = diff_runs(runs / "a", changed(runs / "a", tmp_path / "same"))
    assert not same.differences and verdict(same) == "Nothing that is recorded makes a difference: these runs should agree to the last bit."
    assert same.parts["step"] is None
    facts = {
        "data_hash": ("other", "yes", "data"),
        "template_hash": ("other", "yes", "chat template"),
        "code_hash": ("other", "yes", "source files of opd"),
        "git_commit": ("f" * 40, "no", "git commit"),
        "packages__torch": ("2.14.0", "numerics", "package torch"),
        "packages__math-verify": ("9.9", "exam", "package math-verify"),
        "hardware__cpu": ("Another", "numerics", "hardware cpu"),
        "accelerators": (["NVIDIA H100"], "numerics", "GPUs"),
        "recipe__seed": (7, "noise", "recipe seed"),
        "recipe__model__attention": ("eager", "numerics", "recipe model.attention"),
        "recipe__learner__max_skipped": (9, "yes", "recipe learner.max_skipped"),
    }
    for n, (key, (value, effect, name)) in enumerate(facts.items()):
        found = diff_runs(runs / "a", changed(runs / "a", tmp_path / str(n), **{key: value}))
        assert [(f"{d.what} {d.key}".strip(), d.effect) for d in found.differences] == [(name, effect)]


def test_what_is_not_recorded_is_not_ruled_out(runs, tmp_path):
    older = changed(runs / "a", tmp_path / "older")
    manifest = json.loads((older / "resolved.json").read_text())
    del manifest["code_hash"]
    (older / "resolved.json").write_text(json.dumps({**manifest, "git_commit": "f" * 40}))
    found = diff_runs(runs / "a", older)
    assert found.unrecorded == ((older, "code_hash"),)
    assert named(found, "yes") == {"git commit"}  # without the hash a commit is all there is


def test_a_run_that_stopped_early_or_was_rolled_back_is_another_run(runs, tmp_path):
    stopped = changed(runs / "a", tmp_path / "stopped")
    (stopped / "status.json").write_text(json.dumps({"state": "failed", "step": 1, "steps": 2, "why": "x"}))
    (stopped / "guard.jsonl").write_text(json.dumps({"step": 1, "rule": "r", "action": "rolled_back", "to": 0}) + "\n")
    found = diff_runs(runs / "a", stopped)
    assert [(d.key, d.left, d.right) for d in found.of("yes")] == [("state", "finished", "failed at step 1"), ("rolled back at steps", [], [1])]


def test_lists_of_one_length_are_compared_item_by_item():
    left = {"objective": [{"policy": "a", "coef": 1}], "betas": [0.9, 0.99], "views": [{"a": 1}]}
    right = {"objective": [{"policy": "b", "coef": 1}], "betas": [0.9, 0.95], "views": [{"a": 1}, {"b": 2}]}
    assert list(leaves(left, right)) == [
        ("objective.0.policy", "a", "b"),
        ("betas", [0.9, 0.99], [0.9, 0.95]),
        ("views", [{"a": 1}], [{"a": 1}, {"b": 2}]),
    ]


def test_the_table_names_only_keys_that_exist_and_the_document_shows_it(request):
    dumped = Recipe().model_dump(mode="json")
    for key in KEYS:
        inner = dumped
        for part in key.split("."):
            assert part in inner, key
            inner = inner[part]
    assert effect_of_key("optimizer.lr") == effect_of_key("objective.0.policy") == "yes"
    page = (request.config.rootpath / "docs/comparing.md").read_text()
    for key, effect in [*KEYS.items(), *((key, effect) for key, (_, effect) in FACTS.items())]:
        [row] = [line for line in page.splitlines() if line.startswith(f"| {effect} |")]
        assert f"`{key}`" in row, f"docs/comparing.md: {key} belongs to {effect}"
    assert all(f"| {effect} |" in page for effect in EFFECTS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "opd diff takes two run folders"),
        (["runs/a"], "opd diff takes two run folders, opd diff RUN_A RUN_B; found runs/a"),
        (["runs/a", "runs/b", "x=1"], "opd diff takes two run folders"),
        (["runs/a", "runs/a"], "are one folder; name two runs"),
        (["runs/a", "runs/none"], "runs/none does not exist"),
        (["a", "b2"], "neither b2 nor runs/b2 exists (did you mean runs/b"),
        (["runs/a", "."], ". holds several runs: name one of runs/a, "),
        (["runs/a", "whole"], "runs/whole is a comparison of x (2 runs): name one of its runs, e.g. runs/whole/runs/x/1"),
        (["runs/a", "runs/torn"], "runs/torn/resolved.json is not valid JSON"),
    ],
)
def test_bad_input(runs, words, said, monkeypatch, capfd):
    monkeypatch.chdir(runs.parent)
    for n in (1, 2):
        shutil.copytree("runs/a", f"runs/whole/runs/x/{n}", dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints", "model"))
    os.makedirs("runs/torn", exist_ok=True)
    with open("runs/torn/resolved.json", "w") as file:
        file.write('{"recipe": ')
    assert main(["diff", *words]) == 2
    error = capfd.readouterr().err
    assert said in error and error.count("\n") == 1
