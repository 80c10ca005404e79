"""Predicted seconds and bytes against what one H200 took, by hand for small numbers, and laws."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opd.build.shapes import shape_config
from opd.preflight.memory import learner_memory, model_facts, teacher_memory
from opd.preflight.report import in_time
from opd.preflight.speed import CPU, DEVICES, LAYER_SECONDS, Device, Load, learning_seconds, rollout_seconds, scoring_seconds, share
from opd.timing.flops import Products, forward, training
from tests.preflight.test_memory import MODEL

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"
H200 = DEVICES["h200"]
UNIT = Device(name="unit", flops=1e9, bandwidth=1e9, memory=1)
LOAD = Load(answers=4, group=2, prompt=10, answer=6, decoded=6)


@pytest.fixture(scope="module")
def qwen3_06b():
    return model_facts(shape_config("Qwen/Qwen3-0.6B", 1.0), torch.bfloat16)


def result(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_phases_of_a_run_on_an_h200(qwen3_06b):
    """64 prompts, one answer of 96 tokens each, recomputed activations: the committed run of benchmarks/dry_run.py."""
    phases = {name: phase for name, phase in result("dry_run.json")["rows"][0]["phases"].items()}
    tokens = {name: phase["tokens"] / 64 for name, phase in phases.items()}
    load = Load(answers=64, group=1, prompt=tokens["learn"] - tokens["rollout"], answer=tokens["rollout"], decoded=tokens["rollout"])
    predicted = {
        "rollout": rollout_seconds(qwen3_06b, H200, load, rows=64),
        "teacher": scoring_seconds(qwen3_06b, H200, load, hint=tokens["teacher"] - tokens["learn"], budget=32768),
        "learn": learning_seconds(qwen3_06b, H200, load, budget=16384, checkpointing=True),
    }
    for name, seconds in predicted.items():
        assert seconds == pytest.approx(phases[name]["seconds"], rel=0.16), name


def test_a_learner_step_on_an_h200(qwen3_06b):
    """16 sequences of 128 + 512 tokens in one micro-batch, a teacher that reads 896: the committed run of benchmarks/learner_step.py."""
    (ours,) = (row for row in result("learner_step.json")["rows"] if row["side"] == "ours" and row["shape"] == "Qwen/Qwen3-0.6B")
    load = Load(answers=16, group=1, prompt=128, answer=512, decoded=512)
    assert scoring_seconds(qwen3_06b, H200, load, hint=256, budget=1 << 20) == pytest.approx(ours["teacher_seconds"], rel=0.16)
    assert learning_seconds(qwen3_06b, H200, load, budget=1 << 20, checkpointing=False) == pytest.approx(ours["learn_seconds"], rel=0.16)


def test_the_peak_of_that_step(qwen3_06b):
    """The allocator's peak: learner, frozen teacher, hidden states; the pass that was measured had all in one micro-batch."""
    (ours,) = (row for row in result("learner_step.json")["rows"] if row["side"] == "ours" and row["shape"] == "Qwen/Qwen3-0.6B")
    learner = learner_memory(
        qwen3_06b, ranks=1, zero_stage=0, average=False, micro_tokens=16 * 640, checkpointing=False, chunk_bytes=2560 << 20
    )  # fmt: skip
    teacher = teacher_memory(qwen3_06b, own_weights=True, micro_tokens=16 * 896, num_tokens=16 * 512, hidden=True, chunk_bytes=0)
    held = learner["weights"] + learner["optimizer"] + teacher["weights"]
    assert held / 2**30 == pytest.approx(ours["held_gib"], rel=0.02)
    peak = sum(learner.values()) + teacher["weights"] + teacher["hand-over"]
    assert peak / 2**30 == pytest.approx(ours["peak_gib"], rel=0.15)


def test_by_hand():
    """A device of 1e9 operations and bytes a second, half of 0.42 of them at width 1,024."""
    model = replace(MODEL, hidden=1024)
    speed = 0.21e9
    assert share(UNIT, 1024) == 0.21 and share(replace(UNIT, name=CPU), 1024) == 0.35
    scored = 4 * forward(model.products, 19, 6) / speed
    assert scoring_seconds(model, UNIT, LOAD, hint=3, budget=40) == pytest.approx(scored + 2 * 2 * LAYER_SECONDS)  # 76 tokens: 2 passes of 2 layers
    learned = 4 * training(model.products, 16, 6) / speed
    assert learning_seconds(model, UNIT, LOAD, budget=64, checkpointing=False) == pytest.approx(learned + 3 * 2 * LAYER_SECONDS)
    again = 4 * forward(model.products, 16, 0) / speed
    assert learning_seconds(model, UNIT, LOAD, budget=64, checkpointing=True) == pytest.approx(learned + again + 4 * 2 * LAYER_SECONDS)


def test_batches_of_answers_come_one_after_the_other():
    """A device so fast that starting the layers takes longest; every prompt is read once, and every batch reads its own."""
    fast = replace(UNIT, flops=1e12)
    prefill = 2 * forward(MODEL.products, 10, 0) / (1e12 * share(fast, 8))
    floor = 2 * LAYER_SECONDS
    assert rollout_seconds(MODEL, fast, LOAD, rows=4) == pytest.approx(prefill + floor + 6 * floor)
    assert rollout_seconds(MODEL, fast, LOAD, rows=1) == pytest.approx(prefill + 4 * floor + 4 * 6 * floor)


def test_an_engine_that_starts_passes_as_one_is_bound_by_what_it_reads():
    """1,000 weights of 2 bytes and 4 rows of 13 tokens in the mean at 16 bytes, at 60 % of 1e9 bytes a second, over two devices."""
    model = replace(MODEL, parameters=1000, hidden=1 << 40)  # products cost next to nothing
    device = replace(UNIT, flops=1e30)
    assert rollout_seconds(model, device, LOAD, rows=4, compiled=True, gpus=2) == pytest.approx(6 * (2000 + 4 * 13 * 16) / (0.6e9 * 2))


def test_adapters_learn_faster_than_all_weights():
    lora = replace(MODEL, products=Products(body=900, head=256, heads=(8, 8), windows=(0, 0), adapters=20))
    assert learning_seconds(lora, UNIT, LOAD, budget=64, checkpointing=False) < learning_seconds(MODEL, UNIT, LOAD, budget=64, checkpointing=False)


def test_times_are_said_in_two_digits_and_a_unit_that_suits():
    assert [in_time(seconds) for seconds in (0.0123, 0.0998, 0.88, 1.26, 46.4, 99.7, 107, 150, 3 * 3600, 720000)] == [
        "12 ms", "100 ms", "0.88 s", "1.3 s", "46 s", "100 s", "107 s", "2.5 min", "3 h", "200 h",
    ]  # fmt: skip
