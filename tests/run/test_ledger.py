"""What a run spent: sums that agree with its records to the token, across a kill and a resume; prices; stop rules on every quantity."""

import json
from signal import SIGTERM

import pytest

from opd import api
from opd.cli import main
from opd.config.load import load_recipe, parse_recipe, recipe_hash
from opd.run.folder import read_lines
from opd.run.spending import QUANTITIES, Rates, Spent, kilowatt_hours, money, role_seconds, used_up
from opd.timing.ledger import as_dict, audit, read_ledger
from tests.run.forked import TINY, Fault, opd_process, recipe_file

RECIPE = {
    "method": "opsd",
    "data": {"task": "expr", "verifier": {"fn": "tests.run.forked:coin"}},
    "writers": {"spans": {"ask": "S{solution}\n{segments}", "max_tokens": 8}},
    "group": 2,
    "steps": 8,
    "eval": {"every": 3, "num_problems": 4, "final_problems": 4, "final_samples": 2},
    "checkpoint": {"every": 2},
    "track": {"wandb": "disabled", "samples_every": 1, "samples": 64},
}
BUSY = {"student": 600.0, "learner": 900.0}
SPENT = Spent(student=900, auxiliary=100, teacher=4e6, learner=5000, evaluation=70, seconds=1800.0, devices=4, roles=BUSY)
RATES = Rates(currency="EUR", device_hour=2.5, teacher_million=0.5, watts=350.0, kilowatt_hour=0.3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run whole, and killed after three steps, asked to stop in an evaluation, and resumed."""
    folder = tmp_path_factory.mktemp("ledger")
    recipe = recipe_file(folder, **RECIPE)
    assert opd_process(folder, "train", recipe, "name=whole")[0] == 0, (folder / "stderr").read_text()
    for fault in (Fault(phase="learn", visit=4), Fault(phase="evaluate", visit=1, number=SIGTERM, where="end"), None):
        opd_process(folder, "train", recipe, "name=broken", fault=fault)
    assert "resumed after step" in (folder / "stderr").read_text()
    return folder / "runs"


@pytest.mark.slow
def test_the_sums_agree_with_every_record_across_a_kill_and_a_resume(runs):
    whole, broken = (as_dict(read_ledger(runs / name)) for name in ("whole", "broken"))
    assert broken["tokens"] == whole["tokens"] and broken["steps"] == whole["steps"] == 8
    assert broken["disagreements"] == [] and len(broken["checked"]) == 3
    written = json.loads((runs / "broken/ledger.json").read_text())
    assert written["tokens"] == broken["tokens"]
    answers = [record for path in (runs / "broken/samples").glob("*.jsonl") for record in read_lines(path)]
    assert len(answers) == 8 * 2 * 2
    assert broken["tokens"]["student"] == sum(len(record["tokens"]) for record in answers) > 0
    assert broken["tokens"]["auxiliary"] > 0 and broken["tokens"]["teacher"] > broken["tokens"]["student"]
    lengths = [line["length"] for path in (runs / "broken/generations").glob("*.jsonl") for line in read_lines(path)]
    assert broken["tokens"]["evaluation_dev"] + broken["tokens"]["evaluation_test"] == sum(lengths) > 0


@pytest.mark.slow
def test_seconds_by_role_fit_into_the_run(runs):
    found = as_dict(read_ledger(runs / "broken"))
    rows = list(read_lines(runs / "broken/metrics.jsonl"))
    assert found["seconds"]["training"] == pytest.approx(sum(row["seconds/step"] for row in rows))
    assert set(found["roles"]) == {"student", "teacher", "learner", "sync"}
    for one in found["roles"].values():
        assert one["busy"] + one["idle"] == pytest.approx(found["seconds"]["training"])
    assert sum(one["busy"] for one in found["roles"].values()) == pytest.approx(found["seconds"]["training"])
    assert found["roles"]["learner"]["busy"] == pytest.approx(sum(row[f"seconds/{p}"] for row in rows for p in ("prepare", "join", "learn")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("ledger.jsonl", lambda row: row["tokens"].update(teacher=row["tokens"]["teacher"] + 1), "teacher tokens: the steps add up to"),
        ("eval.jsonl", lambda row: row.update(tokens=row["tokens"] + 1), "its answers have"),
        ("metrics.jsonl", lambda row: row.update({"tokens/learner": row["tokens/learner"] + 1}), "learner tokens: the steps add up to"),
    ],
)
def test_one_token_too_many_is_seen(runs, name, change, sentence):
    path = runs / "whole" / name
    before = path.read_text()
    rows = list(read_lines(path))
    change(rows[-1])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        [said] = read_ledger(runs / "whole").disagreements
        assert sentence in said
    finally:
        path.write_text(before)


@pytest.mark.slow
def test_the_command(runs, capsys):
    assert main(["ledger", str(runs / "whole"), "device_hour=3600", "watts=1000", "devices=2", "currency=EUR"]) == 0
    said, found = capsys.readouterr().out, json.loads((runs / "whole/ledger.json").read_text())
    seconds = found["seconds"]["training"]
    assert found["money"] == pytest.approx(2 * seconds) and found["currency"] == "EUR"
    assert found["energy_kwh"] == pytest.approx(2 * seconds / 3600) and "nothing was measured" in found["energy_from"]
    assert "agrees to the token" in said and "(2 devices)" in said
    assert main(["ledger", str(runs / "whole"), "device_hours=2"]) == 2
    assert "device_hour" in capsys.readouterr().err
    assert main(["ledger", str(runs / "nothing")]) == 2
    assert "nothing does not exist" in capsys.readouterr().err


def test_money_and_energy_by_hand():
    # 4 devices for half an hour: 2 device-hours, 5.00; 4 million teacher tokens, 2.00; 2 h x 350 W = 0.7 kWh, 0.21
    assert kilowatt_hours(SPENT.device_seconds, RATES) == pytest.approx(0.7)
    assert money(SPENT.device_seconds, SPENT.teacher, RATES) == pytest.approx(5.0 + 2.0 + 0.21)


def test_every_quantity_can_stop_a_run():
    values = {"generated_tokens": 1000, "auxiliary_tokens": 100, "teacher_tokens": 4e6, "learner_tokens": 5000, "scored_tokens": 4.005e6}
    values |= {"evaluation_tokens": 70, "seconds": 1800, "device_seconds": 7200, "energy": 0.7, "money": 7.21}
    values |= {"student_seconds": 600, "teacher_seconds": 0, "learner_seconds": 900, "sync_seconds": 0}
    assert set(values) == set(QUANTITIES)
    for name, value in values.items():
        if value:
            assert used_up({name: value * (1 - 1e-9)}, SPENT, RATES).startswith("budget of ")
        assert used_up({name: value * 1.001 + 1e-9}, SPENT, RATES) == ""
    assert used_up({"money": 7}, SPENT, RATES) == "budget of 7 EUR used"


def test_answers_written_ahead_are_the_students_time():
    assert role_seconds({"rollout": 1.0, "teacher": 2.0, "views": 0.5, "learn": 3.0}) == {"student": 1.0, "teacher": 2.5, "learner": 3.0, "sync": 0}
    assert role_seconds({"rollout": 1.0, "rollout/ahead": 4.0})["student"] == 4.0


@pytest.mark.slow
@pytest.mark.parametrize("quantity", [name for name in QUANTITIES if name.endswith("_tokens")])
def test_a_run_stops_at_the_first_step_that_uses_its_tokens_up(runs, tmp_path, quantity):
    rows = list(read_lines(runs / "whole/metrics.jsonl"))
    counters = {"generated_tokens": ["student"], "auxiliary_tokens": ["written"], "scored_tokens": ["teacher", "learner"]}
    names = [f"tokens/{name}" for name in counters.get(quantity, [quantity.removesuffix("_tokens")])]
    limit = sum(rows[3][name] for name in names)  # after step 4; evaluations: that before the first step, and that after step 3
    expected = 4 if quantity != "evaluation_tokens" else 3
    folder = api.train(recipe_file(tmp_path, **RECIPE), {f"budget.{quantity}": int(limit)}, tmp_path / "run", quiet=True)
    assert json.loads((folder / "status.json").read_text())["why"].startswith(f"budget of {int(limit)} ")
    assert list(read_lines(folder / "metrics.jsonl"))[-1]["step"] == expected


@pytest.mark.parametrize("limits", [{"device_seconds": 1e-6}, {"role_seconds": {"teacher": 1e-6}}, {"money": 1e-9}, {"energy": 1e-12}], ids=str)
def test_a_run_stops_on_time_energy_and_money(tmp_path, limits):
    recipe = recipe_file(tmp_path, method="opsd", steps=5, budget=limits, prices={"device_hour": 1.0, "watts": 100.0})
    folder = api.train(recipe, {}, tmp_path / "run", quiet=True)
    assert list(read_lines(folder / "metrics.jsonl"))[-1]["step"] == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budget": {"money": 5}}, "budget.money=5 needs a price: set prices.device_hour"),
        ({"budget": {"energy": 1}, "prices": {"device_hour": 2}}, "needs prices.watts"),
        ({"prices": {"kilowatt_hour": 0.3}}, "set watts too"),
        ({"method": "grpo", "group": 2, "budget": {"teacher_tokens": 10}}, "which has no teacher"),
        ({"budget": {"auxiliary_tokens": 10}}, "which has no writers: use budget.generated_tokens"),
        ({"budget": {"gpu_seconds": 10}}, "unknown key 'budget.gpu_seconds'"),
        ({"budget": {"role_seconds": {"teachers": 3}}}, "teacher"),
        ({"budget": {"seconds": -1}}, "must be at least 0"),
        ({"prices": {"device_hour": -2}}, "must be at least 0"),
    ],
)
def test_rules_that_cannot_work_are_refused(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load_recipe(recipe_file(tmp_path, **{"method": "opsd", "steps": 2, **keys}), {})


def test_prices_do_not_make_another_run():
    plain, priced = (parse_recipe({**TINY, "prices": prices}) for prices in ({}, {"device_hour": 3.0}))
    assert recipe_hash(plain) == recipe_hash(priced)


def test_evaluations_that_an_export_tells_no_tokens_of_are_not_compared(tmp_path):
    """A W&B export of a run of our own has the counter of evaluation tokens, but evaluations with accuracies alone."""
    rows = [{"step": 3, "tokens/evaluation": 80.0}]
    assert audit(tmp_path, rows, [{"step": 0, "split": "dev", "avg@k": 0.5}]) == ([], [])
    known = [{"step": 0, "split": "dev", "tokens": 79, "generations": "none"}]
    assert audit(tmp_path, rows, known)[1] == ["evaluation tokens: eval.jsonl adds up to 79, the counter says 80"]
