"""The asynchronous loop with a real engine process: bounds, versions, resume, kills."""

import json
import os
import random
import signal
import time
from signal import SIGKILL, SIGTERM

import pytest
import torch
import yaml
from opd_rollout import process_engine
from safetensors.torch import load_file

import opd.api
from opd import loop_async
from opd.api import make_system, train
from opd.build.system import build_parts, objective_of
from opd.config.load import find_recipe, load_recipe, merge, parse_recipe, read_yaml
from opd.config.recipe import Recipe
from opd.objective import join
from opd.replaying.replay import run_recipe
from opd.run.folder import read_lines
from opd.run.live import PhaseClock, Status, StopRequest
from tests.run.forked import SHAPE, Fault, opd_process, recipe_file
from tests.run.test_resume import same, saved, without_times

RECIPE = {
    "method": "hybrid",
    "model": {"shape": SHAPE},
    "data": {"task": "expr", "verifier": {"fn": "tests.run.forked:of_the_text"}},
    "objective": [
        {"policy": {"ppo_clip": {"low": 0.2, "high": 0.28}}, "advantage": "group_centered", "route": "not_wrong_with_view"},
        {"distill": {"jsd": {"mix": 0.5}}, "support": {"student_topk": {"k": 5, "tail": "bucket"}}, "route": "wrong_with_view"},
    ],
    "group": 4,
    "rollout": {"prompts": 2},
    "sampling": {"max_tokens": 8},
    "steps": 4,
    "teacher": {"ema": {"rate": 0.3}},
    "optimizer": {"lr": 1e-2},
    "eval": {"every": 2, "num_problems": 4, "final_problems": 4, "final_samples": 2},
    "learner": {"kind": "torch"},
    "track": {"wandb": "disabled", "samples_every": 1, "samples": 8},
}
APART = {"engine.kind": "process"}
CORRECTED = {"objective.0.weight": {"engine_ratio": {"high": 2.0}}}
ONE = {**APART, **CORRECTED, "asynchrony.max_staleness": 1}


def recipe(**changes) -> Recipe:
    merged = merge(read_yaml(find_recipe("hybrid", kind="methods")), RECIPE)
    return parse_recipe(merged, changes, resolved=True)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def records(folder):
    return without_times(folder / "metrics.jsonl"), without_times(folder / "eval.jsonl"), (folder / "model/model.safetensors").read_bytes()


def without_staleness(rows):
    return [{k: v for k, v in row.items() if not k.startswith("staleness/")} for row in rows]


def prompts(folder):
    """The ledger: prompts of every step, in the order of the samples files."""
    return [[row["prompt_id"] for row in read_lines(path)] for path in sorted((folder / "samples").glob("*.jsonl"))]


def test_with_staleness_0_it_is_the_synchronous_loop_bit_for_bit(tmp_path, monkeypatch):
    plain = train(recipe(), folder=tmp_path / "plain", quiet=True)

    def ahead_of_nothing(recipe, system, run, clock):
        ahead = opd.api.Ahead(system.source, clock.check)
        try:
            how = loop_async.Asynchrony(max_staleness=0)
            return loop_async.train(opd.api.replace(system, source=ahead), ahead, run, recipe.steps, how)
        finally:
            ahead.close()

    monkeypatch.setattr(opd.api, "train_as_asked", ahead_of_nothing)
    ahead = train(recipe(**APART), folder=tmp_path / "ahead", quiet=True)
    rows, evaluations, weights = records(plain)
    found, found_evaluations, found_weights = records(ahead)
    assert without_staleness(found) == rows and len(rows) == 4
    assert {row["staleness/mean"] for row in found} == {0.0}
    assert found_evaluations != [] and [without(r, "generations") for r in found_evaluations] == [without(r, "generations") for r in evaluations]
    assert found_weights == weights


def without(row, name):
    return {k: v for k, v in row.items() if k != name}


def by_hand(tmp_path, steps, staleness):
    """The weights after `steps`, each step's answers written, in this process, with the weights of max(0, step - staleness) updates."""
    parts = build_parts(recipe(**CORRECTED, **{"asynchrony.max_staleness": 0}))
    system = make_system(parts, PhaseClock(Status(tmp_path / "status.json", steps), StopRequest()))
    waiting, drawn = [], []
    for step in range(steps + staleness):
        if step < steps:
            waiting.append(system.source.collect(step, system.last))
            drawn.append(waiting[-1][0].completion.versions[0][0])
        if step >= staleness:
            judged = waiting.pop(0)
            learned = step - staleness
            objective = system.objective.at(learned, system.last)
            views, prepared = system.view(judged, objective.controls), system.learner.prepare(judged, objective.needs)
            samples = join(judged, prepared, system.teachers.score(judged, views, prepared), objective, views=views)
            system.learner.step(samples, objective, system.teachers.heads())
            system.student.load_weights(system.learner.weights(system.learner.version))
    assert drawn == [max(0, step - staleness) for step in range(steps)]
    return {name: p.detach().clone() for name, p in parts.engine.model.named_parameters()}


