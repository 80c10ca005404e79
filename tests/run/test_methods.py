"""Every method file trains on both learners, and the same again across a request to stop and a resume."""

import json
import os
import signal
import zlib
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import opd
from opd.build.pretrained import new_config
from opd.config.load import find_recipe, read_yaml
from opd.errors import Preempted
from opd.overview import recipe_files
from opd.tasks import TASKS
from opd.tasks.tokenizer import character_tokenizer
from opd.text.bpe import train_byte_bpe

torch.set_num_threads(1)
MODELS = Path(__file__).parents[2] / "models"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
READABLE = {
    "mopd": {"signals.second.domain": ""},  # texts in the alphabet of the test's task, whose base reads one kind of hint at a time
    "trace": {
        "writers.spans.ask": "S{solution}\n{segments}",
        "writers.spans.max_tokens": 8,
        "view": {"note": {"name": "spans", "template": "F{hint}\n{question}"}},
    },
    "mad_opd": {
        "signals.first.view": {"note": {"name": "debate", "template": "F{hint}\n{question}"}},
        "signals.second.view": {"note": {"name": "debate", "template": "F{hint}\n{question}"}},
        "signals.first.weights.external.path": f"{MODELS}/expr-teacher",  # greedy texts of random weights are blank
        "signals.second.weights.external.path": f"{MODELS}/expr-base",
        "writers.debate.role": "",
        "writers.debate.ask": "{question}",
        "writers.debate.reply": "F{transcript}\n{question}",
        "writers.debate.max_tokens": 8,
    },
    "opsdc": {"view": {"instruction": {"text": "7", "template": "F{hint}\n{question}"}}},
    "sd_zero_srt": {"rollout.revise": {"right": "S", "wrong": "F", "between": "\n"}},
    "sd_zero": {"view": {"revision": {"right": "S", "wrong": "F", "between": "\n"}}},
}
JUDGED = []


def by_text(prompt, text):
    """Half of all texts are right; after `stop_after` verdicts somebody asks the run to stop."""
    JUDGED.append(text)
    if len(JUDGED) == by_text.stop_after:
        os.kill(os.getpid(), signal.SIGTERM)
    return zlib.crc32(text.encode()) % 2 == 0


by_text.stop_after = 0


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = character_tokenizer(TASKS["expr"].characters)
    for name, seed in (("base", 0), ("teacher", 1)):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(new_config(SHAPE, tokenizer)).save_pretrained(name)
        tokenizer.save_pretrained(name)
    return tmp_path


def train(method, name, **changes):
    recipe = {
        "method": method,
        "model": {"path": "base"},
        "data": {"task": "expr"},
        "rollout": {"prompts": 2},
        "sampling": {"max_tokens": 8},
        "steps": 2,
        "optimizer": {"lr": 1e-2},
        "eval": {"every": 0, "num_problems": 0, "final_problems": 0},
        "track": {"wandb": "disabled"},
    }
    with open("recipe.yaml", "w") as file:
        yaml.safe_dump(recipe, file)
    raw = read_yaml(find_recipe(method, kind="methods"))
    named = {key: with_teacher(raw[key]) for key in ("teacher", "signals") if key in raw}
    small = {"objective": with_small_supports(raw["objective"])}
    return opd.train("recipe.yaml", {**small, **named, **READABLE.get(method, {}), **changes, "name": name}, verifier=by_text, quiet=True)


def with_small_supports(choice):
    """The same with every k at most 5: the test's vocabulary has few tokens."""
    if isinstance(choice, list):
        return [with_small_supports(item) for item in choice]
    if isinstance(choice, dict):
        return {key: min(value, 5) if key in ("k", "draws") else with_small_supports(value) for key, value in choice.items()}
    return choice


def with_teacher(choice):
    """The choice with every external model that it leaves open filled in."""
    if isinstance(choice, dict):
        return {key: {**value, "path": "teacher"} if key == "external" else with_teacher(value) for key, value in choice.items()}
    return choice


