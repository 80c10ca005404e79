"""vLLM in Ray actors, the real ones: the same numbers as the learner's, order kept, weights that arrive, actors that die, nothing left behind.

Two actors for the module; the model is the embedded base, whose embeddings are tied.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from opd_rollout.dispatch import ActorsLost
from opd_rollout.sampling import request_seed, truncate
from opd_rollout.shared_memory import remove, write
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import GenerateRequest, Sampling, ScoreRequest
from opd_rollout.vllm_sending import Actors, TrainerTransfer, Way
from ray.exceptions import RayActorError

from opd.build.system import actors_of, build_parts
from opd.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
OVERRIDES = {
    "engine.kind": "vllm", "engine.replicas": 2, "engine.chunk": 8, "engine.deadline_seconds": 200,
    "eval.num_problems": 4, "eval.final_problems": 0, "track.wandb": "disabled", "learner.kind": "torch",
    "model.path": str(ROOT / "models/expr-base"),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts():
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


def test_log_probs_are_those_of_the_distribution_that_was_sampled(parts):
    """Heated, then cut to the likeliest ids: what vLLM returns is the log-prob after both."""
    asked, cut = requests(parts, 6), {"temperature": 0.7, "top_p": 0.8, "top_k": 5}
    model = parts.learner.policy.model
    for request, drawn in zip(asked, parts.engine.generate(asked, sampling(parts, **cut)), strict=True):
        ids = torch.tensor([request.prompt_ids + drawn.token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1]
        wanted = truncate((logits / 0.7).log_softmax(dim=-1), top_p=0.8, top_k=5).gather(1, ids[0, len(request.prompt_ids) :, None])[:, 0]
        assert torch.allclose(wanted, drawn.logprobs, atol=1e-4, rtol=0)


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


def test_scores_are_the_learners_at_given_ids_and_at_its_own(parts):
    asked = requests(parts, 4)
    drawn = parts.engine.generate(asked, sampling(parts))
    for options, temperature in (({"k": 5}, 1.0), ({"support_ids": True}, 0.7)):
        wanted = []
        for request, one in zip(asked, drawn, strict=True):
            support = {"support_ids": torch.arange(6).repeat(len(one.token_ids), 1)} if "support_ids" in options else options
            wanted.append(ScoreRequest(context_ids=request.prompt_ids, completion_ids=one.token_ids, **support))
        near = TorchEngine(parts.learner.policy.model, pad_id=0, token_budget=4096, vocab_size=parts.learner.policy.model.config.vocab_size)
        for ours, theirs in zip(near.score(wanted, temperature), parts.engine.score(wanted, temperature), strict=True):
            for name in ("sampled", "tail_logp", "entropy"):
                assert torch.allclose(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=0), name
            order = [one.ids.sort(dim=1) for one in (ours, theirs)]
            assert torch.equal(order[0].values, order[1].values)
            logp = [one.logp.gather(1, sort.indices) for one, sort in zip((ours, theirs), order, strict=True)]
            assert torch.allclose(*logp, atol=1e-4, rtol=0)


def pids(parts):
    return [ray.get(replica.handle.pid.remote(), timeout=100) for replica in parts.engine._pool.replicas]


def while_generating(parts, asked, act):
    """The completions, with `act` called as soon as the first replica has requests, and what was counted meanwhile."""
    pool = parts.engine._pool
    pool.bring_up()
    before, done = dict(parts.engine.counts), threading.Event()

    def watch():
        while not pool.status()[1][0].in_flight:
            assert not done.wait(0.001), "it was never at work"
        time.sleep(0.005)  # that is before its answers can be there
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    drawn = parts.engine.generate(asked, sampling(parts))
    done.set()
    thread.join()
    return drawn, {name: count - before[name] for name, count in parts.engine.counts.items()}


def test_an_actor_killed_with_requests_in_flight_is_replaced_and_the_same_tokens_come(parts):
    """SIGKILL of the actor's process: its leases are given out again with the same seeds, each result is used once."""
    asked = requests(parts, 96)
    expected = [c.token_ids for c in parts.engine.generate(asked, sampling(parts))]
    victim, other = pids(parts)
    drawn, counted = while_generating(parts, asked, lambda: os.kill(victim, signal.SIGKILL))
    assert counted["reissued"] + counted["stragglers"] >= 1, "nothing was in flight: the test says nothing"  # Ray may be slow to tell of a death
    assert len(drawn) == 96 and [c.token_ids for c in drawn] == expected
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)
    revived = parts.engine.counts["revived"] - counted["revived"]

    def is_back():
        assert [c.token_ids for c in parts.engine.generate(asked, sampling(parts))] == expected
        parts.engine._pool.bring_up()
        return parts.engine.counts["revived"] > revived

    wait_for(is_back)  # Ray may tell of the death after the work is done
    again = pids(parts)
    assert victim not in again and other in again and len(set(again)) == 2
    assert [c.token_ids for c in parts.engine.generate(asked, sampling(parts))] == expected, "the new actor has the weights of the old one"