def test_with_staleness_1_every_step_learns_from_answers_of_the_version_before(tmp_path):
    changes = {**ONE, "steps": 3, "eval.num_problems": 0, "eval.final_problems": 0}
    folder = train(recipe(**changes), folder=tmp_path / "run", quiet=True)
    rows = list(read_lines(folder / "metrics.jsonl"))
    assert [row["staleness/mean"] for row in rows] == [0.0, 1.0, 1.0]
    assert all(row["seconds/rollout/ahead"] > 0 and row["staleness/dropped_groups"] == 0 for row in rows)
    expected, found = by_hand(tmp_path, 3, 1), load_file(folder / "model/model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert any(not torch.equal(found[name], value) for name, value in by_hand(tmp_path, 3, 0).items() if name in found)


@pytest.mark.slow
def test_killed_and_stopped_it_resumes_with_every_prompt_used_once(tmp_path):
    file = recipe_file(tmp_path, **{**RECIPE, "steps": 8, "checkpoint": {"every": 2}})
    words = [f"{key}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}" for key, value in ONE.items()]
    assert opd_process(tmp_path, "train", file, *words, "name=whole")[0] == 0
    chain = [
        Fault(phase="learn", visit=2),
        Fault(phase="rollout", visit=6),
        Fault(phase="sync", visit=5),
        Fault(phase="teacher", visit=2),
        Fault(phase="checkpoint", visit=1, where="middle"),
    ]
    for fault in chain:
        status, said = opd_process(tmp_path, "train", file, *words, "name=broken", fault=fault)
        assert status == -SIGKILL, said
    assert opd_process(tmp_path, "train", file, *words, "name=broken")[0] == 0
    whole, broken = tmp_path / "runs/whole", tmp_path / "runs/broken"
    assert records(broken) == records(whole) and prompts(broken) == prompts(whole)
    assert same(saved(broken), saved(whole))
    # asked to stop between two checkpoints: what was in flight is written again, with the weights of then
    for phase in ("teacher", "rollout"):
        status, said = opd_process(tmp_path, "train", file, *words, "name=stopped", fault=Fault(phase=phase, visit=3, number=SIGTERM, where="start"))
        assert status == 0 and "to go on" in said, said
    assert opd_process(tmp_path, "train", file, *words, "name=stopped")[0] == 0
    stopped = tmp_path / "runs/stopped"
    assert prompts(stopped) == prompts(whole) and len(prompts(whole)) == 8
    assert max(row["staleness/mean"] for row in read_lines(stopped / "metrics.jsonl")) <= 1


def test_a_verifier_that_never_returns_in_the_thread_of_the_rollouts_ends_the_process(tmp_path):
    data = {"task": "expr", "verifier": {"fn": "tests.run.forked:never"}, "verifier_seconds": 1}
    file = recipe_file(tmp_path, **{**RECIPE, "data": data, "eval": {}})
    words = [f"{key}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}" for key, value in ONE.items()]
    status, said = opd_process(tmp_path, "train", file, *words, "name=stuck", timeout=120)  # it has joined its threads
    assert status == 2 and "verifier tests.run.forked:never gave no verdict on prompt 'expr:" in said and "could interrupt" not in said
    assert json.loads((tmp_path / "runs/stuck/status.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_a_generator_killed_at_random_moments_changes_nothing(tmp_path, monkeypatch):
    whole = train(recipe(**ONE, steps=10), folder=tmp_path / "whole", quiet=True)
    engines, killed, dice = [], [], random.Random(3)
    start, record = process_engine.ProcessEngine._start, opd.api.TrainingRun.record

    def noted(engine):
        start(engine)
        engines.append(engine)

    def kill(run, report, samples, s):
        record(run, report, samples, s)
        if report.step in (1, 4, 7):  # far enough apart that the one before had to be replaced, however slow the machine
            time.sleep(dice.uniform(0, 0.3))
            killed.append(engines[-1].pid)
            os.kill(engines[-1].pid, signal.SIGKILL)

    monkeypatch.setattr(process_engine.ProcessEngine, "_start", noted)
    monkeypatch.setattr(opd.api.TrainingRun, "record", kill)
    broken = train(recipe(**ONE, steps=10), folder=tmp_path / "broken", quiet=True)
    assert len(set(killed)) == 3 and len(engines) == 4
    assert records(broken)[0] == records(whole)[0] and records(broken)[2] == records(whole)[2] and prompts(broken) == prompts(whole)
    for engine in engines:
        assert not os.path.exists(f"/proc/{engine.pid}") or "Z" in open(f"/proc/{engine.pid}/stat").read().rsplit(")", 1)[1][:3]


def test_a_roll_back_drops_what_the_weights_that_were_taken_back_wrote(tmp_path, monkeypatch):
    """After step 2 the learner goes back to step 1's weights: answers of version 2 that were in flight are dropped, and others drawn."""
    state, original = {}, opd.api.TrainingRun.record

    def record(run, report, samples, s):
        original(run, report, samples, s)
        if report.step == 0:
            s.learner.save(tmp_path / "good")
            state["saved"] = True
        if report.step == 2 and state.pop("saved", None):
            s.learner.load(tmp_path / "good")
            s.student.load_weights(s.learner.weights(s.learner.version))

    monkeypatch.setattr(opd.api.TrainingRun, "record", record)
    folder = train(recipe(**ONE, steps=5), folder=tmp_path / "run", quiet=True)
    rows = list(read_lines(folder / "metrics.jsonl"))
    assert [row["staleness/dropped_groups"] for row in rows] == [0, 0, 0, 2, 0]
    assert rows[3]["staleness/mean"] == 0.0 and [row["version"] for row in rows] == [1, 2, 3, 2, 3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"asynchrony.max_staleness": 1}, "engine.kind=process or engine.kind=vllm"),
        ({"engine.kind": "vllm", "engine.placement": "colocated", "asynchrony.max_staleness": 1}, "engine.placement=separate"),
        ({"engine.kind": "vllm", "engine.mode": "offline", "asynchrony.max_staleness": 1, "asynchrony.in_flight": True}, "engine.mode=async"),
        ({**APART, "asynchrony.in_flight": True}, "max_staleness=1 or more"),
        ({"engine.replicas": 2}, "engine.kind=process"),
        ({"learner.offload": True}, "from ZeRO 1 on: use learner.kind=deepspeed learner.zero_stage=1"),
        ({"learner.offload": True, "learner.kind": "torch", "learner.zero_stage": 2}, "from ZeRO 1 on"),
        ({"engine.kind": "vllm", "engine.lora": "adapters"}, "needs model.lora.rank and model.path or init .*; or use engine.lora=merged"),
        ({"engine.lora": "adapters", "model.lora.rank": 4, "model.init": "random"}, "needs engine.kind=vllm and model.path or init .actors read"),
        (
            {"engine.kind": "vllm", "engine.lora": "adapters", "model.lora.rank": 4, "asynchrony.max_staleness": 1, "asynchrony.in_flight": True},
            "needs model.path or init .* and asynchrony.in_flight=false",
        ),
        ({**APART, "rollout.sampler": "teacher"}, "rollout.sampler=student"),
        ({**APART, "asynchrony.max_staleness": -1}, "must be at least 0"),
        ({**APART, "asynchrony.staleness": 1}, "max_staleness"),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused_with_the_fix(changes, said):
    with pytest.raises(ValueError, match=said):
        load_recipe("hybrid", {**changes, "data.task": "expr"})


def test_an_estimate_over_sampled_tokens_needs_a_correction_or_allow():
    stale = {**APART, "asynchrony.max_staleness": 2}
    with pytest.raises(ValueError, match=r"up to 2 versions old.*engine_ratio.*allow: \[stale_answers\]"):
        objective_of(recipe(**stale))
    assert objective_of(recipe(**stale, **{"objective.0.allow": ["stale_answers"]})).allowed == ("stale_answers",)
    for weight in ("engine_ratio", "span_ratio", "sampler_ratio"):
        assert objective_of(recipe(**stale, **{"objective.0.weight": weight}))
    with pytest.raises(ValueError, match="did you mean .span_ratio"):
        objective_of(recipe(**stale, **{"objective.0.weight": "span_ration"}))


def test_a_bundle_of_an_asynchronous_run_is_refused(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "resolved.json").write_text(json.dumps({"recipe": recipe(**ONE).model_dump(mode="json")}))
    with pytest.raises(ValueError, match="asynchronous.*max_staleness=0"):
        run_recipe(folder)
