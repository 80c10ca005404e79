"""A server as the engine: what is sent, what comes back, what is said when it fails; and a real vLLM server on a CPU."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from fake_server import fake_server
from opd_rollout.server_engine import ServerEngine, ServerSettings
from opd_rollout.types import GenerateRequest, Sampling

from opd.cli import main

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = Sampling(temperature=0.6, top_p=0.95, top_k=20, max_tokens=7, stop_ids=(4,))


def engine(url, **more):
    return ServerEngine(ServerSettings(url=url, **more), "m")


def test_answers_come_back_in_order_and_every_setting_is_sent():
    with fake_server() as (url, seen):
        answers = engine(url, concurrency=4).generate([GenerateRequest(prompt_ids=(5, n), seed=100 + n) for n in range(20)], SAMPLING)
    assert [answer.token_ids for answer in answers] == [(n + 1, 4) for n in range(20)]
    assert answers[0].finish == "stop" and answers[0].logprobs.isnan().all()
    sent = next(request for request in seen if request["prompt"] == [5, 3])
    expected = {"seed": 103, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 7, "stop_token_ids": [4], "return_token_ids": True}
    assert {key: sent[key] for key in expected} == expected and sent["model"] == "m"


def test_a_busy_server_is_asked_again_and_a_refusal_is_not():
    request = [GenerateRequest(prompt_ids=(1,), seed=1)]
    with fake_server(statuses=(503,)) as (url, seen):
        assert engine(url).generate(request, SAMPLING)[0].token_ids == (2, 4) and len(seen) == 2
    with fake_server(statuses=(400,)) as (url, seen):
        with pytest.raises(ValueError, match="refuses a request .status 400"):
            engine(url).generate(request, SAMPLING)
        assert len(seen) == 1
    with fake_server(statuses=(500, 500, 500)) as (url, seen), pytest.raises(RuntimeError, match="no answer in 2 attempts .status 500"):
        engine(url, attempts=2).generate(request, SAMPLING)


def test_what_is_no_such_server_is_named():
    with fake_server(tokens=False) as (url, _), pytest.raises(ValueError, match="returns no token ids: use vLLM 0.10.2"):
        engine(url).generate([GenerateRequest(prompt_ids=(1,), seed=1)], SAMPLING)
    with fake_server(models=()) as (url, _), pytest.raises(ValueError, match="no server of models.*ends in /v1"):
        engine(url)
    with pytest.raises(ValueError, match="nothing answers at .*vllm serve MODEL"):
        engine("http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="write server=http"):
        engine("127.0.0.1:9")
    with fake_server() as (url, _):
        with pytest.raises(ValueError, match="does not score"):
            engine(url).score([], 1.0)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory):
    if not find_spec("vllm"):
        pytest.skip("vLLM is not installed: no real server to examine")
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(ROOT / "models/expr-base"), "--host", "127.0.0.1"]
    words += ["--port", str(port), "--enforce-eager", "--dtype", "float32", "--max-model-len", "128", "--kv-cache-memory-bytes", str(64 << 20)]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, env=environment, start_new_session=True)
    url, ends = f"http://127.0.0.1:{port}/v1", time.monotonic() + 300
    try:
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < ends, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).close()
                break
            except OSError:
                time.sleep(1.0)
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


@pytest.mark.slow
def test_a_real_vllm_server_answers_greedily_as_this_process_does(vllm_server, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["eval", str(ROOT / "models/expr-base"), "data.task=expr", "eval.final_problems=64", "eval.final_samples=4"]
    assert main([*words, "out=here", "learner.kind=torch"]) == 0
    assert main([*words, "out=there", f"server={vllm_server}"]) == 0
    assert capfd.readouterr().out.count("expr test, greedy: avg@1 ") == 2
    name = "generations/expr-test-{}-step-000000.jsonl"
    here, there = ([json.loads(line) for line in (tmp_path / where / name.format("greedy")).read_text().splitlines()] for where in ("here", "there"))
    assert [line["text"] for line in here] == [line["text"] for line in there] and len(here) == 64
    sampled = [json.loads(line) for line in (tmp_path / "there" / name.format("temperature-1.0")).read_text().splitlines()]
    right = sum(line["correct"] for line in sampled) / len(sampled)
    assert len(sampled) == 256 and 0.45 < right < 0.8  # 0.64 is this base's, 0.05 the standard error over problems
    assert {line["finish"] for line in sampled} <= {"stop", "length"}
