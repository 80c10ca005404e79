"""Every kind of mistake that `opd check` knows gets its own sentence; every shipped recipe passes; a command says it with its exit status."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from opd.build import system
from opd.cli import main
from opd.config.load import load_recipe
from opd.config.stages import read_stages
from opd.preflight import checks
from opd.preflight.report import examine
from tests.preflight.mistakes import ELSEWHERE, EXPR, KINDS, PAGE, page, write_files

ROOT = Path(__file__).resolve().parents[2]
MISTAKES = {name: mistake for group in KINDS.values() for name, mistake in group.items()}


def sentences(recipe, overrides):
    """What `opd check` says; a recipe that it cannot read has one error."""
    try:
        found, _ = examine(load_recipe(recipe, overrides))
    except ValueError as problem:
        return [f"error: {problem}"]
    return [f"{finding.severity}: {finding.sentence}" for finding in found]


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_has_its_sentence(name, tmp_path, monkeypatch):
    for shared in ("recipes", "models"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opd.build.served.WHOLE_VOCABULARY", 4)  # the embedded models' is small
    monkeypatch.setattr("opd.preflight.facts.hub_answers", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for variable in ("WANDB_API_KEY",):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    recipe, overrides, sentence = MISTAKES[name]
    found = sentences(recipe, overrides)
    assert any(sentence in line for line in found), found


def test_the_page_lists_all_of_them():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.preflight.mistakes"
    assert len(MISTAKES) == sum(map(len, KINDS.values())) >= 50, "names are unique"
    assert set(ELSEWHERE.values()) <= set(globals()), "every other one has its test"


def test_several_mistakes_are_said_at_once(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = sentences(EXPR, {"optimizer.warmup_steps": 999, "view": "solutoin", "sampling.max_tokens": 512})
    assert sum(line.startswith("error") for line in found) >= 3


def test_tokenizer_trouble(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "model"
    shutil.copytree("models/expr-base", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": tokenizer.eos_token_id + 1}))
    assert any("the generation config with" in line for line in sentences(EXPR, {"model.path": str(folder)}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 8}))
    assert any("8 rows beyond the" in line for line in sentences(EXPR, {"model.path": str(folder)}))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 10}))
    assert any("they do not belong together" in line for line in sentences(EXPR, {"model.path": str(folder)}))


def test_no_template_and_no_end(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "model"
    shutil.copytree("models/expr-base", folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("chat_template", "eos_token"):
        settings.pop(key, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({k: v for k, v in generation.items() if k != "eos_token_id"}))
    found = sentences(EXPR, {"model.path": str(folder)})
    assert any("no chat template" in line for line in found) and any("no answer could end" in line for line in found), found


def test_a_teacher_of_another_template(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "teacher"
    shutil.copytree("models/expr-teacher", folder)
    assert not any("chat template" in line for line in sentences("recipes/runs/opd_expr.yaml", {"teacher": {"external": {"path": str(folder)}}}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = folder / "chat_template.jinja"
    text = template.read_text() if template.is_file() else settings["chat_template"]
    template.unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{% if true %}" + text + "{% endif %}"}))
    found = sentences("recipes/runs/opd_expr.yaml", {"teacher": {"external": {"path": str(folder)}}})
    assert any(line.startswith("warning: signals.main: the chat template of") and "is not the student's" in line for line in found), found
    assert any(line.endswith("used for both: a turn opens with '<|assistant|>' in both") for line in found), found


def test_a_cache_that_holds_no_sequence(monkeypatch):
    monkeypatch.chdir(ROOT)
    served = "recipes/runs/opd_qwen3_8b_from_32b_math.yaml"  # 32.8 billion weights of 2 bytes are 61.0 GiB, 0.84 of 80 GB 62.6
    found = sentences(served, {"engine.memory_share": 0.825})
    assert any("teacher main: beside its weights" in line and "lower sampling.max_tokens" in line for line in found), found
    assert not any("beside its weights" in line for line in sentences(served, {}))


def test_versions_and_missing_packages(monkeypatch):
    monkeypatch.chdir(ROOT)
    known = {"torch": "2.5.0", "peft": None, "transformers": "5.19.0"}
    monkeypatch.setattr(checks, "_installed", lambda name: known.get(name))
    found = sentences(EXPR, {"model.lora": {"rank": 4}})
    assert any("torch 2.5.0 is outside the tested range (2.11 to below 2.14)" in line for line in found)
    assert any('model.lora needs peft: pip install "opd-train[train]"' in line for line in found)
    monkeypatch.setattr(system, "find_spec", lambda name: None)
    assert any('deepspeed, which is not installed: pip install "opd-train[train]"' in line for line in sentences(EXPR, {"learner.kind": "deepspeed"}))


def test_a_folder_of_another_run(tmp_path, monkeypatch):
    for shared in ("recipes", "models"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/notes.txt").write_text("not a run")
    assert any("runs/mine exists and is no run folder" in line for line in sentences(EXPR, {"name": "mine"}))


def recorded(name, recipe):
    """A run folder with the recipe."""
    Path("runs", name).mkdir(parents=True)
    Path("runs", name, "resolved.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))


def test_a_folder_of_the_same_run_is_no_mistake_though_its_model_or_its_stage_is_still_to_come(tmp_path, monkeypatch, capsys):
    """The recipe that was recorded is compared with the one that was given, not with what stands in for models and stages."""
    monkeypatch.chdir(tmp_path)
    recorded("w", load_recipe("grpo_words", {"name": "w"}))
    assert main(["check", "grpo_words", "name=w"]) == 0 == main(["check", "grpo_words", "name=w", "device=h100"])
    _, second = read_stages("recipes/runs/sft_opsd_expr.yaml")
    recorded(second.name, second)
    assert second.init and main(["check", "recipes/runs/sft_opsd_expr.yaml"]) == 0
    assert "another recipe" not in capsys.readouterr().out
    assert main(["check", "grpo_words", "name=w", "group=3"]) == 2
    assert "runs/w holds a run of another recipe: group: 8 -> 3. Give" in capsys.readouterr().out


def test_a_model_that_is_still_to_come_is_called_by_its_name(tmp_path, monkeypatch):
    """Both stand-ins are one outline: the teacher starts from the base."""
    monkeypatch.chdir(tmp_path)
    both = sentences("opd_words", {})
    assert [line.split("' yet")[0] for line in both] == [f"warning: no model folder 'runs/{name}/model" for name in ("teacher_words", "base_words")]
    found = sentences("opd_words", {"model.path": "models/expr-base", "data.task": "expr"})
    assert any(line.startswith("error: teacher 'runs/teacher_words/model' has another tokenizer") for line in found), found
    assert any("the chat template of runs/teacher_words/model is" in line for line in found), found
    assert not any("opd-outlines" in line for line in found), found


def test_a_port_that_is_taken_and_a_full_disk(monkeypatch):
    monkeypatch.chdir(ROOT)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert any("is taken by another process" in line for line in sentences(EXPR, {}))
        master = f"127.0.0.1:{taken.getsockname()[1]}"
        several = {"launch": {"nodes": 2, "master": master}, "learner.kind": "deepspeed"}
        assert any(f"launch.master={master} is taken" in line for line in sentences(EXPR, several))
        assert not any("launch.master" in line for line in sentences(EXPR, {**several, "launch.node_rank": 1}))
    assert not any("launch.master" in line for line in sentences(EXPR, several))
    assert any("launch.master=nowhere.invalid:1: unknown host" in line for line in sentences(EXPR, {**several, "launch.master": "nowhere.invalid:1"}))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert any("checkpoints of" in line and "do not fit" in line for line in sentences(EXPR, {}))


def test_a_model_that_is_too_large_names_the_largest_part_and_the_remedy(monkeypatch):
    monkeypatch.chdir(ROOT)
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 40, "num_attention_heads": 64, "num_key_value_heads": 8}
    found, plan = examine(load_recipe(EXPR, {"model.path": "", "model.shape": shape}), "h100")
    assert plan.bytes > 80 * 10**9
    assert any("the largest part is learner: optimizer" in finding.sentence and "LoRA" in finding.sentence for finding in found)


STARTS_FROM_A_RUN = {p.stem for p in (ROOT / "recipes/runs").glob("*_words.yaml")} - {"base_words"}  # tests/build/test_words_runs.py


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "recipes/runs").glob("*.yaml") if p.stem not in {"gsm8k_tiny", *STARTS_FROM_A_RUN}))
def test_shipped_recipes_pass(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = read_stages(f"recipes/runs/{path}")
    for stage in stages[:1]:
        found, plan = examine(stage)
        assert not [finding for finding in found if finding.severity == "error"]
        assert plan is not None and plan.bytes > 0 and sum(plan.seconds.values()) > 0


def test_a_comparison_is_checked_arm_by_arm(capsys, monkeypatch):
    """Three arms train: three points and one seed of the search, three seeds reported; the base is evaluated once."""
    monkeypatch.chdir(ROOT)
    words = ["check", "recipes/compare/rl_against_opd_qwen3_1.7b_tokens.yaml", "prices.device_hour=2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert [line.split(",")[0] for line in said.splitlines() if line.startswith("arm ")] == [
        "arm base (evaluated only)", "arm grpo", "arm opd", "arm opsd",
    ]  # fmt: skip
    base, grpo = (next(line for line in arm.splitlines() if line.startswith("  time: ")) for arm in said.split("\narm ")[:2])
    assert base.endswith(" for evaluations") and "step" not in base and "a step (rollout" in grpo
    assert "all arms: 19 runs, searched and reported, about" in said and said.rstrip().endswith("USD")
    assert main([*words[:2], "eval.every=0", "budget.generated_tokens=0"]) == 2


def test_the_command(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["check", EXPR]) == 0
    said = capsys.readouterr().out
    assert said.startswith("opsd_expr: nothing to complain of\n") and "memory on this CPU" in said and "assumed: answers of" in said
    assert main(["check", "recipes/runs/sft_opsd_expr.yaml"]) == 0  # the second stage starts from a model that does not exist yet
    capsys.readouterr()
    assert main(["check", EXPR, "sampling.max_tokens=512"]) == 2
    assert "this recipe would not run as it is" in capsys.readouterr().err
    assert main(["check", EXPR, "device=h1000"]) == 2
    assert "did you mean 'h100'" in capsys.readouterr().err


def test_a_plan_for_another_machine_is_not_judged_by_this_one(monkeypatch):
    """bf16 is wrong on this CPU only; colocated actors need a GPU here, unless the recipe is meant for elsewhere."""
    monkeypatch.chdir(ROOT)

    def said(device, **changes):
        return " ".join(finding.sentence for finding in examine(load_recipe(EXPR, changes), device)[0])

    assert "on a CPU" in said("", **{"model.dtype": "bfloat16"}) and "on a CPU" not in said("h100", **{"model.dtype": "bfloat16"})
    apart = {"engine": {"kind": "vllm", "placement": "colocated"}}
    assert "needs Ray" in said("", **apart) or "here is none: use engine.placement=separate" in said("", **apart)
    assert "here is none" not in said("h100", **apart)
    monkeypatch.setattr("opd.preflight.facts.find_spec", lambda name: None)
    assert "engine=vllm needs Ray and vLLM here" in said("", **apart)
