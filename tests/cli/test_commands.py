"""The commands that read: help, show, and what a train command leaves behind when a budget ends it."""

import json
import os
import subprocess
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import yaml

from opd.cli import USAGE, main
from opd.config.load import parse_recipe
from opd.overview import recipe_files

TINY = {
    "method": "rloo",
    "model": {"shape": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}},
    "data": {"task": "expr"},
    "rollout": {"prompts": 2},
    "sampling": {"max_tokens": 8},
    "steps": 50,
    "eval": {"every": 3, "num_problems": 2, "final_problems": 2, "final_samples": 2},
    "checkpoint": {"every": 2, "keep": 2, "best": False},
    "learner": {"kind": "torch"},
    "track": {"wandb": "disabled", "samples_every": 0},
}


@pytest.mark.parametrize("words", [[], ["help"], ["--help"]])
def test_help(words, capfd):
    assert main(words) == 0 and capfd.readouterr().out == USAGE


@pytest.mark.parametrize("path", [path for kind in ("methods", "runs") for path in recipe_files(kind)], ids=lambda path: path.stem)
def test_show_prints_every_default_of_every_recipe_as_a_recipe(path, capfd):
    assert main(["show", path.stem]) == 0
    for document in capfd.readouterr().out.split("# " + str(path))[1:]:
        shown = yaml.safe_load(document.partition("\n")[2])
        again = parse_recipe(shown, resolved=True)
        assert again.model_dump(mode="json") == shown and shown["learner"]["max_skipped"] == 5


def test_show_alone_lists_methods_recipes_and_runs(tmp_path, monkeypatch, capfd):
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/status.json").write_text(json.dumps({"state": "preempted", "step": 3, "steps": 9, "why": "preempted (SIGTERM)"}))
    monkeypatch.chdir(tmp_path)
    assert main(["show"]) == 0
    out = capfd.readouterr().out
    assert "opsd" in out and "gsm8k_tiny" in out and "mine" in out and "preempted at step 3/9" in out


def test_a_reader_that_has_seen_enough_is_no_error(request):
    code = "import sys; from opd.cli import main; sys.exit(main(['show', 'opsd']))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(request.config.rootpath / part) for part in (".", "rollout", "kernels"))}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert process.wait(timeout=120) == 0 and process.stderr.read() == b""


def test_a_budget_ends_a_run_with_everything_a_last_step_has(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    words = ["train", "tiny.yaml", "name=b", "budget.generated_tokens=300"]
    assert main(words) == 0
    said = capfd.readouterr()
    assert said.out.startswith("run folder: runs/b\n") and "budget of 300 generated tokens used" in said.err
    folder = tmp_path / "runs/b"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]["step"]
    assert rows[-2]["tokens/student"] < 300 <= rows[-1]["tokens/student"] and 3 < last < 50
    evaluations = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    dev = [row["step"] for row in evaluations if row["split"] == "dev"]
    assert dev == [0, *(step for step in range(3, last, 3)), last]
    assert [(row["step"], row["decoding"]) for row in evaluations if row["split"] == "test"] == [(last, "temperature 1.0"), (last, "greedy")]
    assert [path.name for path in (folder / "samples").iterdir()] == [f"step-{last:06d}.jsonl"]
    kept = sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())
    assert kept == [last - 2 + last % 2, last] if last % 2 else [last - 2, last]
    for row in evaluations:
        assert len((folder / row["generations"]).read_text().splitlines()) == row["n_problems"] * row["k"]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert main(words) == 0 and "is finished: nothing to do" in capfd.readouterr().err
