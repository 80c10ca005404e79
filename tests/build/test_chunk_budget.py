"""learner.chunk_bytes=auto: a share of the free memory within bounds, recorded by the run, kept when it goes on."""

import json

import pytest

import opd
import opd.api
from opd.build import devices
from opd.build.devices import chunk_bytes_from, recorded_chunk_bytes, with_chunk_bytes
from opd.config.load import load_recipe

MIB = 1 << 20


@pytest.mark.parametrize(
    ("free", "device", "wanted"),
    [
        (0, "cpu", 64 * MIB),
        (1 << 30, "cpu", 64 * MIB),
        (10 << 30, "cpu", 128 * MIB),  # 160 MiB, in whole 64 MiB
        (20 << 30, "cpu", 320 * MIB),
        (1 << 40, "cpu", 320 * MIB),
        (1 << 30, "cuda", 64 * MIB),
        (24 << 30, "cuda", 768 * MIB),
        (141 << 30, "cuda", 2560 * MIB),
    ],
)
def test_a_share_of_the_free_memory_within_bounds(free, device, wanted):
    assert chunk_bytes_from(free, device) == wanted


def test_a_number_in_the_recipe_stands_and_a_run_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "free_bytes", lambda device: 12 << 30)
    asked = load_recipe("recipes/runs/opsd_expr.yaml")
    assert asked.learner.chunk_bytes == "auto"
    assert with_chunk_bytes(asked, tmp_path).learner.chunk_bytes == 192 * MIB
    (tmp_path / "resolved.json").write_text(json.dumps({"recipe": {"learner": {"chunk_bytes": "auto"}}, "chunk_bytes": 64 * MIB}))
    assert with_chunk_bytes(asked, tmp_path).learner.chunk_bytes == 64 * MIB
    own = load_recipe("recipes/runs/opsd_expr.yaml", {"learner.chunk_bytes": 5000})
    assert with_chunk_bytes(own, tmp_path).learner.chunk_bytes == 5000
    assert recorded_chunk_bytes({"recipe": {"learner": {"chunk_bytes": 7}}}) == 7  # of runs that had no "auto"
    assert recorded_chunk_bytes({"recipe": {}}) == 0


@pytest.mark.parametrize("value", ["much", "64MiB", "0"])
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match=r"learner\.chunk_bytes"):
        load_recipe("recipes/runs/opsd_expr.yaml", {"learner.chunk_bytes": value})


def test_a_run_records_the_number_and_goes_on_with_it(tmp_path, monkeypatch):
    used = []
    real = opd.api.build_parts

    def watched(recipe, **keywords):
        parts = real(recipe, **keywords)
        used.append((recipe.learner.chunk_bytes, parts.learner.settings.chunk_bytes, parts.engine._chunk_bytes))
        return parts

    monkeypatch.setattr(opd.api, "build_parts", watched)
    for steps, free in ((1, 9 << 30), (2, 30 << 30)):
        monkeypatch.setattr(devices, "free_bytes", lambda device, free=free: free)
        overrides = {"steps": steps, "rollout.prompts": 2, "eval.num_problems": 0, "eval.final_problems": 0, "track.wandb": "disabled"}
        opd.train("recipes/runs/opsd_expr.yaml", {**overrides, "learner.kind": "torch"}, tmp_path / "run", quiet=True)
    assert used == [(128 * MIB,) * 3] * 2
    resolved = json.loads((tmp_path / "run" / "resolved.json").read_text())
    assert resolved["chunk_bytes"] == 128 * MIB and resolved["recipe"]["learner"]["chunk_bytes"] == "auto"
