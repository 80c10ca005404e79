"""Names of the hub, from end to end: huggingface_hub, transformers and datasets run their own code against a stand-in of the hub on loopback.

HF_ENDPOINT is read when those libraries are imported, so the commands run in a process of their own, several in one.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import TOKEN, fake_hub

from opd.preflight import hub as preflight_hub
from opd.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
EXAM = [{"question": f"{n}+1", "answer": f"{n} and one more #### {n + 1}"} for n in range(6)]
CONFIGS = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
---
"""
RECIPE = """
method: grpo
model: {path: tiny/expr-base}
data: {path: tiny/sums, columns: {question: asked, answer: gold}, verifier: exact}
rollout: {prompts: 2}
group: 2
sampling: {max_tokens: 24}
learner: {kind: torch}
eval: {num_problems: 4, final_problems: 4, final_samples: 2}
track: {wandb: disabled}
"""
DISTILL = """
method: opd_full
teacher: {{external: {{path: tiny/expr-teacher}}}}
model: {{path: {student}}}
data: {{task: expr}}
sampling: {{max_tokens: 40}}
rollout: {{prompts: 8, source: {{dataset: solution}}}}
group: 1
objective: [{{distill: forward_kl, support: {{teacher_topk: {{k: 8}}}}}}]
steps: 1
learner: {{kind: torch}}
eval: {{num_problems: 0, final_problems: 0}}
track: {{wandb: disabled}}
"""
COMMANDS = """
import contextlib, io, json, sys
from opd.cli import main
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(words)
    print(json.dumps([status, out.getvalue()]))
"""


