"""The simulator against schedules drawn by hand, and laws that hold for any costs."""

import json
import random

import pytest

from opd.cli import main
from opd.timing.simulate import Layout, StepCosts, calibrate, fixed_share_of, predict, schedule, simulate

COST = StepCosts(rollout_shared=4.0, teacher=1.0, learn=2.0, sync=0.5)


def when(events, task):
    return [(event.start, event.end) for event in events if event.task == task]


def test_one_after_the_other_by_hand():
    events = schedule([COST, COST], Layout())
    assert [(e.task, e.start, e.end) for e in events] == [
        ("sync", 0.0, 0.5), ("rollout", 0.5, 4.5), ("teacher", 4.5, 5.5), ("learn", 5.5, 7.5),
        ("sync", 7.5, 8.0), ("rollout", 8.0, 12.0), ("teacher", 12.0, 13.0), ("learn", 13.0, 15.0),
    ]  # fmt: skip
    found = predict([COST, COST], Layout())
    assert found.step == 7.5 and found.idle == {"actors": pytest.approx(1 - 8 / 15), "learner": pytest.approx(1 - 7 / 15)} and found.staleness == 0


def test_one_version_ahead_by_hand():
    events = schedule([COST] * 3, Layout(max_staleness=1))
    assert when(events, "sync") == [(0.0, 0.5), (8.5, 9.0), (13.0, 13.5)]
    assert when(events, "rollout") == [(0.5, 4.5), (4.5, 8.5), (9.0, 13.0)]  # two on the first weights, then one a step
    assert when(events, "learn") == [(5.5, 7.5), (10.0, 12.0), (14.5, 16.5)]
    assert predict([COST] * 3, Layout(max_staleness=1)).staleness == pytest.approx(2 / 3)


def test_replicas_share_what_can_be_shared_and_a_teacher_apart_leaves_the_learner_idle():
    cost = StepCosts(rollout_shared=4.0, rollout_fixed=1.0, teacher=1.0, learn=2.0)
    assert predict([cost], Layout(replicas=4)).step == 1.0 + 1.0 + 1.0 + 2.0
    apart = predict([cost], Layout(teacher_apart=True))
    assert apart.step == 8.0 and apart.idle["teacher"] == 7 / 8 and apart.idle["learner"] == 6 / 8


def any_costs(dice, number=12):
    def draw():
        return StepCosts(
            rollout_shared=dice.uniform(0, 5), rollout_fixed=dice.uniform(0, 2), teacher=dice.uniform(0, 3), learn=dice.uniform(0, 4),
            sync=dice.uniform(0, 1),
        )  # fmt: skip

    return [draw() for _ in range(number)]


@pytest.mark.parametrize("seed", range(20))
def test_laws(seed):
    dice = random.Random(seed)
    costs = any_costs(dice)
    apart = bool(seed % 2)
    total = sum(c.rollout_shared + c.rollout_fixed + c.teacher + c.learn + c.sync for c in costs)
    assert predict(costs, Layout(teacher_apart=apart)).step == pytest.approx(total / len(costs))  # nothing overlaps at staleness 0
    for staleness in (0, 1, 2):
        steps = [predict(costs, Layout(replicas=r, max_staleness=staleness, teacher_apart=apart)).step for r in (1, 2, 3, 8)]
        assert steps == sorted(steps, reverse=True)  # more replicas are never slower
    slower = [predict(costs, Layout(max_staleness=s, teacher_apart=apart)).step for s in (0, 1, 2, 5)]
    assert all(later <= first + 1e-9 for first, later in zip(slower, slower[1:], strict=False))
    for layout in (Layout(replicas=3, max_staleness=2, teacher_apart=apart), Layout(max_staleness=1)):
        found, events = predict(costs, layout), schedule(costs, layout)
        assert all(-1e-9 <= idle <= 1 for idle in found.idle.values())
        least = max(sum(c.learn + c.sync for c in costs), sum(c.rollout_fixed + c.rollout_shared / layout.replicas for c in costs))
        assert found.step * len(costs) >= least - 1e-9  # no role works faster than alone
        for role in {event.role for event in events}:
            own = [event for event in events if event.role == role]
            assert all(a.end <= b.start + 1e-9 for a, b in zip(own, own[1:], strict=False))  # one thing at a time
        learned = {event.step: event.start for event in events if event.task == "learn"}
        begun = {event.step: event.start for event in events if event.task == "rollout"}
        ended = {event.step: event.end for event in events if event.task == "learn"}
        for step in range(layout.max_staleness + 1, len(costs)):
            assert begun[step] >= ended[step - layout.max_staleness - 1] - 1e-9 and learned[step] >= begun[step]  # the bound holds


def row(rollout, **more):
    return {
        "seconds/rollout": rollout,
        "seconds/learn": 2.0,
        "seconds/views": 0.1,
        "seconds/teacher": 1.0,
        "seconds/sync": 0.2,
        "seconds/step": 3.3 + rollout,
        **more,
    }


def test_calibration_from_metrics():
    rows = [row(99.0)] * 3 + [row(4.0)] * 2
    assert calibrate(rows) == [StepCosts(rollout_shared=4.0, teacher=1.0, learn=2.1, sync=0.2)] * 2
    [ahead] = calibrate([row(0.1, **{"seconds/rollout/ahead": 6.0})], replicas=2, fixed_share=0.5)
    assert ahead.rollout_fixed + ahead.rollout_shared == pytest.approx(8.0) and ahead.rollout_fixed + ahead.rollout_shared / 2 == pytest.approx(6.0)
    assert fixed_share_of([row(4.0)], [row(3.0)], 0.5) == 0.5  # 2 + n x 2 over the batch
    assert fixed_share_of([row(4.0)], [row(2.0)], 0.5) == 0.0 and fixed_share_of([row(4.0)], [row(5.0)], 0.5) == 1.0


def run_folder(path, rows, prompts=8):
    path.mkdir()
    (path / "resolved.json").write_text(json.dumps({"recipe": {"engine": {"replicas": 1}, "rollout": {"prompts": prompts}}}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_the_command(tmp_path, capsys):
    run, small = run_folder(tmp_path / "run", [row(4.0)] * 8), run_folder(tmp_path / "small", [row(3.0)] * 8, prompts=4)
    assert main(["simulate", str(run), "replicas=2", f"smaller={small}"]) == 0
    said = capsys.readouterr().out
    assert "7.300 s a step (simulated as it was: 7.300 s)" in said and "predicted: 6.300 s" in said and "50 % of a rollout" in said
    assert simulate(run, {"staleness": 1, "learner_speed": 2})["predicted"].step < 7.3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["replica=2"], "did you mean 'replicas'"),
        (["replicas=0"], "at least 1"),
        (["replicas=two"], "write a number"),
        (["staleness=-1"], "at least 0"),
        (["learner_speed=0"], "above 0"),
        (["teacher_apart=maybe"], "true or false"),
        (["fixed_share=2"], "from 0"),
        (["smaller=nowhere"], "neither nowhere nor runs/nowhere exists"),
        (["smaller=RUN"], "fewer prompts"),
    ],
)
def test_bad_input(tmp_path, capsys, words, said):
    run = run_folder(tmp_path / "run", [row(4.0)] * 8)
    assert main(["simulate", str(run), *(word.replace("RUN", str(run)) for word in words)]) == 2
    assert said in capsys.readouterr().err
    assert main(["simulate", str(tmp_path), *words]) == 2
    assert main(["simulate"]) == 2
