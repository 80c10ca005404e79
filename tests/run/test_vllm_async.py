"""Answers ahead of the learner with the real vLLM: one actor with AsyncLLM, whose engine is a process of its own, for the whole module."""

import json
import math
import os
import re
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import torch
from opd_rollout.sampling import request_seed
from opd_rollout.types import GenerateRequest, Sampling, ScoreRequest
from opd_rollout.vllm_engine import VllmEngine

import opd.api
from opd import loop_async
from opd.ahead import Ahead
from opd.api import replace, train_rank
from opd.build.problems import load_problems
from opd.build.system import actors_of, build_parts
from opd.config.load import load_recipe
from opd.credit import SequenceSignals
from opd.objective.fields import span_ratio
from opd.pooling import alone
from opd.run.folder import read_lines
from opd.run.live import LiveView, PhaseClock, Status, StopRequest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
OVERRIDES = {
    "engine.kind": "vllm", "engine.mode": "async", "engine.chunk": 8, "engine.deadline_seconds": 200, "asynchrony.max_staleness": 1,
    "asynchrony.in_flight": True, "eval.num_problems": 4, "eval.every": 0, "eval.final_problems": 0, "track.wandb": "disabled",
    "learner.kind": "torch", "optimizer.lr": 1e-3, "model.path": str(ROOT / "models/expr-base"), "steps": 3,
}  # fmt: skip


def recipe(**changes):
    return load_recipe(str(ROOT / "recipes/runs/opsd_expr.yaml"), {**OVERRIDES, **changes})


@pytest.fixture(scope="module")
def actors():
    torch.set_num_threads(1)
    with actors_of(recipe()) as where:
        yield where


@contextmanager
def seen(look):
    """What `look` shows during the block, over and over."""
    found, over = [], threading.Event()

    def watch():
        while not over.wait(0.005):
            if found[-1:] != [now := look()]:
                found.append(now)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join(timeout=10)


def trained(folder, actors, **changes):
    """A run on the module's actor."""
    asked = recipe(**changes)
    clock = PhaseClock(Status(folder / "status.json", asked.steps), StopRequest())
    train_rank(folder, asked, clock, LiveView("run", asked.steps, quiet=True), actors=actors.as_dict())
    return list(read_lines(folder / "metrics.jsonl")), list(read_lines(folder / "ledger.jsonl"))


@pytest.fixture
def spoken(monkeypatch):
    """Every call of `generate`: its requests and what came back."""
    calls, generate = [], VllmEngine.generate

    def recorded(self, requests, sampling):
        calls.append((list(requests), generate(self, requests, sampling)))
        return calls[-1][1]

    monkeypatch.setattr(VllmEngine, "generate", recorded)
    return calls


def ahead_of_nothing(asked, system, run, clock):
    ahead = Ahead(system.source, clock.check)
    try:
        return loop_async.train(replace(system, source=ahead), ahead, run, asked.steps, loop_async.Asynchrony(max_staleness=0))
    finally:
        ahead.close()


def test_with_staleness_0_the_same_requests_in_the_same_order_bring_the_synchronous_loops_log_probs(tmp_path, actors, spoken, monkeypatch):
    plain = {"asynchrony.max_staleness": 0, "asynchrony.in_flight": False}
    rows, ledger = trained(tmp_path / "plain", actors, **plain)
    synchronous = spoken.copy()
    spoken.clear()
    monkeypatch.setattr(opd.api, "train_as_asked", ahead_of_nothing)
    ahead_rows, ahead_ledger = trained(tmp_path / "ahead", actors, **plain)
    assert ahead_ledger == ledger and len(spoken) == len(synchronous) >= 3
    versions = set()
    for (asked, drawn), (others, expected) in zip(spoken, synchronous, strict=True):
        assert asked == others
        for one, other in zip(drawn, expected, strict=True):
            assert one.token_ids == other.token_ids and one.versions == other.versions
            assert torch.allclose(one.logprobs, other.logprobs, atol=1e-4, rtol=0)
            versions |= {version for version, _, _ in one.versions}
    assert versions >= {0, 1, 2}, "each step's answers come from that step's weights"
    assert [row["loss/total"] for row in ahead_rows] == pytest.approx([row["loss/total"] for row in rows], rel=1e-3)
    assert {row["staleness/mean"] for row in ahead_rows} == {0.0}


