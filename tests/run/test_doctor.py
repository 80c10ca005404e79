"""The doctor's figures by hand: seconds by role add up, bounds are what the arithmetic says, lines are found where there are any."""

import json

import pytest

from opd.cli import main
from opd.timing.doctor import advice, asynchrony, describe, examine


def folder_of(tmp_path, seconds, tokens=None, extra=None):
    """A run folder whose steps have these phase times (phase -> list) and token counts (cumulative name -> list a step)."""
    length, sums, lines = len(next(iter(seconds.values()))), {}, []
    for n in range(length):
        row = {"step": n + 1, **{f"seconds/{name}": values[n] for name, values in seconds.items()}}
        row["seconds/step"] = sum(values[n] for name, values in seconds.items() if "/" not in name and name != "guard")
        for name, values in (tokens or {}).items():
            sums[name] = sums.get(name, 0) + values[n]
            row[name] = sums[name]
        lines.append(json.dumps({**row, **(extra or {})}))
    folder = tmp_path / "r"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "eval.jsonl").write_text(json.dumps({"step": 0, "seconds": 2.5}) + "\n")
    return folder


def test_seconds_add_up_by_role(tmp_path):
    steps = {"rollout": [3.0] * 10, "views": [0.5] * 10, "teacher": [0.5] * 10, "prepare": [0.2] * 10, "join": [0.0] * 10, "learn": [1.8] * 10,
             "learn/gradient": [1.5] * 10, "sync": [0.1] * 10, "guard": [0.3] * 10, "mystery": [0.4] * 10}  # fmt: skip
    found = examine(folder_of(tmp_path, steps))
    busy = {role: one["busy"] for role, one in found["roles"].items()}
    expected = {"student (generates)": 30, "teacher (scores)": 10, "learner (updates)": 20, "weights on their way": 1, "other phases": 4}
    assert busy == pytest.approx(expected)
    assert sum(busy.values()) == pytest.approx(found["seconds"]) and found["unaccounted"] == pytest.approx(0, abs=1e-9)
    assert found["roles"]["learner (updates)"]["waits_for"] == pytest.approx({k: v for k, v in expected.items() if k != "learner (updates)"})
    assert found["outside"] == pytest.approx({"evaluation": 2.5, "guard": 3.0}) and found["parts"] == pytest.approx({"learn/gradient": 15.0})
    said = describe("r", found)
    assert "waited 46% for student (generates), 15% for teacher (scores)" in said and "Packing" not in said


def test_packing_and_k_by_hand(tmp_path):
    """A quarter is padding. Where learning follows its tokens, 0.1 s + 1 ms a token at 900 tokens, only the second part shrinks; else all may."""
    tokens = [800, 900, 1000] * 20
    seconds = {"rollout": [1.0] * 60, "learn": [0.1 + 0.001 * n for n in tokens]}
    counts = {"tokens/learner": tokens, "tokens/student": [500] * 60}
    folder = folder_of(tmp_path, seconds, counts, {"padding/learner": 0.25})
    (folder / "resolved.json").write_text(json.dumps({"objective": [{"distill": "reverse_kl", "support": {"student_topk": {"k": 64}}}, {"nll": {}}]}))
    found = examine(folder)["varied"]
    assert found["learn_now"] == pytest.approx(1.0, rel=0.01) and found["learn_packed"] == pytest.approx(1.0 - 0.25 * 0.9, rel=0.01)
    assert (found["k"], found["bytes"]) == (64.0, 8 * 64 * 500)
    said = " ".join(advice(examine(folder)))
    assert "25% of what the learner computes is padding" in said and "K = 64: 512 bytes a token" in said and "0.26 MB a step" in said
    flat = folder_of(tmp_path / "flat", {"rollout": [1.0] * 60, "learn": [0.5] * 60}, {"tokens/learner": tokens}, {"padding/learner": 0.25})
    assert examine(flat)["varied"]["learn_packed"] == pytest.approx(0.375)


def test_bounds_on_asynchrony_by_hand():
    even = asynchrony({"student (generates)": 50.0, "learner (updates)": 50.0}, 100.0)
    assert even["generation_apart"] == pytest.approx(2.0) and even["helps"]
    three = asynchrony({"student (generates)": 40.0, "teacher (scores)": 30.0, "learner (updates)": 20.0, "weights on their way": 10.0}, 100.0)
    assert three["generation_apart"] == pytest.approx(100 / 60) and three["all_apart"] == pytest.approx(100 / 50)
    lopsided = asynchrony({"student (generates)": 92.0, "learner (updates)": 8.0}, 100.0)
    assert lopsided["generation_apart"] == pytest.approx(100 / 92) and not lopsided["helps"]
    only_learner = asynchrony({"learner (updates)": 10.0}, 10.0)
    assert only_learner["generation_apart"] == pytest.approx(1.0) and not only_learner["helps"]