def test_the_work_of_a_slow_actor_is_given_to_an_idle_one_too(parts):
    """SIGSTOP: an actor that does not answer and is not gone."""
    asked = requests(parts, 64)
    expected = [c.token_ids for c in parts.engine.generate(asked, sampling(parts))]
    parts.engine._pool.bring_up()
    slow = pids(parts)[0]
    before, done = dict(parts.engine.counts), threading.Event()

    def stop():
        while not done.wait(0.01):  # again and again: somebody else may continue it
            os.kill(slow, signal.SIGSTOP)

    os.kill(slow, signal.SIGSTOP)
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        drawn = parts.engine.generate(asked, sampling(parts))
    finally:
        done.set()
        thread.join()
        os.kill(slow, signal.SIGCONT)
    counted = {name: count - before[name] for name, count in parts.engine.counts.items()}
    assert counted["stragglers"] == 2 and counted["revived"] == counted["reissued"] == 0, "each of its two leases once"
    assert [c.token_ids for c in drawn] == expected
    assert pids(parts)[0] == slow, "it was slow, not dead: it stays"


def test_an_actor_with_other_weights_than_the_learners_is_restarted_from_a_full_export(parts):
    """Before the update arrives, an actor is given garbage under the coming update's stamp: only the canary can notice."""
    engine, version = parts.engine, parts.learner.version + 1
    victim = engine._pool.replicas[engine._loads % 2]
    number = ray.get(victim.handle.pid.remote(), timeout=100)
    wrong = parts.learner.weights(version)
    garbage = type(wrong)(version=version, named=tuple((name, 0.1 * torch.randn_like(tensor)) for name, tensor in wrong.named))
    parcel = engine._transfer.make(garbage)
    stamp = f"{engine._transfer._attempt}-{engine._transfer._serial + 1}"
    ray.get(victim.handle.load.remote(parcel.written, version, stamp), timeout=100)
    parts.learner.version = version
    engine.load_weights(parts.learner.weights(version))
    assert ray.get(victim.handle.pid.remote(), timeout=100) != number
    assert engine.last_gap.mean < 1e-4
    asked = requests(parts, 16)
    drawn = engine.generate(asked, sampling(parts))
    for own, theirs in zip(learner_logprobs(parts, asked, drawn), drawn, strict=True):
        assert torch.allclose(own, theirs.logprobs, atol=1e-4, rtol=0)


def test_actors_that_sleep_while_the_learner_learns_wake_for_new_weights_and_for_every_rank(parts, monkeypatch):
    """The protocol of colocated actors: vLLM's executor keeps its sleeping state on a CPU too, where no memory moves."""
    engine = parts.engine
    monkeypatch.setattr(engine, "_settings", replace(engine._settings, sleeps=True, user="first/0"))

    def asleep():
        return ray.get([replica.handle.__ray_call__.remote(lambda actor: actor._asleep) for replica in engine._pool.replicas], timeout=100)

    asked = requests(parts)
    engine.generate(asked, sampling(parts))
    assert asleep() == [True, True]
    with torch.no_grad():
        for parameter in parts.learner.policy.model.parameters():
            parameter.mul_(1.01)
    parts.learner.version += 1
    engine.load_weights(parts.learner.weights(parts.learner.version))
    assert engine.last_gap.mean < 1e-4
    assert asleep() == [True, True]
    engine._pool.call("wake", "first/1", seconds=100)
    drawn = engine.generate(asked, sampling(parts))
    assert asleep() == [False, False], "another rank is not done"
    for own, theirs in zip(learner_logprobs(parts, asked, drawn), drawn, strict=True):
        assert torch.allclose(own, theirs.logprobs, atol=1e-4, rtol=0)
    assert {version for c in drawn for version, _, _ in c.versions} == {parts.learner.version}
    engine._pool.call("wake", "second/0", seconds=100)  # of another start of the learner: those of the first are gone
    engine._pool.call("sleep", "second/0", seconds=100)
    assert asleep() == [True, True]
    engine._pool.call("wake", "second/0", seconds=100)


