"""The arithmetic of docs/scaling.md by hand, and what must hold whatever its assumptions."""

import pytest

from opd.timing.scaling import STUDENTS, Machine, Workload, decode_seconds, learner_fits, plan, step_costs, sync_seconds

EIGHT, THIRTY_TWO = STUDENTS


def test_bytes_and_seconds_by_hand():
    machine = Machine()
    assert EIGHT.weight_bytes == 16.38e9 and EIGHT.cache_bytes == 2 * 36 * 8 * 128 * 2  # keys and values, layers, heads, dimension, bytes
    assert sync_seconds(EIGHT, machine) == pytest.approx(2 * 16.38e9 / 40e9)
    assert decode_seconds(EIGHT, 1, 0, machine) == pytest.approx(16.38e9 / (3.35e12 * 0.6))  # one answer: the weights are read once a token
    crowded = decode_seconds(EIGHT, 4096, 0, machine)
    assert crowded == pytest.approx(2 * 8.19e9 * 4096 / (989e12 * 0.4))  # very many: arithmetic
    assert learner_fits(EIGHT, 4, machine, 16) and not learner_fits(EIGHT, 2, machine, 16) and not learner_fits(THIRTY_TWO, 8, machine, 16)
    costs = step_costs(EIGHT, Workload(answers=64), 4, 4, machine)
    assert costs.learn == pytest.approx(5 * 2 * 8.19e9 * 64 * (512 + 4096) / (4 * 989e12 * 0.4))
    assert costs.teacher == pytest.approx(2 * 8.19e9 * 64 * (2048 + 4096) / (4 * 989e12 * 0.4))


def test_plans_use_what_there_is():
    for student in STUDENTS:
        steps = []
        for gpus in (8, 64, 512):
            found = plan(student, gpus, Machine())
            together = found.layout.max_staleness == 0
            assert found.rollout + (0 if together else found.learner) == gpus and found.rollout % student.gpus == 0
            assert found.layout.replicas * student.gpus == found.rollout
            assert learner_fits(student, found.learner, Machine(), 4 if found.offloaded else 16)
            assert found.found.step <= plan(student, gpus, Machine(), staleness=0).found.step + 1e-9
            steps.append(found.found.step)
        assert steps[2] <= steps[0]  # work grows with the GPUs: finer splits may only help
    with pytest.raises(ValueError, match="does not fit 1 GPUs"):
        plan(EIGHT, 1, Machine(memory=16e9))