def metrics(folder):
    with open(folder / "metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "rate/"))} for row in rows]


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
@pytest.mark.parametrize("method", [path.stem for path in recipe_files("methods")])
def test_a_method_trains_and_resumes_bitwise(here, method, kind):
    JUDGED.clear()
    by_text.stop_after = 0
    whole = train(method, "whole", **{"learner.kind": kind})
    by_text.stop_after = len(JUDGED) + len(JUDGED) // 2
    with pytest.raises(Preempted, match="SIGTERM"):
        train(method, "broken", **{"learner.kind": kind})
    by_text.stop_after = 0
    broken = train(method, "broken", **{"learner.kind": kind})
    assert metrics(broken) == metrics(whole) and len(metrics(whole)) == 2
    base, first, second = (load_file(f"{folder}/model.safetensors") for folder in ("base", whole / "model", broken / "model"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(base[name], first[name]) for name in base)


@pytest.mark.parametrize(
    ("stage", "dtype", "lora"),
    [(1, "float32", None), (2, "bfloat16", None), (3, "float32", None), (3, "bfloat16", None), (3, "float32", {"rank": 2})],
)
def test_zero_stages_train_and_resume_bitwise_on_one_rank(here, stage, dtype, lora):
    changes = {"learner.kind": "deepspeed", "learner.zero_stage": stage, "model.dtype": dtype, "model.lora": lora, "teacher": {"ema": {"rate": 0.3}}}
    changes["learner.offload"] = stage == 2
    JUDGED.clear()
    by_text.stop_after = 0
    whole = train("opsd", "whole", **changes)
    by_text.stop_after = len(JUDGED) + len(JUDGED) // 2
    with pytest.raises(Preempted, match="SIGTERM"):
        train("opsd", "broken", **changes)
    by_text.stop_after = 0
    assert metrics(train("opsd", "broken", **changes)) == metrics(whole)
    gaps = [row["engine_gap_nats"] for row in metrics(whole)]
    assert max(gaps) < (1e-5 if dtype == "float32" else 0.02)  # the engine speaks with the learner's weights, also after updates


@pytest.mark.parametrize("method", ["alm", "gold", "gold_hybrid", "uld"])
def test_a_teacher_with_another_tokenizer(here, method):
    """A byte-pair teacher, whose chat template and tokens are its own: two steps, and scores of every answer."""
    stranger = train_byte_bpe(["7+8=15;15-9=6;6", "3+4=7;7+5=12;12", "9-4=5;5+6=11;11"] * 9, 280)
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(new_config(SHAPE, stranger)).save_pretrained("stranger")
    stranger.save_pretrained("stranger")
    JUDGED.clear()
    by_text.stop_after = 0
    folder = train(method, "strange", teacher={"external": {"path": "stranger", "tokenizer": "own"}})
    rows = metrics(folder)
    assert len(rows) == 2 and all(row["views/main"] == 1.0 and row["loss/distill"] > 0 for row in rows)
    first, second = (load_file(f"{name}/model.safetensors") for name in ("base", folder / "model"))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_replay_buffer_trains_and_resumes_bitwise(here):
    """Earlier answers come back with the log-probs of what drew them; the ratio to the present student is then far from 1."""
    changes = {"rollout.replay": {"max_age": 3, "fresh": 0.3}, "rollout.prompts": 4, "steps": 4, "group": 2, "learner.kind": "torch"}
    JUDGED.clear()
    by_text.stop_after = 0
    whole = train("opd", "whole", **changes)
    by_text.stop_after = len(JUDGED) + len(JUDGED) // 2 + 1
    with pytest.raises(Preempted, match="SIGTERM"):
        train("opd", "broken", **changes)
    by_text.stop_after = 0
    rows = metrics(train("opd", "broken", **changes))
    assert rows == metrics(whole)
    assert rows[0]["replay/share"] == 0.0 and sum(row["replay/share"] for row in rows) > 0.5
    for row in rows:
        older = row.get("replay/age_steps", 0.0) > 0
        assert (row["engine_gap_nats"] > 1e-3) == older and 0 <= row.get("replay/age_steps", 0.0) <= 3
