"""Several learner ranks over one vLLM actor that the launcher owns: the real Ray and the real vLLM, in processes of their own."""

import json
import time

import pytest
import yaml
from pytest import approx

from tests.run.launched import TINY, kill, lines, opd, start, started_in, survivors, wait_for

pytestmark = pytest.mark.slow
SHAPE = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # the smallest that vLLM runs
CHANGES = {
    "model": {"shape": SHAPE},
    "engine": {"kind": "vllm"},
    "steps": 2,
    "eval": {"every": 0, "num_problems": 2, "final_problems": 0},
    "launch": {"deadline_seconds": 150},
}


def train(folder, *words):
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "r.yaml").write_text(yaml.safe_dump({**TINY, **CHANGES}))
    return ["train", "r.yaml", f"engine.exchange={folder}/weights", *words]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    code, said = opd(folder, *train(folder, "name=run"))
    assert code == 0, said
    return lines(folder / "runs/run/metrics.jsonl")


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_over_one_actor_train_as_one(tmp_path, alone, stage):
    process, statuses = start(tmp_path, *train(tmp_path, "name=run", "learner.ranks=2", f"learner.zero_stage={stage}")), []
    while process.poll() is None:
        if (path := tmp_path / "runs/run/status.json").is_file() and (now := json.loads(path.read_text())) not in statuses[-1:]:
            statuses.append(now)
        time.sleep(0.02)
    assert process.returncode == 0
    roles = [status["roles"] for status in statuses if "student-0" in status["roles"]]
    assert {"rank 0", "rank 1", "student-0"} <= set(roles[-1])
    assert {role["student-0"]["state"] for role in roles} <= {"generating", "updating", "idle"}
    words = [status["waits"] for status in statuses if "student-0" in status["roles"]]
    assert all("student-0 (" in said or "learner (" in said for said in words), words  # which of the two waits when it is written is chance
    assert "student-0" not in statuses[-1]["roles"] and statuses[-1]["state"] == "finished"
    shared = lines(tmp_path / "runs/run/metrics.jsonl")
    assert len(shared) == len(alone) == 2
    for one, two in zip(alone, shared, strict=True):
        assert two["loss/total"] == approx(one["loss/total"], rel=1e-3, abs=1e-6)
        assert two["tokens/student"] == one["tokens/student"] and two["tokens/learner"] == one["tokens/learner"]
        assert two["engine_gap_nats"] < 1e-4  # the second step's answers came from the first step's weights
    assert survivors(tmp_path) == [] and list((tmp_path / "weights").iterdir()) == []


def test_a_killed_launcher_takes_ray_the_actor_and_the_weights_along_and_the_run_resumes(tmp_path):
    words = train(tmp_path, "name=run", "learner.ranks=2", "steps=40", "checkpoint.every=2")
    process, run = start(tmp_path, *words), tmp_path / "runs/run"
    wait_for(lambda: len(lines(run / "metrics.jsonl")) >= 4)
    assert len(started_in(tmp_path)) > 5 and list((tmp_path / "weights").iterdir())
    kill(process.pid)
    process.wait()
    assert survivors(tmp_path) == [] and list((tmp_path / "weights").iterdir()) == []
    code, said = opd(tmp_path, *words)
    assert code == 0 and "resumed after step" in said, said
    ledger = lines(run / "ledger.jsonl")
    assert [row["step"] for row in ledger] == list(range(1, 41)) and [row["drawn"] for row in ledger] == [4 * row["step"] for row in ledger]
    assert survivors(tmp_path) == [] and list((tmp_path / "weights").iterdir()) == []
