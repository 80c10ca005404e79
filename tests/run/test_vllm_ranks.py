"""Several learner ranks over one vLLM actor that the launcher owns: the real Ray and the real vLLM, in processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from opd_rollout.vllm_cluster import find_cluster
from pytest import approx

from tests.run.launched import NEWEST, TINY, finish, kill, lines, opd, start, started_in, survivors, wait_for

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # the smallest that vLLM runs
FEWER = "lower engine.replicas or free some"
CHANGES = {
    "model": {"shape": SHAPE},
    "engine": {"kind": "vllm"},
    "steps": 2,
    "eval": {"every": 0, "num_problems": 2, "final_problems": 0},
    "launch": {"deadline_seconds": 150},
}


def train(folder, *words, changes=None):
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "r.yaml").write_text(yaml.safe_dump({**TINY, **CHANGES, **(changes or {})}))
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


def test_two_workers_that_share_a_model_write_and_learn_as_one(tmp_path, alone):
    """tensor_parallel without a GPU: every worker takes its shard of the weights out of the file."""
    code, said = opd(tmp_path, *train(tmp_path, "name=run", "engine.tensor_parallel=2"))
    assert code == 0, said
    for one, two in zip(alone, lines(tmp_path / "runs/run/metrics.jsonl"), strict=True):
        assert two["loss/total"] == approx(one["loss/total"], rel=1e-3, abs=1e-6)
        assert two["tokens/student"] == one["tokens/student"] and two["engine_gap_nats"] < 1e-4
    assert survivors(tmp_path) == [] and list((tmp_path / "weights").iterdir()) == []


def test_two_ranks_send_lora_factors_alone_whole_or_partitioned(tmp_path):
    """The base model's folder and rank 4: ZeRO 3 gathers the factors, ZeRO 0 has them; the actor becomes the learner in both, by the same steps."""
    adapted, found = {"model": {"path": str(ROOT / "models/expr-base"), "lora": {"rank": 4}}}, []
    for stage in (0, 3):
        words = train(tmp_path, f"name=zero-{stage}", "learner.ranks=2", f"learner.zero_stage={stage}", "engine.lora=adapters", changes=adapted)
        code, said = opd(tmp_path, *words)
        assert code == 0, said
        found.append(lines(tmp_path / f"runs/zero-{stage}/metrics.jsonl"))
    for whole, parted in zip(*found, strict=True):
        assert parted["loss/total"] == approx(whole["loss/total"], rel=1e-3, abs=1e-5)
        assert parted["tokens/student"] == whole["tokens/student"] and max(whole["engine_gap_nats"], parted["engine_gap_nats"]) < 1e-4
    assert found[0][0]["gradient_norm"] > 0, "the factors moved between the versions"
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


class Cluster:
    """A real one of two CPUs, as a user starts it, on the loopback interface."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            port, client = one.getsockname()[1], other.getsockname()[1]
        self.address, self.folder = f"127.0.0.1:{port}", folder
        words = ["start", "--head", "--block", f"--port={port}", f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
        words += ["--object-store-memory=80000000", "--include-dashboard=false", f"--temp-dir={folder}", "--disable-usage-stats"]
        environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        self.process, self.own = subprocess.Popen(command, env=environment, start_new_session=True, **silent), {}

    def wait(self):
        soon(self.answers)
        self.own = soon(lambda: len(found := self.members()) >= 5 and found)

    def answers(self):
        try:
            return find_cluster(self.address) == (self.address, True)
        except ValueError:
            return False

    def members(self):
        """pid -> command line of the cluster's processes, actors too: Ray starts all of them in its own session."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(int(entry.name)) == self.process.pid and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def actors(self):
        return [pid for pid, line in self.members().items() if "VllmActor" in line]

    def close(self):
        for pid in [self.process.pid, *self.members()]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def cluster():
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Cluster(folder)
        try:
            made.wait()
            yield made
        finally:
            made.close()


def soon(condition):
    """Whatever has ended meanwhile."""
    NEWEST.clear()
    return wait_for(condition, 100)


def test_runs_on_a_cluster_that_runs_already_train_as_on_their_own_and_leave_it_as_it_was(tmp_path, alone, cluster):
    """Two at once, a third one that finds no room, then one whose driver dies by SIGKILL; no token and no variable of Ray's is set by hand."""
    folders = [tmp_path / name for name in ("several", "one", "third")]
    for folder in folders:
        folder.mkdir()
    several, one, third = folders
    words = [train(several, "name=run", "learner.ranks=2", "ray.address=auto"), train(one, "name=run", f"ray.address={cluster.address}")]
    both = [(start(several, *words[0], RAY_ADDRESS=cluster.address), several), (start(one, *words[1]), one)]
    wait_for(lambda: len(cluster.actors()) == 2)
    code, said = opd(third, *train(third, "name=run", f"ray.address={cluster.address}"))
    assert (code, said) == (2, f"opd: the Ray cluster at {cluster.address} offers 0 free CPUs, and 1 actors need one each; {FEWER}\n")
    assert not (third / "runs").exists()
    for process, folder in both:
        code, said = finish(process, folder)
        assert code == 0, said
        assert survivors(folder) == [] and list((folder / "weights").iterdir()) == []
        trained = lines(folder / "runs/run/metrics.jsonl")
        assert [row["tokens/student"] for row in trained] == [row["tokens/student"] for row in alone]
        assert [row["loss/total"] for row in trained] == approx([row["loss/total"] for row in alone], rel=1e-3, abs=1e-6)
    soon(lambda: cluster.actors() == [])
    assert set(cluster.own) <= set(cluster.members()), "the cluster's own processes are the same"
    process = start(third, *train(third, "name=run", "steps=200", f"ray.address={cluster.address}"))
    wait_for(lambda: len(lines(third / "runs/run/metrics.jsonl")) >= 2)
    [actor] = cluster.actors()
    kill(process.pid)
    process.wait()
    soon(lambda: cluster.actors() == [] and not Path(f"/proc/{actor}").exists())
    assert survivors(third) == [] and set(cluster.own) <= set(cluster.members())
