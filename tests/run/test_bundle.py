"""A bundled step, replayed, is the run's step bit by bit; other objectives run on its rollouts; nothing but safetensors and JSON is read."""

import json
import pickle
import shutil
import struct
from dataclasses import replace

import pytest
import torch

from opd.api import train
from opd.cli import main
from opd.config.load import parse_recipe
from opd.objective import SignalNeeds
from opd.replaying.bundle import RECORDS, decode, encode, read_bundle, weights_name, write_bundle
from opd.replaying.replay import freeze, replay, scores_from
from opd.run.folder import read_lines

TINY = {
    "model": {"shape": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}},
    "data": {"task": "expr"},
    "rollout": {"prompts": 3},
    "sampling": {"max_tokens": 8},
    "steps": 5,
    "eval": {"every": 2, "num_problems": 4, "final_problems": 0, "samples": 1},
    "optimizer": {"lr": 1e-2, "schedule": "cosine"},
    "checkpoint": {"every": 2, "keep": 1, "best": False},
    "track": {"wandb": "disabled", "samples_every": 0},
}
HYBRID = [
    {"policy": "ppo_clip", "advantage": "group_centered", "route": "not_wrong_with_view", "reduce": {"token_mean": {"over": "all"}}},
    {"distill": "jsd", "support": {"student_topk": {"k": 5}}, "route": "wrong_with_view", "reduce": {"token_mean": {"over": "all"}}},
]
PARITY = {"task": "expr", "verifier": {"fn": "tests.run.test_bundle:parity"}}  # a base of random weights is never right
RUNS = {
    "frozen": {"method": "opsd", "view": "facts", "learner": {"kind": "torch"}},
    "averaged": {
        "method": "hybrid", "group": 2, "view": "answer", "teacher": {"ema": {"rate": 0.3}}, "updates": {"minibatches": 2, "epochs": 2},
        "objective": HYBRID, "data": PARITY,
    },
    "rewards": {"method": "grpo", "group": 4, "data": PARITY, "learner": {"kind": "torch"}, "model": {**TINY["model"], "lora": {"rank": 2}}},
    "live": {"method": "sdpo", "group": 2, "teacher": "live", "objective": [{"distill": "forward_kl", "support": {"student_topk": {"k": 4}}}]},
}  # fmt: skip


def parity(prompt, text):
    return float(len(text) % 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}

    def run(name):
        torch.set_num_threads(1)
        if name not in made:
            made[name] = train(parse_recipe({**TINY, **RUNS[name]}), folder=tmp_path_factory.mktemp("runs") / name, quiet=True)
        return made[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_replay_is_the_step_of_the_run_bit_by_bit(runs, name):
    folder = runs(name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "bundles" not in path.parts}
    found = {}
    for step in (1, 4):  # from the start, and past where the only checkpoint left (4) is of use
        path = freeze(folder, step)
        bundle = read_bundle(path)
        row = next(row for row in read_lines(folder / "metrics.jsonl") if row["step"] == step)
        assert bundle.equals_run and bundle.outcome.meters["loss/total"].mean == row["loss/total"]
        result = replay(path)
        assert result.same_objective and result.reproduced
        assert result.outcome.weights == bundle.outcome.weights != bundle.before
        assert {n: m for n, m in result.outcome.meters.items() if n.startswith(("loss/", "gradient_norm"))} == {
            n: m for n, m in bundle.outcome.meters.items() if n.startswith(("loss/", "gradient_norm"))
        }
        found[step] = bundle
    assert found[1].outcome.weights != found[4].outcome.weights
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "bundles" not in path.parts}


def test_the_weights_after_the_last_step_are_those_of_the_runs_model(runs):
    from safetensors.torch import load_file

    folder = runs("frozen")
    bundle = read_bundle(freeze(folder, 5))
    saved = load_file(folder / "model" / "model.safetensors")
    learner_names = {name.removeprefix("model.") for name in bundle.learner["masters"]}
    assert weights_name({name: saved[name] for name in learner_names}) == bundle.outcome.weights


def test_a_changed_bit_is_noticed(runs, tmp_path):
    bundle = read_bundle(freeze(runs("frozen"), 4))
    first = bundle.samples[0]
    nudged = first.scores["main"].hidden.clone()
    nudged[0, 0] += 1e-4
    sample = replace(first, scores={"main": replace(first.scores["main"], hidden=nudged)})
    path = tmp_path / "other.safetensors"
    write_bundle(path, replace(bundle, samples=(sample, *bundle.samples[1:])))
    assert not replay(path).reproduced
    assert main(["replay", str(path)]) == 1


def test_other_objectives_run_on_the_same_rollouts(runs):
    path = freeze(runs("frozen"), 4)
    base = replay(path)
    reverse = replay(path, {"objective": [{"distill": "reverse_kl", "support": "full"}]})
    assert not reverse.same_objective and reverse.outcome.weights != base.outcome.weights
    assert reverse.outcome.meters["entropy/student"] == base.outcome.meters["entropy/student"]


@pytest.mark.parametrize("kind", ["student_topk", "teacher_topk", "union"])
def test_a_support_as_large_as_the_vocabulary_is_the_whole_vocabulary(runs, kind):
    path = freeze(runs("frozen"), 4)
    size = read_bundle(path).vocab_size
    full = replay(path, {"objective": [{"distill": "forward_kl", "support": "full"}]}).outcome
    sparse = replay(path, {"objective": [{"distill": "forward_kl", "support": {kind: {"k": size}}}]}).outcome
    assert sparse.meters["loss/total"].mean == pytest.approx(full.meters["loss/total"].mean, rel=1e-4)
    assert sparse.meters["gradient_norm"].mean == pytest.approx(full.meters["gradient_norm"].mean, rel=1e-3)


