import math
from dataclasses import replace

import fake_runs
import numpy as np
import pytest
from scipy import stats

from opd.comparison.config import load_comparison, parse_comparison
from opd.comparison.costs import COSTS, at_equal_cost, cost_per_point, costs_of
from opd.comparison.jobs import reported_jobs
from opd.comparison.report import write_report
from opd.comparison.results import CurvePoint, RunResult, read_run
from opd.comparison.statistics import Interval
from opd.comparison.summary import summarise
from opd.comparison.wording import per_point_text, spent
from opd.run.spending import Rates

ARM = {"recipe": "recipes/runs/grpo_expr.yaml"}


def point(step, accuracy, tokens, seconds=1.0, teacher=0.0, devices=1):
    return CurvePoint(
        step=step, accuracy=accuracy, generated_tokens=tokens, scored_tokens=2 * tokens, seconds=seconds, teacher_tokens=teacher, devices=devices
    )


def run(arm, seed, curve, tmp_path, devices=1):
    return RunResult(arm=arm, seed=seed, folder=tmp_path, state="finished", curve=tuple(curve), facts={"devices": devices})


def interval(mean, stderr, df):
    half = stats.t.ppf(0.975, df) * stderr
    return Interval(
        mean=mean, low=mean - half, high=mean + half, stderr=stderr, df=df, p_value=0.5, seeds=5, problems=9, scope="new seeds and new problems"
    )


def test_accuracy_at_equal_cost_by_hand(tmp_path):
    """The cheapest run ends at 80 tokens: everybody is read there, linear between evaluations."""
    arms = {
        "grpo": [run("grpo", seed, [point(0, 0.4, 0), point(1, 0.4 + gain, 100)], tmp_path) for seed, gain in ((0, 0.1), (1, 0.2), (2, 0.3))],
        "opd": [run("opd", seed, [point(0, 0.4, 0), point(1, 0.8, 40), point(2, 0.8 + seed / 50, 80)], tmp_path) for seed in (0, 1, 2)],
        "sft": [run("sft", 0, [point(0, 0.4, 0), point(1, 0.9, 0)], tmp_path)],
    }
    found = at_equal_cost(arms, COSTS["generated tokens"], "grpo")
    assert set(found) == {"grpo", "opd"} and {matched.cost for matched in found.values()} == {80}
    grpo, opd = np.array([0.48, 0.56, 0.64]), np.array([0.80, 0.82, 0.84])
    for name, values in (("grpo", grpo), ("opd", opd)):
        mean = values.mean()
        half = stats.t.ppf(0.975, 2) * values.std(ddof=1) / math.sqrt(3) / (mean * (1 - mean))  # on the logit scale
        high = 1 / (1 + math.exp(-math.log(mean / (1 - mean)) - half))
        assert (found[name].accuracy.mean, found[name].accuracy.high) == pytest.approx((mean, high))
        assert found[name].accuracy.scope == "new seeds, these problems only"
    difference = opd - grpo
    half = stats.t.ppf(0.975, 2) * difference.std(ddof=1) / math.sqrt(3)
    assert (found["opd"].difference.mean, found["opd"].difference.low) == pytest.approx((difference.mean(), difference.mean() - half))
    assert found["opd"].verdict == "better" and found["grpo"].difference is None
    stderr = difference.std(ddof=1) / math.sqrt(3)
    assert found["opd"].detectable == pytest.approx((stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)) * stderr) and found["grpo"].detectable is None
    needed = found["opd"].seeds_needed
    for planned, enough in ((needed, True), (needed - 1, False)):
        reach = (stats.t.ppf(0.975, planned - 1) + stats.t.ppf(0.8, planned - 1)) * difference.std(ddof=1) / math.sqrt(planned)
        assert (abs(difference.mean()) >= reach) == enough
    assert at_equal_cost({"sft": arms["sft"]}, COSTS["generated tokens"], "grpo") == {}


def test_kinds_of_cost_follow_devices_and_prices(tmp_path):
    runs = [run("opd", 0, [point(0, 0.4, 0), point(1, 0.8, 40, seconds=1800.0, teacher=2e6, devices=4)], tmp_path, devices=4)]
    last = runs[0].curve[-1]
    assert list(costs_of(runs, Rates(), 0)) == [*COSTS, "device-seconds"] and list(costs_of(runs, Rates(), 1)) == list(COSTS)
    priced = costs_of(runs, Rates(currency="EUR", device_hour=2.0, teacher_million=0.5), 0)
    assert priced["device-seconds"](last) == 7200 and priced["money, EUR"](last) == pytest.approx(4.0 + 1.0)
    assert costs_of(runs, Rates(device_hour=2.0), 2)["money, USD"](last) == pytest.approx(2.0)
    assert spent("money, EUR", 0.01234) == "0.0123 EUR" and spent("money, EUR", 12345.6) == "12,346 EUR"