def test_an_update_in_several_calls_and_an_actor_whose_sender_is_gone(parts):
    """The calls that vLLM's trainer side of NCCL makes, on real actors; what the workers are given is a file."""
    engine, version = parts.engine, parts.learner.version + 1
    with torch.no_grad():
        for parameter in parts.learner.policy.model.parameters():
            parameter.mul_(0.99)
    parts.learner.version = version
    parcel = engine._transfer.make(parts.learner.weights(version))
    actors = Actors(engine._pool, engine._pool.replicas, 1, 100, "NCCL")
    actors.parcel = parcel
    actors.start_weight_update()
    m, asked = parcel.written.metadata, requests(parts)
    waiting = [replica.handle.stamp.remote() for replica in engine._pool.replicas]
    assert ray.get(waiting, timeout=100) == ["", ""], "of no version until the end"
    actors.update_weights({"path": parcel.written.path, "names": list(m.names), "shapes": [list(s) for s in m.shapes], "dtypes": list(m.dtypes)})
    actors.finish_weight_update()
    engine._parcel, engine.version = parcel, version
    engine._transfer.done()
    before = engine.counts["reissued"]
    drawn = engine.generate(asked, sampling(parts))
    for own, theirs in zip(learner_logprobs(parts, asked, drawn), drawn, strict=True):
        assert torch.allclose(own, theirs.logprobs, atol=1e-4, rtol=0)
    assert {span[0] for c in drawn for span in c.versions} == {version} and engine.counts["reissued"] == before
    left = engine._pool.replicas[0].handle
    ray.get(left.begin_update.remote(), timeout=100)  # and whoever began it dies
    with pytest.raises(RayActorError):
        ray.get(left.open.remote(engine._model, engine._runner), timeout=100)
    assert [c.token_ids for c in engine.generate(asked, sampling(parts))] == [c.token_ids for c in drawn], "a fresh one has the whole version"


class FakeTrainer:
    """vLLM's trainer side, but for what it sends: the workers are given a file, which goes when they have it."""

    def __init__(self, actors, source, folder):
        self.client, self._source, self._folder, self.sent = actors, source, folder, []

    def send_weights(self):
        path = self._folder / f"{self.client.parcel.stamp}.weights"
        written, lock = write(path, self._source.weights.metadata(), self._source.weights.buckets())
        m = written.metadata
        self.client.start_weight_update()
        self.client.update_weights({"path": str(path), "names": list(m.names), "shapes": [list(s) for s in m.shapes], "dtypes": list(m.dtypes)})
        self.client.finish_weight_update()
        remove(path, lock)
        self.sent.append([replica.name for replica in self.client.members])


def test_actors_that_come_back_empty_get_the_weights_of_a_transfer_that_keeps_no_copy(parts, monkeypatch, tmp_path):
    """Real actors, killed: one between two versions, then both with requests in flight."""
    engine, trainers = parts.engine, []

    def join(actors, source, within, seconds):
        trainers.append(FakeTrainer(actors, source, tmp_path))
        return trainers[-1]

    monkeypatch.setattr(engine, "_transfer", TrainerTransfer(Way(how="a fake", link="", join=join), 0, 1, "kept-nowhere"))
    monkeypatch.setattr(engine, "_settings", replace(engine._settings, resends=True))
    monkeypatch.setattr(engine, "_parcel", engine._parcel)

    def update():
        parts.learner.version += 1
        engine.load_weights(parts.learner.weights(parts.learner.version))

    update()
    engine._pool.bring_up()  # one that the test before has killed comes back empty
    update()
    assert trainers[-1].sent[-1] == ["student-0", "student-1"]
    victim, joined = pids(parts)[0], len(trainers)
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{victim}").exists())
    update()
    assert [one.sent for one in trainers[joined:]] == [[["student-1"]]], "another group, of those that are there"
    engine._pool.bring_up()
    update()
    assert trainers[-1].sent[-1] == ["student-0", "student-1"] and victim not in pids(parts)
    asked = requests(parts, 96)
    expected = [c.token_ids for c in engine.generate(asked, sampling(parts))]
    sent, old = len(trainers), pids(parts)
    drawn, _ = while_generating(parts, asked, lambda: [os.kill(one, signal.SIGKILL) for one in old])
    assert [c.token_ids for c in drawn] == expected and len(trainers) > sent, "sent once more, and the same requests drawn again"
    monkeypatch.setattr(engine, "_settings", replace(engine._settings, resends=False))
    with pytest.raises(ActorsLost, match="came back without weights, .*: run the same command again .*transfer=shared_memory"):
        engine._refill()
    assert list(tmp_path.iterdir()) == []


