"""The recipes of task words: the base and its teacher are made by runs, saved in shards, and everything else starts from them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd.api import train
from opd.cli import main
from opd.comparison.config import load_comparison
from opd.config.load import load_recipe
from opd.preflight.report import examine

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("sft", "grpo", "opd", "opsd", "hybrid")
SMALL = {
    "steps": 2, "rollout.prompts": 4, "sampling.max_tokens": 12, "optimizer.warmup_steps": 0, "eval.num_problems": 0, "eval.final_problems": 0,
    "checkpoint.every": 0, "checkpoint.best": False, "track.wandb": "disabled",
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder where base_words and teacher_words were made, small: 2 steps from random weights, 1 MiB a file."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    random = {"model.init": "random", "model.scale": 0.4, "model.dtype": "bfloat16", "checkpoint.shard_mib": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train("recipes/runs/base_words.yaml", {**SMALL, **random, "sampling.max_tokens": 64}, Path("runs/base_words"), quiet=True)
        train("recipes/runs/teacher_words.yaml", {**SMALL, "sampling.max_tokens": 64}, Path("runs/teacher_words"), quiet=True)
    return folder


def test_the_base_is_saved_in_small_files(workplace):
    shards = sorted((workplace / "runs/base_words/model").glob("*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < (1 << 20) + 10_000 for shard in shards)
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    model = AutoModelForCausalLM.from_pretrained(workplace / "runs/base_words/model")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in model.named_parameters())
    assert len(list((workplace / "runs/teacher_words/model").glob("*.safetensors"))) == 1  # fp32 here, 14 MiB a file


def test_the_size_of_the_real_one():
    recipe = load_recipe("base_words", {"hardware": "gpu1"})
    found, plan = examine(recipe, "h100")
    assert not [finding for finding in found if finding.severity in ("error", "warning")]
    parameters = plan.memory["learner"]["weights"] / 2  # bf16
    assert plan.answer_tokens < 40  # as the demonstrations are; sampling.max_tokens is 64
    assert 8e6 < parameters < 12e6 and recipe.checkpoint.shard_mib < 15 and recipe.model.dtype == "bfloat16"


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_starts_from_it(method, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    found, plan = examine(load_recipe(f"{method}_words"))
    assert not [finding.sentence for finding in found if finding.severity == "error"] and plan is not None
    folder = train(f"recipes/runs/{method}_words.yaml", {**SMALL, "checkpoint.shard_mib": 1}, Path(f"runs/{method}"), quiet=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"]) for line in lines if "skipped" in line] == [(1, ""), (2, "")]
    same = [(workplace / "runs/base_words/model" / name).read_bytes() == (folder / "model" / name).read_bytes() for name in ("tokenizer.json",)]
    assert same == [True]


MADE_BY = [*((f"{method}_words", "base_words") for method in (*METHODS, "teacher")), ("opd_words", "teacher_words")]


@pytest.mark.parametrize(("name", "maker"), MADE_BY)
def test_a_recipe_says_which_command_makes_what_it_starts_from(name, maker, workplace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if maker == "teacher_words":
        shutil.copytree(workplace / "runs/base_words/model", "runs/base_words/model")
    found, plan = examine(load_recipe(name))
    sentence = f"no model folder 'runs/{maker}/model' yet: make it first with `opd train recipes/runs/{maker}.yaml`"
    assert [sentence in finding.sentence for finding in found if finding.severity == "warning" and "model folder" in finding.sentence][-1:] == [True]
    assert not [finding for finding in found if finding.severity == "error"]
    assert plan is not None and (maker == "teacher_words" or plan.memory["learner"]["weights"] == 9864576 * 4)  # base_words' size, without weights
    with pytest.raises(ValueError, match=sentence):
        train(f"recipes/runs/{name}.yaml", {}, Path("runs/none"), quiet=True)
    assert not Path("runs/none").exists()


def test_the_comparison_says_so_before_any_run_starts(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "words"]) == 2
    assert "arm 'base': no model folder 'runs/base_words/model' yet: make it first with `opd train recipes/runs/base_words" in capsys.readouterr().err
    shutil.copytree(workplace / "runs/base_words/model", "runs/base_words/model")
    assert main(["compare", "words"]) == 2
    assert "arm 'opd': no model folder 'runs/teacher_words/model' yet" in capsys.readouterr().err
    assert not Path("runs/words").exists()


def test_the_comparison_has_every_arm_at_ten_times_the_tokens_of_the_cpu_demo():
    words, demo = load_comparison("words"), load_comparison("demo_full_expr")
    assert set(words.arms) == set(demo.arms) - {"opsd_answer"}
    assert words.seeds == demo.seeds and words.tune.grid == demo.tune.grid
    assert words.budget.generated_tokens == 10 * demo.budget.generated_tokens
    for arm in words.arms.values():
        recipe = load_recipe(arm.recipe, arm.set)
        assert (recipe.hardware, recipe.model.dtype, recipe.learner.kind, recipe.model.gradient_checkpointing) == ("gpu1", "bfloat16", "torch", False)