@pytest.fixture
def hub(tmp_path):
    root = tmp_path / "hub"
    shutil.copytree(ROOT / "models/expr-base", root / "models/tiny/expr-base")
    folder = root / "datasets/openai/gsm8k"
    (folder / "main").mkdir(parents=True)
    (folder / "README.md").write_text(CONFIGS)
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(EXAM), folder / f"main/{split}-00000-of-00001.parquet")
    (root / "datasets/tiny/sums").mkdir(parents=True)
    task = TASKS["expr"]
    prompts = task.prompts("train", 0, task.difficulties[0])
    lines = [{"asked": p.messages[-1]["content"], "gold": p.answer, "note": "n"} for p, _ in zip(prompts, range(40), strict=False)]
    (root / "datasets/tiny/sums/train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with fake_hub(root) as served:
        yield served


def run(hub, folder, *commands, **environment):
    """(status, what was said) of opd commands, one after the other in a process that knows no other hub."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    words = [sys.executable, "-c", COMMANDS, json.dumps([shlex.split(command) for command in commands])]
    done = subprocess.run(words, env=os.environ | given | environment, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(commands), done.stderr
    return [tuple(json.loads(line)) for line in lines]


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_models_and_data_sets_of_the_hub_are_examined_trained_on_and_pushed(hub, tmp_path):
    suite = "suite=gsm8k suite.temperature=0 suite.max_tokens=8"
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(record) + "\n" for record in EXAM))
    own = "data.path=tiny/sums data.columns='{question: asked, answer: gold}' data.verifier=exact sampling.max_tokens=24 eval.final_problems=4"
    said = run(
        hub, tmp_path / "online",
        f"eval tiny/expr-base {suite} out=hub",
        f"eval {ROOT}/models/expr-base {suite} suite.path={tmp_path}/exam.jsonl out=here",
        "check recipe.yaml",
        "train recipe.yaml steps=1 name=first",
        "train recipe.yaml steps=1 name=streamed data.stream=true",
        "publish runs/first repo=me/done private=false",
        f"eval me/done {own} out=pushed",
        f"eval runs/first/model {own} out=chosen",
    )  # fmt: skip
    assert [status for status, _ in said] == [0] * 8, said
    at = tmp_path / "online"
    examined = [(at / name, row) for name in ("hub", "here") for row in rows(at / name / "eval.jsonl")]
    texts = [[(line["problem"], line["text"]) for line in rows(folder / row["generations"])] for folder, row in examined]
    assert texts[0] == texts[1] and len(texts[0]) == 6
    assert "6 problems, where the public suite has 1319" in said[0][1] and "memory on this" in said[2][1]
    assert [row["n_problems"] for row in rows(at / "runs/first/eval.jsonl")] and (at / "runs/streamed/model/config.json").is_file()
    assert [wish["name"] for wish in hub.created] == ["done"] and hub.created[0]["visibility"] == "public"
    pushed = hub.root / "models/me/done"
    assert (pushed / "model.safetensors").read_bytes() == (at / "runs/first/model/model.safetensors").read_bytes()
    assert "base_model: tiny/expr-base" in (pushed / "README.md").read_text()
    same = ("avg@k", "pass@k", "tokens", "n_problems")
    found = [[[row[key] for key in same] for row in rows(at / name / "eval.jsonl")] for name in ("pushed", "chosen")]
    assert found[0] == found[1]

    before = len(hub.asked)
    [(status, text)] = run(hub, at, f"eval tiny/expr-base {suite} out=offline", HF_HUB_OFFLINE="1")
    assert status == 0 and len(hub.asked) == before, text  # from the cache alone
    hub.commit = "fedcba9876" * 4  # somebody pushed new weights under the same name
    [(status, text)] = run(hub, at, "train recipe.yaml steps=2 name=first")
    assert status == 2 and "the model that it started from" in text, text


@pytest.mark.slow
def test_scores_on_file_are_of_one_commit_of_a_hub_teacher(hub, tmp_path):
    shutil.copytree(ROOT / "models/expr-teacher", hub.root / "models/tiny/expr-teacher")
    at, file = tmp_path / "work", "signals.main.scores=scores.sqlite"
    at.mkdir()
    (at / "kd.yaml").write_text(DISTILL.format(student=ROOT / "models/expr-base"))
    old, new = hub.commit, "fedcba9876" * 4
    said = run(hub, at, "score kd.yaml out=scores.sqlite", f"train kd.yaml name=same {file}")
    assert [status for status, _ in said] == [0, 0], said
    [(status, text)] = run(hub, at, f"train kd.yaml name=offline {file}", HF_HUB_OFFLINE="1")
    assert status == 0, text

    hub.commit = new  # somebody pushed other weights under the same name
    refused, scored, again = run(hub, at, f"train kd.yaml name=moved {file}", "score kd.yaml out=scores.sqlite", f"train kd.yaml name=moved {file}")
    assert refused[0] == 2 and f"it holds scores of: tiny/expr-teacher@{old}" in refused[1] and f"teacher is tiny/expr-teacher@{new}" in refused[1]
    assert scored[0] == again[0] == 0 and "8 answers scored, 8 stored" in scored[1], (scored, again)


@pytest.mark.slow
def test_what_the_hub_refuses_is_said_in_a_sentence(hub, tmp_path):
    hub.gated = {"Idavidrein/gpqa", "tiny/closed"}
    commands = {
        "eval tiny/expr-bsae suite=gsm8k": "cannot load 'tiny/expr-bsae'",
        "eval tiny/closed suite=gsm8k": "cannot load 'tiny/closed'",
        "eval tiny/expr-base suite=gpqa_diamond": "gated: accept its terms on the hub and log in once",
        "eval tiny/expr-base suite=aime25": "'MathArena/aime_2025' is no file here",
        "train recipe.yaml data.path=tiny/smus": "Check the name, data.subset and data.split",
        "train recipe.yaml data.path=openai/gsm8k data.subset=mian data.columns={}": "subset mian",
        "train recipe.yaml data.path=openai/gsm8k data.subset=main data.split=dev data.columns={}": "split dev",
        "train recipe.yaml data.columns='{question: akse}'": "tiny/sums/train[0]: no column 'akse' (did you mean 'asked'?)",
        "check recipe.yaml model.path=tiny/expr-bsae": "cannot load 'tiny/expr-bsae'",
    }
    for (command, message), (status, said) in zip(commands.items(), run(hub, tmp_path / "work", *commands), strict=True):
        assert status == 2 and message in said and "Traceback" not in said, (command, said)
    assert not (tmp_path / "work/runs").exists()


def test_a_mirror_is_asked_whether_it_is_there(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(preflight_hub, "getproxies", dict)
    monkeypatch.setattr(preflight_hub.constants, "ENDPOINT", hub.url)
    assert preflight_hub.hub_answers()
    monkeypatch.setattr(preflight_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not preflight_hub.hub_answers()
    monkeypatch.setattr(preflight_hub, "getproxies", lambda: {"http": "http://proxy:3128"})
    monkeypatch.setattr(preflight_hub, "proxy_bypass", lambda host: False)
    assert preflight_hub.hub_answers()
