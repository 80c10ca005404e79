"""vLLM in Ray actors, the real ones: the same numbers as the learner's, order kept, weights that arrive, actors that die, nothing left behind.

One set of actors for the module; the model is the embedded base, whose embeddings are tied.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from opd_rollout.sampling import request_seed
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import GenerateRequest, Sampling, ScoreRequest

from opd.build.system import build_parts
from opd.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
OVERRIDES = {
    "engine.kind": "vllm", "engine.replicas": 1, "eval.num_problems": 4, "eval.final_problems": 0, "track.wandb": "disabled", "learner.kind": "torch",
    "model.path": str(ROOT / "models/expr-base"),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    from opd.build.system import actors_of

    recipe = load_recipe(str(ROOT / "recipes/runs/opsd_expr.yaml"), OVERRIDES)
    with actors_of(recipe) as actors:
        built = build_parts(recipe, actors=actors)
        yield built
        built.engine.close()


def requests(parts, number=12):
    prompts = parts.source._stream.take(number)
    return [GenerateRequest(prompt_ids=parts.encode(p), seed=request_seed(7, p.id, n, 0)) for n, p in enumerate(prompts)]


def sampling(parts, **options):
    return Sampling(**{"max_tokens": 24, "stop_ids": parts.stop_ids, **options})


def learner_logprobs(parts, asked, completions):
    scored = [ScoreRequest(context_ids=r.prompt_ids, completion_ids=c.token_ids) for r, c in zip(asked, completions, strict=True)]
    return [one.sampled for one in parts.learner.teacher_pass(scored, "live")]


def test_log_probs_are_the_learners_and_greedy_tokens_the_torch_engines(parts):
    asked = requests(parts)
    drawn = parts.engine.generate(asked, sampling(parts))
    for own, theirs in zip(learner_logprobs(parts, asked, drawn), drawn, strict=True):
        assert torch.allclose(own, theirs.logprobs, atol=1e-4, rtol=0)
    near = TorchEngine(parts.learner.policy.model, pad_id=0, token_budget=4096)
    greedy = [engine.generate(asked, sampling(parts, temperature=0.0)) for engine in (parts.engine, near)]
    assert [c.token_ids for c in greedy[0]] == [c.token_ids for c in greedy[1]]


def test_seeds_decide_and_order_is_kept(parts):
    asked = requests(parts)
    once = [c.token_ids for c in parts.engine.generate(asked, sampling(parts))]
    assert once == [c.token_ids for c in parts.engine.generate(asked, sampling(parts))]
    turned = [c.token_ids for c in parts.engine.generate(asked[::-1], sampling(parts))]
    assert turned[::-1] == once
    others = [GenerateRequest(prompt_ids=r.prompt_ids, seed=r.seed + 1) for r in asked]
    assert once != [c.token_ids for c in parts.engine.generate(others, sampling(parts))]


def test_a_tied_model_is_exact_after_an_update(parts):
    """The embedding is also the head: an update that only reached the embedding would be off by about a nat."""
    with torch.no_grad():
        for parameter in parts.learner.policy.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    asked = requests(parts)
    before = parts.engine.generate(asked, sampling(parts))
    stale = learner_logprobs(parts, asked, before)
    assert max((own - theirs.logprobs).abs().max() for own, theirs in zip(stale, before, strict=True)) > 1e-2
    parts.learner.version += 1
    parts.engine.load_weights(parts.learner.weights(parts.learner.version))
    drawn = parts.engine.generate(asked, sampling(parts))
    for own, theirs in zip(learner_logprobs(parts, asked, drawn), drawn, strict=True):
        assert torch.allclose(own, theirs.logprobs, atol=1e-4, rtol=0)
    assert {version for c in drawn for version, _, _ in c.versions} == {parts.learner.version}


def actor_pids():
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "ray::VllmActor" in line and "ps -eo" not in line]


def test_a_killed_actor_is_replaced_and_its_requests_drawn_again_with_the_same_seeds(parts):
    asked = requests(parts)
    expected = [c.token_ids for c in parts.engine.generate(asked, sampling(parts))]
    [pid] = actor_pids()
    os.kill(pid, signal.SIGKILL)
    assert [c.token_ids for c in parts.engine.generate(asked, sampling(parts))] == expected
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert pid not in actor_pids()


def test_one_command_trains_and_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "opd", "train", str(ROOT / "recipes/runs/opsd_expr.yaml"), "engine=vllm", "steps=2", "name=run"]
    command += ["eval.num_problems=8", "eval.final_problems=8", "track.wandb=disabled", f"model.path={ROOT / 'models/expr-base'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "engine against learner" in done.stdout + done.stderr
    rows = (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2
    time.sleep(1.0)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


def test_what_the_machine_lacks_is_said_before_anything_starts(parts):
    from opd.build.actors import check_placement

    for change, sentence in (
        ({"engine.placement": "colocated"}, "here is none"),
        ({"engine.tensor_parallel": 2}, "but here is no GPU"),
        ({"engine.exchange": "/nowhere"}, "is no folder"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_placement(load_recipe(str(ROOT / "recipes/runs/opsd_expr.yaml"), {**OVERRIDES, **change}))