def pid(actors):
    [name] = actors.names["student"]
    return ray.get(ray.get_actor(name, namespace=actors.namespace).pid.remote(), timeout=100)


def test_an_actor_killed_while_it_answers_ahead_of_the_learner_is_replaced(tmp_path, actors):
    """SIGKILL of the actor's process: requests with the same seeds again, each prompt once, nothing older than the bound."""
    victim = pid(actors)
    folder, steps = tmp_path / "run", 8

    def kill():
        wait_for(lambda: len(list(read_lines(folder / "metrics.jsonl"))) >= 2)
        os.kill(victim, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with seen(lambda: json.loads((folder / "status.json").read_text()) if (folder / "status.json").is_file() else {}) as statuses:
        rows, ledger = trained(folder, actors, steps=steps)
    thread.join(timeout=10)
    assert not Path(f"/proc/{victim}").exists() and pid(actors) != victim
    assert [row["step"] for row in ledger] == list(range(1, steps + 1))
    asked = load_problems(recipe(), None).stream.take(32 * steps)
    assert [row["prompts"] for row in ledger] == [list(dict.fromkeys(p.id for p in asked[32 * n : 32 * n + 32])) for n in range(steps)]
    assert [row["drawn"] for row in ledger] == [32 * row["step"] for row in ledger]
    assert all(0 <= row["staleness/mean"] <= 1 and row["staleness/dropped_groups"] == 0 for row in rows)
    assert any(row["staleness/mean"] > 0 for row in rows), "answers were written ahead"
    assert rows[-1]["seconds/rollout/ahead"] > 0
    roles = [status["roles"] for status in statuses if "roles" in status]
    assert {"restarting", "generating"} <= {role["student-0"]["state"] for role in roles}
    assert any(role["student-0"]["waiting"] + role["student-0"]["in_flight"] == 32 for role in roles), "requests of a step, waiting or at the actor"
    waits = "\n".join(status.get("waits", "") for status in statuses)
    kept = r"learner \((rollout|sync) [\d.]+ s\) waits for student-0 \(restarting [\d.]+ s\); \d finished batches wait .*, \d begun"
    assert re.search(kept, waits), waits
    assert all(status["next"] for status in statuses if status.get("state") == "running" and status["step"])


@pytest.fixture
def parts(actors):
    """Learner, source and engine of an untrained student."""
    built = build_parts(recipe(), actors=actors)
    yield built
    built.engine.close()


def learners_logprobs(parts, asked, drawn):
    wanted = [ScoreRequest(context_ids=r.prompt_ids, completion_ids=c.token_ids) for r, c in zip(asked, drawn, strict=True)]
    return [one.sampled for one in parts.learner.teacher_pass(wanted, "live")]


def test_weights_that_change_in_mid_answer_mark_every_token_with_the_version_that_drew_it(parts):
    """One thread generates, another one updates twice; each span's log-probs are those of its version's learner, and so its ratio is one."""
    asked = [GenerateRequest(prompt_ids=parts.encode(p), seed=request_seed(3, p.id, n, 0)) for n, p in enumerate(parts.source._stream.take(24))]
    drawn, before, engine, model = [], parts.engine.counts["reissued"], parts.engine, parts.learner.policy.model
    thread = threading.Thread(target=lambda: drawn.extend(engine.generate(asked, Sampling(max_tokens=100))))
    assert [(one.name, one.state) for one in engine.status()[1]] == [("student-0", "idle")]
    weights = {parts.learner.version: {name: p.detach().clone() for name, p in model.named_parameters()}}
    thread.start()
    with seen(lambda: engine.status()[1][0].state) as states:
        update_twice(parts, weights)
    assert {"generating", "updating"} <= set(states)
    thread.join(timeout=200)
    assert engine.status() == (0, [replace(engine.status()[1][0], state="idle", in_flight=0)])
    check_spans(parts, asked, drawn, weights, before)


def update_twice(parts, weights):
    """Two versions, each while answers are under way."""
    engine, model = parts.engine, parts.learner.policy.model
    for version in (1, 2):
        wait_for(lambda: engine.status()[1][0].in_flight > 0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
        parts.learner.version = version
        weights[version] = {name: p.detach().clone() for name, p in model.named_parameters()}
        engine.load_weights(parts.learner.weights(version))


def check_spans(parts, asked, drawn, weights, before):
    engine, model = parts.engine, parts.learner.policy.model
    assert len(drawn) == 24 and engine.counts["reissued"] == before, "no request was refused for weights that changed under way"
    mixed = [index for index, completion in enumerate(drawn) if len(completion.versions) > 1]
    assert mixed, "no answer was under way: the test says nothing"
    for version, named in weights.items():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(named[name])
        own = learners_logprobs(parts, asked, drawn)
        for index, (logp, completion) in enumerate(zip(own, drawn, strict=True)):
            [ratio] = span_ratio([signals(logp, completion)], alone, low=0.0, high=1e9)
            for drew, start, end in completion.versions:
                same = torch.allclose(logp[start:end], completion.logprobs[start:end], atol=1e-4, rtol=0)
                assert same or drew != version, f"answer {index}, tokens {start} to {end}, version {drew}"
                gap = (logp - completion.logprobs)[start:end].double().mean()
                assert torch.allclose(ratio[start:end].double(), gap.exp(), rtol=1e-5)
                assert drew == version or end - start < 8 or abs(gap) > 1e-3, "the versions differ, else nothing is shown"


def test_lora_factors_alone_make_the_actor_the_learner(actors):
    """Over the base model's folder, without a word of its weights: a hundredth of the bytes, the same log-probs, a version of its own each."""
    synchronous = {"asynchrony.max_staleness": 0, "asynchrony.in_flight": False, "engine.mode": "offline"}
    parts = build_parts(recipe(**synchronous, **{"model.lora.rank": 4, "engine.lora": "adapters"}), actors=actors)
    asked = [GenerateRequest(prompt_ids=parts.encode(p), seed=request_seed(3, p.id, n, 0)) for n, p in enumerate(parts.source._stream.take(12))]
    model, before = parts.learner.policy.model, None
    for version in (0, 1, 2):
        if version:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape) if ".lora_" in name else 0.0)
            parts.learner.version = version
            parts.engine.load_weights(parts.learner.weights(version))
        drawn = parts.engine.generate(asked, Sampling(max_tokens=24, stop_ids=parts.stop_ids))
        assert {v for c in drawn for v, _, _ in c.versions} == {version} and parts.engine.last_gap.mean < 1e-4
        for own, theirs in zip(learners_logprobs(parts, asked, drawn), drawn, strict=True):
            assert torch.allclose(own, theirs.logprobs, atol=1e-4, rtol=0)
        assert before is None or max((a - b).abs().max() for a, b in zip(learners_logprobs(parts, asked, before), own_of(before), strict=True)) > 1e-2
        before = drawn
    sent = parts.learner.weights(3).metadata()
    assert all(".lora_" in name for name in sent.names)
    assert sum(math.prod(shape) for shape in sent.shapes) < 0.1 * parts.num_parameters
    victim = pid(actors)
    os.kill(victim, signal.SIGKILL)
    again = parts.engine.generate(asked, Sampling(max_tokens=24, stop_ids=parts.stop_ids))
    assert [c.token_ids for c in again] == [c.token_ids for c in drawn] and pid(actors) != victim, "a new actor gets the factors again"
    parts.engine.close()


def own_of(drawn):
    return [completion.logprobs for completion in drawn]


def signals(logp, completion):
    return SequenceSignals(
        student_logp=logp, scores={}, advantage=torch.zeros(len(logp)), loss_mask=completion.loss_mask, behaviour_logp=completion.logprobs,
        versions=completion.versions,
    )  # fmt: skip


def wait_for(condition, seconds=100):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.005)
    return value
