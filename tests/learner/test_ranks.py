"""Two ranks with unequal work against one rank with all of it, over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytest import approx, mark
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 400


def launch(out: Path, stage: int, world: int, other: str = "") -> dict:
    """Result of `tests/learner/rank.py` as rank 0 saved it. other: a checkpoint of another number of ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "rollout", "kernels"))
    shared = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks, outputs = [], [out.with_suffix(f".{rank}.log") for rank in range(world)]
    try:
        for rank, output in enumerate(outputs):
            command = [sys.executable, "-W", "ignore", str(ROOT / "tests/learner/rank.py"), str(out), str(stage), *filter(None, [other])]
            with output.open("w") as file:  # a pipe that nobody reads would stop a talkative rank, and the others with it
                environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT))
        for rank, output in zip(ranks, outputs, strict=True):
            assert rank.wait(timeout=DEADLINE_SECONDS) == 0, output.read_text()[-4000:]
    finally:
        for rank in ranks:
            rank.kill()
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return launch(folder / "one.pt", 0, 1) | {"checkpoint": str(folder / "checkpoint-one")}


def gap(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_are_one(alone, tmp_path, stage):
    pair = launch(tmp_path / "two.pt", stage, 2, alone["checkpoint"])
    for name in ("hybrid", "student_topk", "later"):
        assert pair[name]["losses"] == approx(alone[name]["losses"], abs=2e-5), name
        assert pair[name]["tokens"] == alone[name]["tokens"]
        assert pair[name]["norms"] == approx(alone[name]["norms"], rel=1e-4)
        assert gap(pair[name]["weights"], alone[name]["weights"]) < 1e-4, name
        assert gap(pair[name]["ema"], alone[name]["ema"]) < 1e-4, name

    assert [bool(reason) for reason in pair["nan"]["skipped"]] == [False, True, False], "a NaN on one rank is refused on both"
    assert pair["nan"]["norms"][1] is None
    assert all(torch.isfinite(tensor).all() for tensor in pair["nan"]["weights"].values())
    assert pair["idle"]["skipped"] == [""] * 3, "a rank without answers takes part"

    if stage == 2:
        assert pair["bf16"]["losses"] == approx(alone["bf16"]["losses"], rel=2e-2, abs=1e-4)
        assert gap(pair["bf16"]["weights"], alone["bf16"]["weights"]) < 2e-2
        assert {tensor.dtype for tensor in pair["bf16"]["weights"].values()} == {torch.bfloat16}
        assert pair["offloaded"]["losses"] == approx(pair["hybrid"]["losses"], abs=1e-6)
        assert gap(pair["offloaded"]["weights"], pair["hybrid"]["weights"]) < 1e-6

    if stage < 2:  # memory runs out on rank 0 alone; both replay
        assert pair["memory"]["budget"] == 32
        assert pair["memory"]["losses"] == approx(pair["memory_wanted"]["losses"], abs=1e-5)
        assert gap(pair["memory"]["weights"], pair["memory_wanted"]["weights"]) < 1e-4

    assert pair["resumed"]["losses"] == pair["later"]["losses"]
    assert gap(pair["resumed"]["ema"], pair["later"]["ema"]) == 0.0

    # one rank to two, and back: losses as if nothing had changed
    assert pair["moved"]["losses"] == approx(alone["later"]["losses"], abs=2e-5)
    assert gap(pair["moved"]["weights"], alone["later"]["weights"]) < 1e-4
    assert gap(pair["moved"]["ema"], alone["later"]["ema"]) < 1e-4
    back = launch(tmp_path / "back.pt", stage, 1, str(tmp_path / "checkpoint-two"))
    assert back["moved"]["losses"] == approx(pair["later"]["losses"], abs=2e-5)
    assert gap(back["moved"]["weights"], pair["later"]["weights"]) < 1e-4

    whole = sum(tensor.numel() for tensor in pair["hybrid"]["ema"].values())
    assert pair["hybrid"]["held"] == whole if stage == 0 else 0.4 * whole < pair["hybrid"]["held"] < 0.6 * whole  # each rank has its part

    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model-two").named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in pair["hybrid"]["weights"].items())
