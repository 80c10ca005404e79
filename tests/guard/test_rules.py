"""Every rule on numbers written by hand, on recorded collapses (which it must see) and on recorded healthy runs (where it must be silent)."""

import json
from pathlib import Path

import pytest

from opd.guard import rules as guard
from opd.guard.rules import RULES, History, Watch, parse_rules

SERIES = Path(__file__).parent / "series"
COLLAPSED = sorted(SERIES.glob("collapse-*.json"))
HEALTHY = sorted(SERIES.glob("healthy-*.json"))


def history(evals=(), **columns):
    """Steps from columns such as entropy_student=[...]; a name's first underscore is the metric's slash."""
    length = max((len(values) for values in columns.values()), default=0)
    names = {key: key.replace("_", "/", 1) for key in columns}
    return History(steps=[{names[k]: v[n] for k, v in columns.items()} for n in range(length)], evals=evals)


def dev(step, avg, passed=None, stderr=0.01, k=8):
    return {"step": step, "avg@k": avg, "stderr": stderr, "k": k, "pass@k": passed if passed is not None else avg, "pass@k_stderr": stderr}


@pytest.mark.parametrize(
    ("rule", "good", "bad", "said"),
    [
        ("entropy_collapse", {"entropy_student": [0.1] * 10 + [0.02] * 10}, {"entropy_student": [0.1] * 10 + [0.004] * 10}, "0.1000 to 0.0040"),
        ("entropy_rise", {"entropy_student": [0.1] * 10 + [0.02] * 20}, {"entropy_student": [0.02] * 10 + [0.06] * 10}, "0.0200 to 0.0600"),
        ("length_drift", {"length_mean": [10] * 10 + [14.9] * 10}, {"length_mean": [10] * 10 + [15.1] * 10}, "10.0 to 15.1"),
        ("length_drift", {"length_mean": [10] * 10 + [5.1] * 10}, {"length_mean": [10] * 10 + [4.9] * 10}, "10.0 to 4.9"),
        ("truncation_drift", {"length_truncated": [0.1] * 10 + [0.19] * 10}, {"length_truncated": [0.1] * 10 + [0.21] * 10}, "21.0%"),
        ("repetition", {"text_repeated_4": [0.01] * 10 + [0.06] * 10}, {"text_repeated_4": [0.01] * 10 + [0.08] * 10}, "8.0%"),
        ("distinct_n", {"text_distinct_2": [0.5] * 10 + [0.31] * 10}, {"text_distinct_2": [0.5] * 10 + [0.29] * 10}, "0.500 to 0.290"),
        ("accuracy_fall", {"accuracy_train": [0.9] * 12 + [0.8] * 12}, {"accuracy_train": [0.9] * 12 + [0.7] * 12}, "0.900 to 0.700"),
        ("leak", {"text_leak/main": [0.1] * 10 + [0.29] * 10}, {"text_leak/main": [0.1] * 10 + [0.31] * 10}, "main: 31.0%"),
        ("announced_answer", {"text_announced": [0.1] * 10 + [0.29] * 10}, {"text_announced": [0.1] * 10 + [0.31] * 10}, "31.0%"),
        ("style_drift", {"text_style": [0.1] * 10 + [0.2] * 10}, {"text_style": [0.3] * 10 + [0.1] * 10}, "30% to 10%"),
        ("same_answer", {"text_duplicates": [0.0] * 20}, {"text_duplicates": [0.0] * 10 + [0.3] * 10}, "30.0%"),
        (
            "reward_without_accuracy",
            {"reward_mean": [0.2] * 10 + [0.5] * 10, "accuracy_train": [0.2] * 10 + [0.5] * 10},
            {"reward_mean": [0.2] * 10 + [0.5] * 10, "accuracy_train": [0.2] * 10 + [0.1] * 10},
            "0.200 to 0.500",
        ),
    ],
)
def test_a_rule_speaks_past_its_threshold_and_not_before(rule, good, bad, said):
    assert RULES[rule](history(**good)) == ""
    assert said in RULES[rule](history(**bad))
    short = {name: values[: len(values) // 2 + 3] for name, values in bad.items()}
    assert RULES[rule](history(**short)) == "", "fewer than two windows say nothing"


def test_noise_is_no_fall_in_accuracy():
    noisy = [1.0, 0.0] * 12 + [0.9, 0.0] * 12
    assert guard.accuracy_fall(history(accuracy_train=noisy), fall=0.01) == ""
    assert guard.accuracy_fall(history(accuracy_train=[0.5] * 12 + [0.45] * 12), fall=0.01) != ""


def test_evaluations_count_with_their_errors():
    assert "0.950 (step 10) to 0.850" in guard.dev_fall(history([dev(0, 0.6), dev(10, 0.95), dev(20, 0.85)]))
    assert guard.dev_fall(history([dev(0, 0.6), dev(10, 0.95, stderr=0.05), dev(20, 0.85)])) == ""
    assert guard.dev_fall(history([dev(0, 0.6), dev(10, 0.95), dev(20, 0.9)])) == ""
    sharper = [dev(0, 0.5, 0.9), dev(10, 0.6, 0.8)]
    assert "pass@8 fell from 0.900 (step 0) to 0.800 while avg@8 rose" in guard.pass_at_k(history(sharper))
    assert guard.pass_at_k(history([dev(0, 0.5, 0.9), dev(10, 0.4, 0.8)])) == "", "both falling is another rule's matter"
    assert guard.pass_at_k(history([dev(0, 0.5, 0.9, k=1), dev(10, 0.6, 0.8, k=1)])) == "", "pass@1 is avg@1"
    hacked = history([dev(0, 0.6), dev(20, 0.5)], accuracy_train=[0.6] * 10 + [0.8] * 10)
    assert "dev accuracy fell from 0.600 to 0.500" in guard.train_without_dev(hacked)
    assert guard.train_without_dev(history([dev(0, 0.6), dev(20, 0.59)], accuracy_train=[0.6] * 10 + [0.8] * 10)) == ""


def test_what_is_missing_or_not_a_number_says_nothing():
    rows = [{"entropy/student": None, "text/style": float("nan")} for _ in range(40)]
    assert [name for name, rule in RULES.items() if rule(History(steps=rows))] == []
    assert [name for name, rule in RULES.items() if rule(History(steps=[]))] == []


def replayed(path):
    """(step, rule) of every alarm that a run would have raised, dev evaluations seen one step late as in a run."""
    recorded = json.loads(path.read_text())
    watch, said = Watch(rules=parse_rules("warn", {})), []
    for row in recorded["steps"]:
        watch.steps.append(row)
        watch.evals = [one for one in recorded["evals"] if one["step"] < row["step"]]
        said += [(alarm.step, alarm.rule) for alarm in watch.look(row["step"])]
    return said, recorded


@pytest.mark.parametrize("path", COLLAPSED, ids=lambda path: path.stem)
def test_a_recorded_collapse_is_seen_in_time(path):
    """At least two rules, the first no later than 25 steps after dev accuracy was last within 0.05 of its best, and none before."""
    said, recorded = replayed(path)
    best = max(row["avg@k"] for row in recorded["evals"])
    well = max(row["step"] for row in recorded["evals"] if row["avg@k"] > best - 0.05)
    assert len(said) >= 2, said
    assert well < said[0][0] <= well + 25, (well, said)


@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_a_healthy_run_raises_no_alarm(path):
    assert replayed(path)[0] == []


def test_there_are_recordings():
    assert len(COLLAPSED) >= 3 and len(HEALTHY) >= 11


def test_a_rule_speaks_once_until_all_was_well_for_a_while():
    watch = Watch(rules=parse_rules("off", {"length_drift": {"action": "warn", "window": 1}}), calm=2)
    said = []
    for step, length in enumerate([10, 20, 20, 10, 20, 10, 10, 10, 20], start=1):
        watch.steps.append({"step": step, "length/mean": length})
        said += [alarm.step for alarm in watch.look(step)]
    assert said == [2, 9]


def test_the_most_severe_action_comes_first_and_a_roll_back_forgets():
    rules = parse_rules("warn", {"length_drift": {"action": "roll_back", "window": 1}, "truncation_drift": {"window": 1, "rise": 0.0}})
    watch = Watch(rules={name: rules[name] for name in ("truncation_drift", "length_drift")})
    for step in range(1, 6):
        watch.steps.append({"step": step, "length/mean": 10 if step < 4 else 30, "length/truncated": 0.0 if step < 4 else 0.5})
        alarms = watch.look(step)
        assert [alarm.action for alarm in alarms] == (["roll_back", "warn"] if step == 4 else [])
    watch.forget(3)
    assert [row["step"] for row in watch.steps] == [1, 2, 3] and watch.look(3) == []


@pytest.mark.parametrize(
    ("action", "rules", "message"),
    [
        ("warn", {"leek": "pause"}, "unknown rule 'leek' (did you mean 'leak'?)"),
        ("warn", {"leak": "stop"}, "action 'stop'"),
        ("warn", {"leak": {"action": "pause", "rize": 0.1}}, "unknown parameter 'rize' (did you mean 'rise'?)"),
        ("warn", {"leak": {"rise": 7}}, "rise"),
    ],
)
def test_mistakes_are_explained(action, rules, message):
    with pytest.raises(ValueError, match=".") as caught:
        parse_rules(action, rules)
    assert message in str(caught.value)


def test_actions():
    assert parse_rules("off", {}) == {}
    rules = parse_rules("warn", {"leak": False, "dev_fall": "pause"})  # YAML reads off as false
    assert "leak" not in rules and rules["dev_fall"][0] == "pause" and rules["entropy_rise"][0] == "warn"
    assert set(parse_rules("pause", {})) == set(RULES)
