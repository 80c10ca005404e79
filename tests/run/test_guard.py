"""What a guard rail does to a run: warn, pause (and go on), roll back; alerts reach W&B; nothing changes for a run without alarms."""

import json
import shutil

import pytest
import torch
import wandb
import yaml
from safetensors.torch import load_file

from opd.api import train
from opd.cli import main
from opd.config.load import parse_recipe
from opd.errors import Paused
from opd.guard.action import last_good
from opd.replaying.bundle import weights_name
from opd.run.folder import read_lines
from opd.run.offline import read_offline

TINY = {
    "method": "opsd",
    "view": "facts",
    "model": {"shape": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}},
    "data": {"task": "expr"},
    "rollout": {"prompts": 3},
    "sampling": {"max_tokens": 8},
    "steps": 16,
    "eval": {"every": 0, "num_problems": 0, "final_problems": 0},
    "optimizer": {"lr": 1e-2},
    "checkpoint": {"every": 1, "keep": 50, "best": False},
    "learner": {"kind": "torch"},
    "track": {"wandb": "disabled", "samples_every": 0},
}
SURE = {"window": 1, "longer": 1e-9}  # holds from step 2 on, whatever the length
QUIET = {"action": "off"}


def run(folder, **keys):
    torch.set_num_threads(1)
    return train(parse_recipe({**TINY, **keys}), folder=folder, quiet=True)


def weights(folder, step):
    return weights_name(load_file(folder / f"checkpoints/step-{step:06d}/model/model.safetensors"))


def state(folder):
    return json.loads((folder / "status.json").read_text())["state"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain") / "r", guard=QUIET)


def without_times(folder):
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds", "rate/", "text/"))} for row in read_lines(folder / "metrics.jsonl")
    ]


def test_a_warning_is_written_once_and_changes_nothing(plain, tmp_path):
    folder = run(tmp_path / "r", guard={"action": "off", "rules": {"length_drift": {"action": "warn", **SURE}}})
    [alarm] = read_lines(folder / "guard.jsonl")
    assert (alarm["step"], alarm["rule"], alarm["action"]) == (2, "length_drift", "warn") and "answers went from" in alarm["message"]
    assert state(folder) == "finished" and without_times(folder) == without_times(plain)
    assert not (plain / "guard.jsonl").exists()
    rows = list(read_lines(folder / "metrics.jsonl"))
    assert {"text/distinct_2", "text/repeated_4", "text/duplicates", "text/style", "text/filler", "text/leak/main"} <= rows[0].keys()
    assert not [name for name in next(read_lines(plain / "metrics.jsonl")) if name.startswith("text/")]


def test_a_pause_stops_and_the_same_command_goes_on(plain, tmp_path):
    rules = {"action": "off", "rules": {"length_drift": {"action": "pause", **SURE}}}
    with pytest.raises(Paused, match="length_drift at step 2"):
        run(tmp_path / "r", guard=rules)
    assert state(tmp_path / "r") == "paused"
    folder = run(tmp_path / "r", guard=rules)
    assert state(folder) == "finished" and without_times(folder) == without_times(plain) and weights(folder, 16) == weights(plain, 16)
    assert len(list(read_lines(folder / "guard.jsonl"))) == 1, "it was looked at: the rule still holds and says nothing new"


def test_a_roll_back_takes_old_weights_and_new_questions(plain, tmp_path):
    late = {"action": "roll_back", "window": 6, "longer": 1e-9}  # two windows: from step 12 on
    folder = run(tmp_path / "r", guard={"action": "off", "rules": {"length_drift": late}, "rate_factor": 0.25})
    alarm, done = read_lines(folder / "guard.jsonl")
    assert (alarm["step"], done["action"], done["to"]) == (12, "rolled_back", 2)
    assert weights(folder, 11) == weights(plain, 11) and weights(folder, 12) == weights(plain, 2)
    rows = list(read_lines(folder / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 17)), "steps go on, nothing is done twice"
    assert {row["learning_rate"] for row in rows[:12]} == {1e-2} and {row["learning_rate"] for row in rows[12:]} == {2.5e-3}
    tokens = [row["tokens/student"] for row in rows]
    assert tokens == sorted(tokens) and state(folder) == "finished"


def test_a_roll_back_survives_a_resume(tmp_path):
    late = {"action": "roll_back", "window": 6, "longer": 1e-9}
    keys = {"guard": {"action": "off", "rules": {"length_drift": late}, "rate_factor": 0.25}}
    whole = run(tmp_path / "whole", **keys)
    run(tmp_path / "parts", **keys)
    for path in (tmp_path / "parts" / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > 13:
            shutil.rmtree(path)
    (tmp_path / "parts" / "status.json").write_text(json.dumps({"state": "preempted", "step": 13, "steps": 16, "why": ""}))
    parts = run(tmp_path / "parts", **keys)
    assert without_times(whole) == without_times(parts) and weights(whole, 16) == weights(parts, 16)


def test_without_a_good_checkpoint_it_pauses(tmp_path):
    rules = {"action": "off", "rules": {"length_drift": {"action": "roll_back", **SURE}}}
    with pytest.raises(Paused, match="no checkpoint is old enough"):
        run(tmp_path / "r", guard=rules)
    assert last_good(tmp_path / "r", 2) is None


def test_the_command_line_says_paused_with_a_status_of_its_own(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rules = {"action": "off", "rules": {"length_drift": {"action": "pause", **SURE}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**TINY, "guard": rules}))
    assert main(["train", "r.yaml", "name=r"]) == 3
    assert "paused by guard rail length_drift at step 2" in capfd.readouterr().err
    assert main(["train", "r.yaml", "name=other", "guard.rules={leek: pause}"]) == 2
    assert "did you mean 'leak'?" in capfd.readouterr().err and not (tmp_path / "runs/other").exists()


@pytest.mark.slow
def test_alerts_reach_wandb(tmp_path):
    keys = {"track": {"wandb": "offline", "samples_every": 0}, "steps": 3}
    folder = run(tmp_path / "r", guard={"action": "off", "rules": {"length_drift": {"action": "warn", **SURE}}}, **keys)
    [file] = (folder / "wandb").glob("offline-run*/*.wandb")
    wandb.teardown()  # its service has then written everything
    [(title, text)] = read_offline(file).alerts
    assert title == "r: length_drift" and "step 2" in text