def test_simulated_layouts_by_hand(tmp_path):
    found = examine(folder_of(tmp_path, {"rollout": [2.0] * 60, "teacher": [1.0] * 60, "learn": [1.0] * 60}))
    by = {one["layout"]: one for one in found["simulated"]}
    assert by["a second place to generate, staleness 0"]["step"] == pytest.approx(3.0)
    assert by["a learner (and teacher) twice as fast, staleness 0"]["step"] == pytest.approx(3.0)
    assert by["staleness 1, generation on hardware of its own"]["step"] == pytest.approx(2.0, rel=0.05), "two seconds each side"
    assert by["staleness 1, generation on hardware of its own"]["times"] == pytest.approx(2.0, rel=0.05)


def test_generation_beside_the_steps_is_not_waited_for_twice(tmp_path):
    steps = {"rollout": [0.5] * 10, "rollout/ahead": [3.0] * 10, "learn": [3.5] * 10}
    found = examine(folder_of(tmp_path, steps))
    assert found["roles"]["student (generates)"]["busy"] == pytest.approx(30.0)
    assert found["roles"]["learner (updates)"]["waits_for"] == pytest.approx({"student (generates)": 5.0})
    assert found["roles"]["student (generates)"]["waits_for"] == pytest.approx({"the steps": 10.0})
    assert found["seconds"] == pytest.approx(40.0) and found["unaccounted"] == pytest.approx(0.0)


def test_it_says_when_asynchrony_will_not_help(tmp_path):
    found = examine(folder_of(tmp_path, {"rollout": [9.2] * 10, "learn": [0.8] * 10}))
    assert advice(found)[0].startswith("Asynchrony will not help: student (generates) takes 92% of the time") and "1.09" in advice(found)[0]


def test_a_line_is_found_where_time_follows_tokens_and_not_where_it_does_not(tmp_path):
    tokens = [100.0 + 50 * (n % 5) for n in range(20)]
    steps = {"rollout": [0.5 + 0.01 * t for t in tokens], "learn": [1.0 + (n * 7 % 3) for n in range(20)]}
    found = examine(folder_of(tmp_path, steps, {"tokens/student": tokens, "tokens/learner": tokens}))
    line = found["lines"]["rollout"]
    assert line["fixed"] == pytest.approx(0.5, abs=1e-6) and line["per_token"] == pytest.approx(0.01) and line["r2"] == pytest.approx(1.0)
    said = " ".join(advice(found))
    assert "learn: its time does not follow its tokens" in said and "rollout: its time grows with its tokens" in said
    assert "teacher" not in found["lines"]


def test_fixed_costs_are_named(tmp_path):
    tokens = [100.0 + 50 * (n % 5) for n in range(20)]
    found = examine(folder_of(tmp_path, {"learn": [2.0 + 0.005 * t for t in tokens]}, {"tokens/learner": tokens}))
    [said] = [sentence for sentence in advice(found) if "of its time does not depend on its tokens (2000 ms a step" in sentence]
    line = found["lines"]["learn"]
    assert f"{2 * (2 + 0.005 * line['tokens']) / (2 + 0.01 * line['tokens']):.2f} times as quick" in said
    assert 190 < line["tokens"] < 215


def test_slow_steps_and_drift(tmp_path):
    rollout = [1.0] * 12 + [9.0] + [1.0] * 7
    learn = [0.5] * 10 + [1.0] * 10
    found = examine(folder_of(tmp_path, {"rollout": rollout, "learn": learn}))
    assert found["slow_steps"]["steps"] == [13] and found["slow_steps"]["phase"] == "rollout"
    assert found["drift"]["learn"] == pytest.approx(2.0) and found["drift"]["rollout"] == pytest.approx(1.0)
    said = " ".join(advice(found))
    assert "Slower towards the end than at first: learn 2.0 times" in said and "first at step 13" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["doctor"], "a name is missing"),
        (["doctor", "nowhere"], "neither nowhere nor runs/nowhere exists"),
        (["doctor", "SHORT"], "at least 2"),
        (["doctor", "SHORT", "step=3"], "takes no options"),
    ],
)
def test_mistakes_are_explained(tmp_path, words, message, capfd):
    short = folder_of(tmp_path, {"learn": [1.0]})
    assert main([str(short) if word == "SHORT" else word for word in words]) == 2
    assert message in capfd.readouterr().err


def test_the_command_writes_its_figures(tmp_path, capfd):
    folder = folder_of(tmp_path, {"rollout": [1.0] * 8, "learn": [1.0] * 8})
    assert main(["doctor", str(folder)]) == 0
    assert "at most 2.00 times the speed" in capfd.readouterr().out
    assert json.loads((folder / "doctor.json").read_text())["roles"]["learner (updates)"]["busy"] == pytest.approx(8.0)
