"""Every shipped recipe for public models: it loads, `opd check` finds no error without the hub, and it trains two steps made small."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import Gemma3Config, Qwen3MoeConfig, T5Config

from opd.api import train
from opd.build.pretrained import load_config
from opd.comparison.config import load_comparison
from opd.config.load import load_recipe, parse_recipe, read_yaml
from opd.preflight.report import examine

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / "recipes/runs").glob("*.yaml") if "hardware" in read_yaml(path))
SMALL = {
    "model.init": "random", "model.scale": 0.02, "model.dtype": "float32", "learner.kind": "torch", "learner.ranks": 1, "learner.zero_stage": 0,
    "steps": 2, "rollout.prompts": 2, "sampling.max_tokens": 6, "optimizer.warmup_steps": 0, "track.wandb": "disabled",
    "eval.num_problems": 2, "eval.final_problems": 2, "eval.final_samples": 1, "checkpoint.every": 0,
}  # fmt: skip


def test_methods_families_sizes_and_machines_are_all_there():
    recipes = [load_recipe(name) for name in SHIPPED]
    assert {"opsd", "sdpo", "opd", "grpo", "srpo", "scope", "sft"} <= {recipe.method for recipe in recipes}
    assert {"Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B"} <= {recipe.model.path for recipe in recipes}
    assert {recipe.learner.ranks for recipe in recipes} == {1, 2, 8}
    assert {bool(recipe.model.lora) for recipe in recipes} == {True, False}
    assert {"code", "math"} <= {"code" if recipe.data.preset == "mbpp" else "math" for recipe in recipes}


@pytest.mark.parametrize("name", SHIPPED)
def test_check_finds_no_error_without_the_hub(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, plan = examine(load_recipe(name))
    assert [finding.sentence for finding in found if finding.severity == "error"] == []
    assert plan is not None and 0 < plan.bytes < plan.device.memory and plan.hours > 0


@pytest.mark.parametrize("name", SHIPPED)
def test_it_trains_two_steps_made_small(name, tmp_path):
    minibatches = min(2, load_recipe(name).updates.minibatches)
    folder = train(str(ROOT / f"recipes/runs/{name}.yaml"), {**SMALL, "updates.minibatches": minibatches}, tmp_path / "run", quiet=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert [(line["step"], line["skipped"]) for line in lines if "skipped" in line] == [(1, ""), (2, "")]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/compare").glob("rl_against_*.yaml")), ids=lambda path: path.stem)
def test_comparisons_load_with_every_arm(path):
    comparison = load_comparison(str(path))
    for arm in comparison.arms.values():
        load_recipe(arm.recipe, arm.set)


@pytest.mark.parametrize(
    ("key", "reason"),
    [("rollout.turns", "single answers to a prompt"), ("data.images", "text models"), ("engine.routing_replay", "routing replay"),
     ("tools", "no turns, tools")],
)  # fmt: skip
def test_what_is_not_supported_is_said_when_a_recipe_asks_for_it(key, reason):
    with pytest.raises(ValueError, match=reason):
        parse_recipe({}, {key: 1})


@pytest.mark.parametrize(
    ("version", "fix"), [(0, "older format.*then write schema_version: 1"), (2, "install a newer opd"), ("one", "or leave the line out")]
)
def test_another_format_of_the_file_is_refused_with_what_to_do(version, fix):
    with pytest.raises(ValueError, match=fix):
        parse_recipe({"schema_version": version})


def test_a_vllm_actor_on_the_learners_gpu_and_on_one_of_its_own():
    name = "opsd_qwen3_1.7b_math"
    shared, apart = (examine(load_recipe(name, {"hardware": hardware})) for hardware in ("gpu1_vllm", "gpu2_vllm"))
    assert not [finding for found, _ in (shared, apart) for finding in found if finding.severity == "error"]
    assert (shared[1].gpus, apart[1].gpus) == (1, 2)
    assert shared[1].memory["engine"] == {"vLLM": 40 * 10**9} and "engine" in apart[1].apart


def test_hardware_stands_between_method_and_run():
    recipe = load_recipe("opsd_qwen3_1.7b_math", {"hardware": "gpu8"})
    assert recipe.learner.ranks == 8 and recipe.model.dtype == "bfloat16" and recipe.model.lora and recipe.rollout.prompts == 32
    assert load_recipe("opsd_qwen3_1.7b_math", {"hardware": ""}).model.dtype == "float32"
    with pytest.raises(ValueError, match="no recipe 'gpu9'.*did you mean"):
        load_recipe("opsd_qwen3_1.7b_math", {"hardware": "gpu9"})


@pytest.mark.parametrize(("config", "reason"), [(Gemma3Config(), "has a vision_config"), (T5Config(), "encoder-decoder")])
def test_models_of_another_kind_are_refused(config, reason, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        load_config(str(tmp_path))


def test_a_mixture_of_experts_is_said_by_check_and_refused_by_vllm(tmp_path):
    shutil.copytree(ROOT / "models/expr-base", tmp_path / "moe")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 24, "num_experts": 4}
    more = {"num_experts_per_tok": 2, "max_position_embeddings": 512}
    Qwen3MoeConfig(**sizes, **more, moe_intermediate_size=16, head_dim=16).save_pretrained(tmp_path / "moe")
    changes = {"model.path": str(tmp_path / "moe"), "model.init": "random"}
    found, _ = examine(load_recipe("grpo_expr", changes))
    assert any(f.severity == "warning" and "mixture of 4 experts" in f.sentence for f in found)
    found, _ = examine(load_recipe("grpo_expr", {**changes, "engine": "vllm"}))
    assert any(f.severity == "error" and "routing replay is not supported" in f.sentence for f in found)


def test_the_plan_counts_ranks_served_teachers_and_money():
    alone = examine(load_recipe("opd_qwen3_8b_from_32b_math", {"prices.device_hour": 2.0}))[1]
    assert alone.gpus == 2 and alone.apart["teacher main"][1]["weights"] == 32762123264 * 2
    shared = examine(load_recipe("opd_qwen3_8b_from_32b_math", {"teacher.external.tensor_parallel": 2}))[1]
    room = sum(alone.apart["teacher main"][1].values())
    assert shared.gpus == 3 and shared.apart["teacher main"] == (2, {"weights": 32762123264, "cache": room - 32762123264})
    assert shared.seconds["teacher"] == pytest.approx(alone.seconds["teacher"] / 2)
    assert shared.sequence["teacher main"] == alone.sequence["teacher main"] // 2
    assert alone.evaluation > 0 and alone.money == pytest.approx(2 * 2.0 * (alone.hours + alone.evaluation / 3600))
    one, eight = (examine(load_recipe("grpo_qwen3_1.7b_math", {"hardware": name}))[1] for name in ("gpu1", "gpu8"))
    assert eight.gpus == 8 and eight.memory["learner"]["optimizer"] == pytest.approx(one.memory["learner"]["optimizer"] / 8, rel=1e-6)
    assert eight.seconds["learn"] == pytest.approx(one.seconds["learn"] / 8)
    half = examine(load_recipe("grpo_qwen3_1.7b_math", {"budget.generated_tokens": 75 * 128 * 2048}))[1]
    assert (one.steps, half.steps) == (150, 75) and one.disk == 4 * one.checkpoint + 2 * 1720574976
    assert one.activations[0] > 10 * one.activations[1] == 10 * one.memory["learner"]["activations"]


def test_offload_and_energy_are_in_the_plan():
    changes = {"learner.offload": True, "prices.watts": 500, "prices.kilowatt_hour": 2.0, "prices.teacher_million": 3.0}
    near, away = (examine(load_recipe("grpo_qwen3_1.7b_math", more))[1] for more in ({}, changes))
    assert away.memory["learner"]["optimizer"] == 0 and away.host == near.memory["learner"]["optimizer"] == 1720574976 * 12
    assert away.money == pytest.approx(away.hours + away.evaluation / 3600)  # 1 unit an hour; no teacher
    served = examine(load_recipe("opd_qwen3_1.7b_from_8b_math", {"prices.teacher_million": 3.0}))[1]
    assert served.money == pytest.approx(3.0 * 150 * 64 * (1024 + 2048) / 1e6)