def test_a_sequence_longer_than_the_engine_and_a_foreign_id_are_refused_before_any_work(parts):
    long = GenerateRequest(prompt_ids=(5,) * 2000, seed=1)
    with pytest.raises(ValueError, match="request 0 has 2000 tokens, and with 24 more exceeds the .* positions of the actors' engine; shorten"):
        parts.engine.generate([long], sampling(parts))
    with pytest.raises(ValueError, match="request 0 holds a token id outside 0 to"):
        parts.engine.generate([GenerateRequest(prompt_ids=(10**6,), seed=1)], sampling(parts))


def of_run(folder):
    """Living processes that work in `folder`: the run, Ray's and the actors; told by what no change of title hides."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z" and os.readlink(entry / "cwd") == str(folder):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def wait_for(condition, seconds=400):  # a limit for machines where others work too
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)
    return value


def rows(folder, name="metrics.jsonl"):
    path = folder / "runs/run" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def start(folder, *words):
    command = [sys.executable, "-m", "opd", "train", str(ROOT / "recipes/runs/opsd_expr.yaml"), "engine=vllm", "name=run", "checkpoint.every=4"]
    command += ["eval.every=0", "eval.num_problems=4", "eval.final_problems=4", "track.wandb=disabled", f"model.path={ROOT / 'models/expr-base'}"]
    with (folder / "said").open("a") as said:
        return subprocess.Popen([*command, *words], cwd=folder, stdout=said, stderr=said)


def ended(process, folder):
    assert process.wait(timeout=600) == 0, (folder / "said").read_text()[-3000:]
    wait_for(lambda: not of_run(folder), 20)
    assert not list((folder / "weights").iterdir())


STEPS = 12


def test_kills_of_the_actor_and_of_the_driver_leave_nothing_and_lose_nothing(tmp_path):
    """One undisturbed run; one whose actor, then whose driver is killed by SIGKILL in a step, and that the same command resumes."""
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        (folder / "weights").mkdir(parents=True)
    words = [f"steps={STEPS}", "engine.exchange=weights"]
    ended(start(folders[0], *words), folders[0])
    folder = folders[1]
    process = start(folder, *words)
    wait_for(lambda: len(rows(folder)) >= 2)
    [actor] = [pid for pid, line in of_run(folder).items() if "ray::VllmActor" in line]
    os.kill(actor, signal.SIGKILL)
    wait_for(lambda: len(rows(folder)) >= 6)
    assert not Path(f"/proc/{actor}").exists()
    lines = list(of_run(folder).values())
    for name in ("gcs_server", "raylet", "ray::VllmActor", "ray::DashboardAgent"):
        assert any(name in line for line in lines), f"{name}: else the check for survivors could not fail"
    assert list((folder / "weights").iterdir())
    process.kill()
    process.wait()
    wait_for(lambda: not of_run(folder), 20)
    assert len(list((folder / "weights").iterdir())) == 1, "a file stays until the next start"
    ended(start(folder, *words), folder)
    assert "resumed after step" in (folder / "said").read_text()
    whole, killed = (rows(folder, "ledger.jsonl") for folder in folders)
    assert [row["step"] for row in killed] == list(range(1, STEPS + 1))
    assert [row["prompts"] for row in killed] == [row["prompts"] for row in whole], "each prompt once, in the same order"
    assert [row["drawn"] for row in killed] == [32 * row["step"] for row in killed], "none left out, none drawn twice"
    for one, other in zip(rows(folders[0]), rows(folder), strict=True):
        assert one["tokens/student"] == other["tokens/student"]
        assert one["loss/total"] == pytest.approx(other["loss/total"], rel=1e-4)


def test_a_model_that_vllm_cannot_load_is_one_sentence_and_leaves_nothing(tmp_path):
    """A teacher folder whose weights are cut short: the student's side never reads them, vLLM does."""
    (tmp_path / "weights").mkdir()
    shutil.copytree(ROOT / "models/expr-base", tmp_path / "broken")
    for path in (tmp_path / "broken").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    words = ["engine=torch", "teacher={external: {path: ./broken, engine: vllm}}", "view=plain", "steps=1"]
    process = start(tmp_path, *words, "objective=[{distill: reverse_kl, support: {teacher_topk: {k: 4, tail: bucket}}}]")
    assert process.wait(timeout=300) == 2
    said = (tmp_path / "said").read_text()
    assert "vLLM cannot load" in said and "Traceback" not in said, said
    wait_for(lambda: not of_run(tmp_path), 20)