def test_cost_of_a_point_by_hand():
    """Without spread of the cost, Fieller's bounds are the cost over those of the gain."""
    gain = interval(0.2, 0.03, 6.0)
    found = cost_per_point([1000.0, 1000.0, 1000.0], gain)
    assert (found.value, found.low, found.high) == pytest.approx((1000 / 20, 1000 / (100 * gain.high), 1000 / (100 * gain.low)))
    assert per_point_text("generated tokens", found) == "50 (37 to 79)"
    unclear = cost_per_point([1000.0], interval(0.05, 0.03, 6.0))
    assert unclear.value == pytest.approx(200) and unclear.high is None and unclear.low == pytest.approx(1000 / 12.340736, rel=1e-4)
    assert "to any)" in per_point_text("generated tokens", unclear)
    assert cost_per_point([1.0], interval(-0.1, 0.03, 6.0)).why == "no gain" and cost_per_point([1.0], None).why == "no base to compare"
    assert cost_per_point([0.0, 0.0], gain).why == "nothing of this kind was spent"


def test_the_interval_of_a_ratio_covers():
    """Cost and gain both vary: 600 simulations, 4 seeds, the true ratio is 50."""
    random, inside = np.random.default_rng(3), []
    for _ in range(600):
        gains, costs = random.normal(0.2, 0.05, 4), random.normal(1000.0, 150.0, 4)
        found = cost_per_point(list(costs), interval(gains.mean(), gains.std(ddof=1) / 2, 3.0))
        inside.append(found.value is not None and found.low <= 50 <= (found.high or math.inf))
    assert 0.93 <= np.mean(inside) <= 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"generated_tokens": 5, "money": 1}}, "give exactly one of generated_tokens, scored_tokens, steps"),
        ({"budget": {}}, "give exactly one of"),
        ({"budget": {"money": 1}}, "needs a price: set prices.device_hour"),
        ({"budget": {"gpu_seconds": 1}}, "unknown key 'budget.gpu_seconds'"),
        ({"budget": {"steps": 1}, "prices": {"device_hours": 1}}, "unknown key 'prices.device_hours' .*device_hour"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_comparison({"name": "c", "arms": {"grpo": ARM}, **changes})


@pytest.mark.parametrize(
    ("budget", "line", "key", "share"),
    [
        ({"generated_tokens": 100}, {"tokens/student": 50}, "budget.generated_tokens", 0.5),
        ({"scored_tokens": 100}, {"tokens/teacher": 20, "tokens/learner": 5}, "budget.scored_tokens", 0.25),
        ({"device_seconds": 100}, {"seconds/total": 5}, "budget.device_seconds", 0.1),
        ({"money": 2}, {"seconds/total": 450}, "budget.money", 0.25),
        ({"steps": 10}, {"step": 3}, "steps", 0.3),
    ],
)
def test_every_budget_reaches_the_recipe_and_is_followed(budget, line, key, share):
    comparison = parse_comparison({"name": "c", "arms": {"grpo": ARM}, "budget": budget, "prices": {"device_hour": 2.0, "devices": 2}})
    [job] = [job for job in reported_jobs(comparison, fake_runs.Path("runs"), {}) if job.seed == 0]
    assert job.overrides[key] == next(iter(budget.values()))
    assert ("prices.device_hour" in job.overrides) is (key in ("budget.money", "budget.device_seconds"))
    assert job.budget.share(line, comparison.rates, 2) == pytest.approx(share)


def test_the_report_shows_equal_cost_and_ledger(tmp_path):
    path = fake_runs.comparison_yaml(tmp_path / "in", ["base", "grpo", "opd"], tokens=40_000)
    comparison = load_comparison(str(path), {"tune": None, "prices": {"device_hour": 3600.0, "currency": "EUR", "watts": 300.0}})
    jobs = reported_jobs(comparison, tmp_path, {})
    for job in jobs:
        (fake_runs.fake_evaluate if job.by == "evaluate" else fake_runs.fake_train)(job.recipe, job.overrides, job.folder)
    runs = [read_run(job.folder, arm=job.arm, seed=job.seed) for job in jobs]
    summary = summarise(comparison, runs, {})
    opd = summary.arm("opd")
    assert opd.costs["money, EUR"] == pytest.approx(opd.costs["training seconds"])
    assert opd.ledger.money == pytest.approx(opd.costs["money, EUR"]) and opd.ledger.energy == pytest.approx(opd.ledger.device_seconds * 300 / 3.6e6)
    assert opd.matched["money, EUR"].cost == pytest.approx(min(run.end.seconds for run in runs if run.arm == "grpo"), rel=0.5)
    assert opd.matched["generated tokens"].verdict == "better" and opd.per_point["generated tokens"].high is not None
    page = write_report(tmp_path / "report", summary).read_text()
    assert 'id="equal"' in page and 'id="ledger"' in page and "nothing was measured" in page and "EUR" in page
    columns = (tmp_path / "report/results.csv").read_text().splitlines()[0].split(",")
    assert {"dev_at_equal_generated_tokens_low", "generated_tokens_per_point_high", "mean_money_EUR", "generalises_to"} <= set(columns)
    unpriced = summarise(comparison.model_copy(update={"prices": type(comparison.prices)()}), [replace(run) for run in runs], {})
    assert list(unpriced.costs) == list(COSTS) and "Nothing is priced" in write_report(tmp_path / "unpriced", unpriced).read_text()
