import csv
import re
from html.parser import HTMLParser

import fake_runs
import pytest

from opd.comparison.config import load_comparison
from opd.comparison.jobs import choose, reported_jobs, tuning_jobs
from opd.comparison.report import write_report
from opd.comparison.results import GREEDY, PRIMARY, read_run
from opd.comparison.summary import COSTS, summarise
from opd.comparison.wording import TOKENS, amount, duration, points, ratio_text, reach_text, sentences

ARMS = ["base", "sft", "grpo", "opd", "opsd_ema", "opsd_live", "idle"]


def do(jobs):
    for job in jobs:
        if (job.arm, job.seed) == ("sft", 2):
            continue
        (fake_runs.fake_evaluate if job.by == "evaluate" else fake_runs.fake_train)(job.recipe, job.overrides, job.folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("fake")
    comparison = load_comparison(
        str(fake_runs.comparison_yaml(root / "in", ARMS, tokens=60_000)), {"tune": {"grid": {"optimizer.lr": [1e-4, 3e-4]}}, "target": 0.6}
    )
    searches = tuning_jobs(comparison, root)
    do(searches)
    tuned = choose(comparison, searches)
    jobs = reported_jobs(comparison, root, {arm: found.point for arm, found in tuned.items()})
    do(jobs)
    summary = summarise(comparison, [read_run(job.folder, arm=job.arm, seed=job.seed) for job in jobs], tuned)
    return summary, write_report(root / comparison.name, summary)


def test_verdicts_follow_the_invented_truth(made):
    summary, _ = made
    assert summary.pair("opd", "grpo").verdict == "better" and summary.pair("grpo", "opd").verdict == "worse"
    assert summary.pair("idle", "base").verdict == "unresolved"
    assert summary.pair("opd", "opsd_ema").verdict == "unresolved"
    forward, backward = summary.pair("opd", "grpo", GREEDY), summary.pair("grpo", "opd", GREEDY)
    assert forward.interval.mean == -backward.interval.mean and forward.holm_p == backward.holm_p >= forward.interval.p_value


def test_who_learned_and_who_did_not(made):
    summary, _ = made
    assert {arm.name: arm.learned for arm in summary.arms} == {
        "base": None, "sft": True, "grpo": True, "opd": True, "opsd_ema": True, "opsd_live": True, "idle": False,
    }  # fmt: skip
    assert summary.arm("idle").ratio[TOKENS].why == "did not learn here"
    assert summary.arm("grpo").ratio[TOKENS].value == 1.0


def test_ratios_by_kind_of_cost(made):
    summary, _ = made
    opd, grpo = summary.arm("opd"), summary.arm("grpo")
    assert opd.reached[TOKENS].typical < 12_000
    assert opd.ratio[TOKENS].at_least == (grpo.reached[TOKENS].reached < 3)
    by_tokens, by_scored = opd.ratio["generated tokens"].value, opd.ratio["learner and teacher tokens"].value
    assert by_tokens == pytest.approx(2 * by_scored)  # its teacher reads as many tokens as its learner, the baseline has none
    assert set(opd.ratio) == set(COSTS)


def test_missing_and_collapsed_runs_are_named(made):
    summary, page = made
    assert [run.seed for run in summary.arm("sft").failed] == [2]
    assert not summary.arm("opd").collapsed
    text = " ".join(sentences(summary))
    assert "Not all runs finished, and the numbers rest on those that did: sft 2 of 3 seeds." in text
    assert "sft, seed 2: not run yet" in page.read_text()


def test_sentences_are_made_from_the_numbers(made):
    summary, _ = made
    lines = sentences(summary)
    best = max((arm for arm in summary.arms if arm.trained), key=lambda arm: arm.test().mean)
    assert lines[0].startswith(f"{best.label} has the highest test accuracy at temperature 1: {100 * best.test().mean:.1f} %")
    assert any(line.startswith("Did not learn here") and "idle" in line for line in lines)
    base = summary.arm("base")
    untrained = next(line for line in lines if line.startswith("Untrained"))
    assert f"{100 * base.test().mean:.1f} % at temperature 1, {100 * base.test(GREEDY).mean:.1f} % greedy" in untrained
    assert "Fewer than five seeds" in " ".join(lines)


class Outline(HTMLParser):
    """Open tags at the end, and the text."""

    VOID = {"meta", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_opens_offline(made):
    summary, page = made
    html = page.read_text()
    outline = Outline()
    outline.feed(html)
    assert outline.open == []
    assert not re.search(r"(?:src|href)\s*=|https?://|@import|url\(|<script", html)
    text = " ".join(outline.text)
    assert "nan" not in text.lower().split() and "inf" not in text.lower().split() and "None" not in text.split()
    assert html.count("<pre") == sum(len(arm.runs) for arm in summary.arms)
    assert "truncated_reverse_kl" in html and "base at its best" in text
    assert "What the search cost" in text


def test_files_beside_the_page(made):
    summary, page = made
    pictures = sorted(path.name for path in page.parent.glob("*.png"))
    assert pictures == [
        "accuracy-vs-generated-tokens.png",
        "accuracy-vs-learner-and-teacher-tokens.png",
        "accuracy-vs-training-seconds.png",
        "differences.png",
    ]
    assert all((page.parent / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in pictures)
    with (page.parent / "results.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ARMS
    assert float(rows["opd"]["avg_at_k_temperature_1"]) == pytest.approx(summary.arm("opd").test(PRIMARY).mean, abs=1e-4)
    assert rows["opd"]["verdict"] == "better" and rows["opsd_ema"]["allow"] == "truncated_reverse_kl"
    assert rows["opd"]["tuning_generated_tokens"] == "120000" or float(rows["opd"]["tuning_generated_tokens"]) == 120_000


def test_labels_with_markup_stay_text(made, tmp_path):
    summary, _ = made
    comparison = summary.comparison.model_copy(update={"title": "<script>alert(1)</script>"})
    runs = [run for arm in summary.arms for run in arm.runs]
    page = write_report(tmp_path, summarise(comparison, runs, {})).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_a_comparison_without_any_result_still_makes_a_page(made, tmp_path):
    comparison = made[0].comparison
    runs = [read_run(tmp_path / "none" / arm / str(seed), arm=arm, seed=seed) for arm in ARMS for seed in comparison.seeds]
    summary = summarise(comparison, runs, {})
    assert sentences(summary) == ["No trained arm has a test result yet."]
    assert "not run yet" in write_report(tmp_path, summary).read_text()


def test_numbers_as_text():
    assert [amount(value) for value in (950, 61_234, 120_000, 1_200_000)] == ["950", "61.2 k", "120 k", "1.20 M"]
    assert [duration(value) for value in (4.2, 42, 200, 9_000)] == ["4.2 s", "42 s", "3.3 min", "2.5 h"]
    assert [points(value) for value in (0.123, -0.05, 0.0001)] == ["+12.3", "\N{MINUS SIGN}5.0", "0.0"]


def test_a_target_that_nobody_reaches_prints_budget(made):
    comparison = made[0].comparison.model_copy(update={"target": 0.999})
    runs = [run for arm in made[0].arms for run in arm.runs]
    summary = summarise(comparison, runs, {})
    assert reach_text(summary.arm("opd").reached[TOKENS], TOKENS) == "> budget (60.0 k)"
    assert ratio_text(summary.arm("opd").ratio[TOKENS]) == "> budget"
    assert "No arm reached 99.9 % on the dev split with every seed inside its budget." in sentences(summary)
