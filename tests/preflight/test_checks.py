"""Every kind of mistake that `opd check` knows gets its own sentence; every shipped recipe passes; a command says it with its exit status."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from opd.cli import main
from opd.config.load import load_recipe
from opd.config.stages import read_stages
from opd.preflight.report import examine

ROOT = Path(__file__).resolve().parents[2]
EXPR = "recipes/runs/opsd_expr.yaml"
GRPO = "recipes/runs/grpo_expr.yaml"
OPD = "recipes/runs/opd_expr.yaml"


def sentences(recipe, overrides):
    found, _ = examine(load_recipe(recipe, overrides))
    return [f"{finding.severity}: {finding.sentence}" for finding in found]


def distilled(divergence, **support):
    return [{"distill": divergence, "support": {"teacher_topk": support}}]


MISTAKES = {
    "greedy training": (GRPO, {"sampling.temperature": 0}, "error: sampling.temperature is 0"),
    "truncated sampling": (EXPR, {"sampling.top_p": 0.9}, "warning: sampling.top_p or top_k cuts"),
    "cold sampling": (GRPO, {"sampling.temperature": 0.3}, "warning: sampling.temperature=0.3"),
    "no room": (EXPR, {"sampling.max_tokens": 512}, "error: sampling.max_tokens=512 leaves no room"),
    "long prompts": (EXPR, {"data.max_prompt_tokens": 5}, "prompts are longer than 5 tokens"),
    "short answers": (EXPR, {"sampling.max_tokens": 4}, "is shorter than"),
    "minibatches": (GRPO, {"updates.minibatches": 5}, "do not divide into updates.minibatches=5"),
    "too many minibatches": (GRPO, {"updates.minibatches": 1000}, "error: updates.minibatches=1000 exceeds"),
    "learner budget": (EXPR, {"learner.token_budget": 8}, "warning: learner.token_budget=8"),
    "engine budget": (EXPR, {"engine.token_budget": 8}, "warning: engine.token_budget=8"),
    "warm-up": (EXPR, {"optimizer.warmup_steps": 999}, "error: optimizer.warmup_steps=999"),
    "high rate": (EXPR, {"optimizer.lr": 0.1}, "warning: optimizer.lr=0.1 is high"),
    "low rate": (EXPR, {"optimizer.lr": 1e-7, "model.lora": {"rank": 4}}, "warning: optimizer.lr=1e-07 is low for LoRA"),
    "live teacher": (EXPR, {"teacher": "live"}, "warning: signals.main: a live teacher"),
    "average that never moves": (EXPR, {"teacher": {"ema": {"rate": 0.0}}}, "an EMA rate of 0 never moves"),
    "average that is live": (EXPR, {"teacher": {"ema": {"rate": 1.0}}}, "an EMA rate of 1 is the live model"),
    "masters": (EXPR, {"model.dtype": "bfloat16", "learner.kind": "torch"}, "without fp32 masters"),
    "bf16 on a CPU": (EXPR, {"model.dtype": "bfloat16"}, "warning: model.dtype=bfloat16 on a CPU"),
    "flash attention": (EXPR, {"model.attention": "flash_attention_2"}, "error: model.attention=flash_attention_2 needs the package"),
    "group of one": (GRPO, {"group": 1}, "error"),
    "filter without groups": (EXPR, {"group": 1, "rollout.filter": "mixed_groups"}, "error: rollout.filter=mixed_groups with group=1"),
    "few test problems": (EXPR, {"eval.final_problems": 16}, "the standard error of an accuracy near one half is 12 points"),
    "no dev": (EXPR, {"eval.num_problems": 0}, "note: eval.num_problems=0"),
    "no key": (EXPR, {"track.wandb": "online"}, "error: track.wandb is online, but nobody is logged in"),
    "K above the vocabulary": (EXPR, {"objective": distilled("forward_kl", k=99)}, "support k is 99 but the vocabulary"),
    "illegal objective": (EXPR, {"objective": distilled("reverse_kl", k=4, tail="drop")}, "error"),
    "no such hint": (EXPR, {"view": {"hint": {"name": "poem"}}}, "error"),
    "no such view": (EXPR, {"view": "solutoin"}, "did you mean 'solution'"),
    "no such model": (EXPR, {"model.path": "models/expr-bsae"}, "did you mean 'expr-base'"),
    "no such task": (EXPR, {"data.task": "exrp"}, "did you mean 'expr'"),
    "no such file": (EXPR, {"data.task": "", "data.path": "nothing.jsonl"}, "nothing.jsonl does not exist"),
    "no such preset": (EXPR, {"data.task": "", "data.preset": "gsm9k"}, "did you mean 'gsm8k'"),
    "no teacher": (OPD, {"teacher": {"external": {"path": ""}}}, "an external teacher needs a model"),
    "foreign teacher": (OPD, {"teacher": {"external": {"path": "models/route-teacher"}}}, "has another tokenizer than the student"),
    "no such run": (EXPR, {"init": "runs/none"}, "init: runs/none is no run folder"),
    "a shape that cannot be": (EXPR, {"model.path": "", "model.shape": {"hiden_size": 3}}, "did you mean 'hidden_size'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_has_its_sentence(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for variable in ("WANDB_API_KEY",):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    recipe, overrides, sentence = MISTAKES[name]
    found = sentences(recipe, overrides)
    assert any(sentence in line for line in found), found


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


def test_a_port_that_is_taken_and_a_full_disk(monkeypatch):
    monkeypatch.chdir(ROOT)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert any("is taken by another process" in line for line in sentences(EXPR, {}))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert any("checkpoints of" in line and "do not fit" in line for line in sentences(EXPR, {}))


def test_a_model_that_is_too_large_names_the_largest_part_and_the_remedy(monkeypatch):
    monkeypatch.chdir(ROOT)
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 40, "num_attention_heads": 64, "num_key_value_heads": 8}
    found, plan = examine(load_recipe(EXPR, {"model.path": "", "model.shape": shape}), "h100")
    assert plan.bytes > 80 * 10**9
    assert any("the largest part is learner: optimizer" in finding.sentence and "LoRA" in finding.sentence for finding in found)


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "recipes/runs").glob("*.yaml") if p.stem != "gsm8k_tiny"))
def test_shipped_recipes_pass(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = read_stages(f"recipes/runs/{path}")
    for stage in stages[:1]:
        found, plan = examine(stage)
        assert not [finding for finding in found if finding.severity == "error"]
        assert plan is not None and plan.bytes > 0 and sum(plan.seconds.values()) > 0


def test_the_command(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["check", EXPR]) == 0
    said = capsys.readouterr().out
    assert "nothing to complain of" in said and "memory on this CPU" in said and "assumed: answers of" in said
    assert main(["check", "recipes/runs/sft_opsd_expr.yaml"]) == 0  # the second stage starts from a model that does not exist yet
    capsys.readouterr()
    assert main(["check", EXPR, "sampling.max_tokens=512"]) == 2
    assert "this recipe would not run as it is" in capsys.readouterr().err
    assert main(["check", EXPR, "device=h1000"]) == 2
    assert "did you mean 'h100'" in capsys.readouterr().err