def test_scores_from_hidden_states_are_the_scorers(runs):
    bundle = read_bundle(freeze(runs("live"), 3))
    for sample, hidden in zip(bundle.samples, bundle.hidden["main"], strict=True):
        if "main" not in sample.scores or hidden is None:
            continue
        found = scores_from(hidden, bundle.heads["main"], sample.judged, SignalNeeds(student_support=True), sample.prepared, 1.0)
        torch.testing.assert_close(found.logp, sample.scores["main"].logp, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.tail_logp, sample.scores["main"].tail_logp, atol=1e-4, rtol=1e-4)


def test_a_step_may_be_frozen_while_it_happens(tmp_path):
    """Also in a run that was interrupted, and whose verifier would not give the same verdicts again."""
    torch.set_num_threads(1)
    coin = {"task": "expr", "verifier": {"fn": "tests.run.forked:coin"}}
    often = {"every": 3, "keep": 5, "best": False}
    recipe = {**TINY, **RUNS["rewards"], "data": coin, "track": {**TINY["track"], "bundle_steps": [2, 4]}, "checkpoint": often}
    folder = train(parse_recipe(recipe), folder=tmp_path / "r", quiet=True)
    kept = {step: (folder / f"bundles/step-{step:06d}.safetensors") for step in (2, 4)}
    assert sorted((folder / "bundles").iterdir()) == sorted(kept.values())
    found = {step: replay(path) for step, path in kept.items()}
    assert all(result.reproduced and result.bundle.step == step for step, result in found.items())
    rows = {row["step"]: row for row in read_lines(folder / "metrics.jsonl")}
    assert all(result.outcome.meters["loss/total"].mean == rows[step]["loss/total"] for step, result in found.items())
    kept[4].unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000005")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000003"]
    (folder / "status.json").write_text(json.dumps({"state": "preempted", "step": 3, "steps": 5, "why": ""}))
    train(parse_recipe(recipe), folder=folder, quiet=True)
    assert replay(kept[4]).outcome.weights == found[4].outcome.weights


def test_a_bundle_without_weights_keeps_their_name(runs):
    folder = runs("frozen")
    whole = freeze(folder, 2)
    size, name = whole.stat().st_size, read_bundle(whole).before
    light = freeze(folder, 2, weights=False)
    assert light.stat().st_size < size / 2 and read_bundle(light).before == name
    with pytest.raises(ValueError, match="weights=true"):
        replay(light)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bundle"], "a name is missing"),
        (["bundle", "RUN"], "needs the number of a step"),
        (["bundle", "RUN", "step=9"], "has no step 9; its metrics.jsonl has steps 1 to 5"),
        (["bundle", "RUN", "step=two"], "needs the number of a step"),
        (["bundle", "RUN", "step=1", "full=1"], "unknown option 'full'"),
        (["bundle", "RUN", "step=1", "weights=3"], "weights=true"),
        (["bundle", "nowhere", "step=1"], "neither nowhere nor runs/nowhere exists"),
        (["replay", "nowhere"], "neither nowhere nor runs/nowhere exists"),
        (["replay", "nowhere.safetensors"], "is no file"),
        (["replay", "BUNDLE", "seed=3"], "keeps the rollouts"),
        (["replay", "BUNDLE", "objective=[{distill: reverse_kl, signal: other}]"], "other"),
        (["replay", "METRICS"], "metrics.jsonl is no bundle: opd bundle RUN step=N writes one"),
        (["replay", "MODEL"], "but no bundle"),
    ],
)
def test_mistakes_are_explained(runs, words, message, capfd):
    folder = runs("frozen")
    places = {
        "RUN": str(folder),
        "BUNDLE": str(freeze(folder, 2)) if "BUNDLE" in words else "",
        "METRICS": str(folder / "metrics.jsonl"),
        "MODEL": str(folder / "model" / "model.safetensors"),
    }
    assert main([places.get(word, word) for word in words]) == 2
    err = capfd.readouterr().err
    assert message in err and "Traceback" not in err


def test_records_survive_and_nothing_else_is_made():
    tensors: dict = {}
    value = {"a": (1, 2.5, float("nan"), None, True), "b": torch.arange(3), 4: [torch.zeros(0, 2)]}
    again = decode(json.loads(json.dumps(encode(value, tensors), allow_nan=False)), tensors)
    assert again["a"][:2] == (1, 2.5) and again["a"][2] != again["a"][2] and again[4][0].shape == (0, 2) and torch.equal(again["b"], torch.arange(3))
    with pytest.raises(KeyError):
        decode({"record": "Popen", "fields": {}}, {})
    with pytest.raises(AssertionError):
        encode(object(), {})
    assert set(RECORDS) >= {"Sample", "Judged", "TokenScores"}


def test_a_pickle_is_refused_unread(tmp_path, capfd):
    class Bomb:
        def __reduce__(self):
            return (print, ("read",))

    path = tmp_path / "bundle.safetensors"
    path.write_bytes(struct.pack("<Q", 8) + pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="cannot be read as a bundle"):
        read_bundle(path)
    assert "read" not in capfd.readouterr().out
