import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import fake_runs
import pytest

from opd.comparison.about import REWARDED, about, splits
from opd.comparison.answers import answers, cheaper_text, leading_pair, notes, sentences
from opd.comparison.arms import flattened, recipe_rows
from opd.comparison.breakdown import breakdowns
from opd.comparison.config import load_comparison
from opd.comparison.costs import COSTS, SCORED, TOKENS
from opd.comparison.curves import marks, over_seeds, passed_band
from opd.comparison.exports import escaped, latex_table
from opd.comparison.jobs import choose, reported_jobs, tuning_jobs
from opd.comparison.report import write_report
from opd.comparison.results import GREEDY, PRIMARY, read_run
from opd.comparison.summary import Summary, summarise
from opd.comparison.wording import (
    amount,
    detectable_text,
    duration,
    p_text,
    percent,
    percent_interval,
    points,
    points_interval,
    ratio_text,
    reach_text,
)
from opd.credit import CREDITS

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
    assert "fewer than 5 seeds show the machinery, claims need 5 or more" in " ".join(lines)


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
    assert not re.search(r"""src\s*=|href\s*=\s*["'](?!#)|https?://|@import|url\(|<script""", html)
    for target in re.findall(r'href="#([^"]+)"', html):
        assert f'id="{target}"' in html
    text = " ".join(outline.text)
    assert "nan" not in text.lower().split() and "inf" not in text.lower().split() and "None" not in text.split()
    assert html.count("<pre") == sum(len(arm.runs) for arm in summary.arms)
    assert "truncated_reverse_kl" in html and "base at its best" in text
    assert "What the search cost" in text


def test_files_beside_the_page(made):
    summary, page = made
    pictures = sorted(path.name for path in page.parent.glob("*.png"))
    stems = [
        "accuracy-vs-generated-tokens", "accuracy-vs-learner-and-teacher-tokens", "accuracy-vs-training-seconds", "differences", "entropy-student",
        "length-mean", "length-truncated", "pass-at-k",
    ]  # fmt: skip
    assert [name.removesuffix(".png") for name in pictures] == stems == sorted(path.stem for path in page.parent.glob("*.svg"))
    assert all(ElementTree.parse(page.parent / f"{stem}.svg").getroot().tag.endswith("svg") for stem in stems)
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
    assert "No arm reached 99.9 % on dev with every seed inside its budget." in " ".join(sentences(summary))


QUESTIONS = ["Which arm did best?", "By how much?", "At what cost?", "How sure is that?"]


class Cells(HTMLParser):
    """Tables by their aria-label: rows of cell texts; small print and everything else of a cell in one text."""

    def __init__(self):
        super().__init__()
        self.tables, self.label, self.within = {}, "", False

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("aria-label", "").startswith("Table: "):
            self.label = attrs["aria-label"].removeprefix("Table: ")
            self.tables[self.label] = []
        elif tag == "tr" and self.label:
            self.tables[self.label].append([])
        elif tag in ("td", "th") and self.label:
            self.tables[self.label][-1].append("")
            self.within = True
        elif tag == "small" and self.within:
            self.tables[self.label][-1][-1] += " | "

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.within = False
        if tag == "table":
            self.label = ""

    def handle_data(self, data):
        if self.within and self.tables[self.label]:
            self.tables[self.label][-1][-1] += " ".join(data.split()) and data.strip()


def cells(page):
    reader = Cells()
    reader.feed(page.read_text())
    return {label: {row[0].split(" | ")[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]} for label, rows in reader.tables.items()}


def test_the_four_questions_have_answers_of_at_most_two_sentences_on_the_page(made):
    summary, page = made
    found = dict(answers(summary))
    assert list(found) == QUESTIONS
    assert all(text.endswith(".") and len(re.findall(r"\.(?= [A-Z]|$)", text)) <= 2 for text in found.values())
    html = page.read_text()
    assert all(text.replace("'", "&#39;").replace("<", "&lt;").replace(">", "&gt;") in html for text in found.values())
    assert html.index("How sure is that?") < html.index('id="curves"')  # before every chart and table


def test_the_answers_say_what_the_tables_say(made):
    """Every number of the four answers stands, as printed, in the cell of the table below it that is about the same arm."""
    summary, page = made
    found, tables = dict(answers(summary)), cells(page)
    best, pair = summary.ranked[0], leading_pair(summary)
    assert (pair.left, pair.right) == (best.name, "grpo")
    accuracy = tables["Accuracy on the test split"][best.label]["avg@4, temperature 1"]
    assert accuracy == f"{percent(best.test().mean)} | {percent_interval(best.test())}"
    assert f"{best.label} has the highest test accuracy at temperature 1: {accuracy.replace(' | ', ' % (95 % interval ')})." in found[QUESTIONS[0]]
    assert max(float(row["avg@4, temperature 1"].split()[0]) for row in tables["Accuracy on the test split"].values()) == float(accuracy.split()[0])
    row = tables["Differences to the baseline"][best.label]
    difference, verdict = row["difference"].replace(" | ", " points of test accuracy (95 % interval "), row["verdict"]
    assert f"{best.label} minus grpo, the baseline: {difference}), {verdict}." in found[QUESTIONS[1]]
    for arm in summary.ranked[1:]:
        if arm.name != "grpo":
            other = tables["Differences to the baseline"][arm.label]
            assert f"{arm.label} {other['difference'].split()[0]} ({other['verdict']})" in found[QUESTIONS[1]]
    whole = tables["What it cost"][best.label]["whole run"].split(" | ")
    said = f"{whole[1].removesuffix(' generated')} generated tokens, {whole[2].removesuffix(' learner and teacher')} learner and teacher tokens"
    assert f"A run of {best.label} spent {said} and {whole[0]} of training: " in found[QUESTIONS[2]]
    to_target = tables["What it cost"][best.label]["generated tokens | to the target"].replace(" | ", " (")
    assert f"To 60.0 % on dev it needed {to_target}) generated tokens" in found[QUESTIONS[2]]
    ratio = best.costs[SCORED] / summary.reference.costs[SCORED]
    assert ratio == pytest.approx(2, rel=0.5) and f"{ratio:.2f}\N{MULTIPLICATION SIGN}" in found[QUESTIONS[2]]
    assert f"(p {row['p (Holm)']}, corrected for {pair.family} differences)" in found[QUESTIONS[3]]
    assert f"A true difference of {row['resolvable difference']} points" in found[QUESTIONS[3]]
    assert f"measured with {pair.interval.seeds} seeds x 128 problems, it speaks about new seeds and new problems" in found[QUESTIONS[3]]


def test_every_number_of_the_tables_of_differences_is_the_summarys(made):
    summary, page = made
    tables = cells(page)
    for arm in summary.arms:
        pair = summary.pair(arm.name, "grpo")
        if pair is None:
            continue
        row = tables["Differences to the baseline"][arm.label]
        assert row["difference"] == f"{points(pair.interval.mean)} | {points_interval(pair.interval.low, pair.interval.high)}"
        assert row["p (Holm)"] == p_text(pair.holm_p) and row["resolvable difference"] == detectable_text(pair.detectable)
        assert row["seeds needed"] == str(pair.seeds_needed or "> 100")
    points_table = tables["Cost of a point"]
    assert set(points_table) == {arm.label for arm in summary.arms if arm.gain}
    assert points_table["opd"]["gain on test, points"].startswith(points(summary.arm("opd").gain.mean))


def test_which_arm_needs_fewest_tokens_is_said_with_its_own_test(made):
    """A lead over the best arm in tokens has an interval of its own: "beyond chance" only where it excludes 1."""
    summary, _ = made
    best = summary.ranked[0]
    other = next(arm for arm in summary.ranked[1:] if arm.reached[TOKENS].typical is not None)
    for low, word in ((0.8, "that may be chance (unresolved)"), (1.1, "beyond chance")):
        ratio = replace(summary.against_best[other.name], value=1.4, low=low, high=2.5, at_least=False, why="")
        quick = replace(other, reached={**other.reached, TOKENS: replace(other.reached[TOKENS], typical=1.0, low=0.5, high=2.0)})
        changed = replace(
            summary,
            arms=tuple(quick if arm.name == other.name else arm for arm in summary.arms),
            against_best={**summary.against_best, other.name: ratio},
        )
        said = dict(answers(changed))["At what cost?"]
        assert f"{other.label} needed fewest, 1 (0 to 2), a lead over {best.label} {word}: 1.4\N{MULTIPLICATION SIGN}" in said
        assert ("unresolved" if low < 1 else "fewer") in cheaper_text(changed)


def test_where_the_baseline_is_best_the_answers_compare_it_with_the_next_arm(made):
    summary, _ = made
    runs = [run for arm in summary.arms for run in arm.runs]
    flipped = summarise(summary.comparison.model_copy(update={"baseline": summary.ranked[0].name}), runs, {})
    found = dict(answers(flipped))
    best, second = flipped.ranked[:2]
    assert f"{best.label} minus {second.label}, the next one: " in found["By how much?"]
    assert "\N{MULTIPLICATION SIGN}" not in found["At what cost?"].split(". ")[0]  # a run is not compared with itself


def test_one_seed_is_said_to_be_one_seed(made):
    comparison = made[0].comparison.model_copy(update={"seeds": [0]})
    runs = [run for arm in made[0].arms for run in arm.runs if run.seed == 0]
    said = dict(answers(summarise(comparison, runs, {})))["How sure is that?"]
    assert "measured with 1 seed x 128 problems, it speaks about new problems, these seeds only, and what another seed gives is not known." in said


def with_recipes(summary, changes) -> Summary:
    """The summary as if the runs of the named arms had other recipes."""
    arms = [replace(arm, runs=tuple(replace(run, recipe={**run.recipe, **changes.get(arm.name, {})}) for run in arm.runs)) for arm in summary.arms]
    return replace(summary, arms=tuple(arms))


def test_every_arm_is_spelled_out_and_a_teacher_from_elsewhere_is_not_counted(made):
    summary, page = made
    assert set(REWARDED) == set(CREDITS)
    assert about(summary.arm("grpo")) == "reinforcement learning from the verifier's rewards"
    assert all(f"<dd>{about(arm)}.</dd>".replace("'", "&#39;") in page.read_text() for arm in summary.arms)
    best, distilled = summary.ranked[0].name, [{"distill": "reverse_kl", "support": "full"}]
    taught = {"signals": {"main": {"weights": {"external": {"path": "models/wise"}}, "view": "plain"}}, "objective": distilled, "method": "opd"}
    changed = with_recipes(summary, {best: taught})
    assert about(changed.arm(best)) == (
        "on-policy distillation from another model (method opd); teacher: another model, models/wise, "
        "which sees the question only, as the student does"
    )
    said = "what it took to train its teacher models/wise (its accuracy was not measured here) is not counted"
    assert said in dict(answers(changed))["At what cost?"]
    measured = with_recipes(summary, {best: taught, "base": {"model": {"path": "models/wise"}}})
    known = percent(summary.arm("base").test().mean)
    assert f"models/wise ({known} % on the same test) is not counted" in dict(answers(measured))["At what cost?"]
    own = {
        "signals": {"main": {"weights": {"ema": {"rate": 0.1}}, "view": {"facts": {}}}},
        "objective": distilled,
        "rollout": {"source": {"dataset": "x"}},
    }
    assert about(with_recipes(summary, {best: own}).arm(best)) == (
        "self-distillation; teacher: a moving average of the student's weights (rate 0.1), which is also shown what the student is not (view facts)"
    )


def test_where_dev_and_test_come_from_is_said(made):
    summary, page = made
    said = splits(summary.arm("grpo").runs[0].recipe)
    assert said.startswith("128 dev and 256 test problems of the embedded task expr, in which the hash of a question decides")
    assert "Dev draws the curves and chooses each run's checkpoint; test is looked at once" in said
    assert said.replace("'", "&#39;") in page.read_text()
    filed = {"data": {"path": "d.jsonl", "eval_path": "e.jsonl", "eval_split": "test"}, "eval": {"num_problems": 3, "final_problems": 4}}
    assert splits(filed) == (
        "3 dev and 4 test problems of e.jsonl (split test): the first ones are dev, the next ones test. Dev draws the curves; "
        "test is looked at once, when a run is over."
    )
    assert "held out of d.jsonl" in splits({**filed, "data": {"path": "d.jsonl"}}) and splits({}) == ""


def test_learning_rates_that_differ_are_said_to_be_searched_alike_or_not(made):
    summary, page = made
    rates = {"grpo": {"optimizer": {"lr": 1e-4}}, "opd": {"optimizer": {"lr": 3e-4}}}
    line = next(note for note in notes(with_recipes(summary, rates)) if note.startswith("Learning rates differ"))
    assert "was chosen on dev from one grid, the same for all (0.0001 and 0.0003)" in line and "opd 0.0003" in line and "grpo 0.0001" in line
    bare = replace(with_recipes(summary, rates), comparison=summary.comparison.model_copy(update={"tune": None}))
    assert any("were not searched here: a difference may be one of rates" in note for note in notes(bare))
    [row] = [row for row in recipe_rows(with_recipes(summary, rates)) if row.key == "optimizer.lr"]
    assert row.searched == "0.0001, 0.0003" and row.cells["opd"] == ("0.0003", True)


def test_recipes_that_nobody_recorded_are_not_called_equal(made, tmp_path):
    comparison = made[0].comparison
    runs = [read_run(tmp_path / "none" / arm / str(seed), arm=arm, seed=seed) for arm in ARMS for seed in comparison.seeds]
    html = write_report(tmp_path, summarise(comparison, runs, {})).read_text()
    assert "No run has recorded a recipe yet." in html and "have the same recipe" not in html
    assert "By groups of problems" in html and "By domain" not in html


def test_no_interval_of_the_page_has_no_width(made):
    """Perfect answers have a bound, not a spread of zero."""
    summary, _ = made
    perfect = [
        replace(
            run,
            finals={
                name: replace(final, by_problem={m: dict.fromkeys(v, 1.0) for m, v in final.by_problem.items()}) for name, final in run.finals.items()
            },
        )
        for arm in summary.arms
        for run in arm.runs
    ]
    found = summarise(summary.comparison, perfect, {})
    test, pair = found.arm("opd").test(), found.pair("opd", "grpo")
    assert percent_interval(test) == "97.2 to 100.0" and test.scope == "new problems, these seeds only"  # 1 - 0.025 ** (1 / 128)
    assert points_interval(pair.interval.low, pair.interval.high) == "\N{MINUS SIGN}2.8 to +2.8" and pair.verdict == "unresolved"
    assert 0.03 < pair.detectable < 0.05


def test_breakdowns_weigh_back_to_the_whole_and_order_by_difficulty(made):
    summary, page = made
    by_domain, by_difficulty = breakdowns(summary)
    assert [group.label for group in by_domain.groups] == ["algebra", "arithmetic", "geometry"]
    assert [group.label for group in by_difficulty.groups] == ["easy", "middle", "hard"]
    for found in (by_domain, by_difficulty):
        sizes = [len(group.problems) for group in found.groups]
        whole = sum(size * group.accuracy["opd"].mean for size, group in zip(sizes, found.groups, strict=True)) / sum(sizes)
        assert sum(sizes) == 128 and whole == pytest.approx(summary.arm("opd").test().mean)
    assert len(list(csv.DictReader((page.parent / "breakdown.csv").open()))) == 6 * len(ARMS)


def test_without_labels_difficulty_is_what_the_base_got_right(made):
    summary, _ = made
    bare = [
        replace(run, finals={name: replace(final, domains={}, difficulties={}) for name, final in run.finals.items()})
        for arm in summary.arms
        for run in arm.runs
    ]
    [found] = breakdowns(summarise(summary.comparison, bare, {}))
    assert [group.label for group in found.groups] == ["never right", "sometimes right", "always right"]
    assert found.groups[0].accuracy["base"].mean == 0 and found.groups[2].accuracy["base"].mean == 1
    assert 0 < found.groups[0].accuracy["opd"].mean < found.groups[2].accuracy["opd"].mean


def test_alarms_and_collapses_are_marked_where_they_happened(made):
    summary, page = made
    live = summary.arm("opsd_live")
    found = marks(live, COSTS["generated tokens"], "s0")
    alarms = [mark for mark in found if "dev_fall" in mark.text]
    assert [mark.x for mark in alarms] == [60_000.0] * 3  # after step 70 the curve holds its last point, that of step 60
    html = page.read_text()
    assert html.count("dev accuracy 0.41, at best 0.79") == 3 and f"<title>{alarms[0].text}</title>" in html


def test_pass_at_k_and_bands_by_hand(made):
    band = passed_band(made[0].arm("opd"), "s1")
    rows = [run.finals[PRIMARY].row["pass_at"] for run in made[0].arm("opd").finished]
    assert band.x == (1.0, 2.0, 4.0) and band.mean[2] == pytest.approx(sum(row["4"] for row in rows) / 3)
    assert band.low[0] == min(row["1"] for row in rows)
    crossed = over_seeds([[(0, 0.0), (10, 1.0)], [(2, 0.5), (8, 0.5)]], "x", "s0", points=3)
    assert crossed.x == (2.0, 5.0, 8.0) and crossed.mean == pytest.approx((0.35, 0.5, 0.65)) and crossed.low == pytest.approx((0.2, 0.5, 0.5))
    assert over_seeds([[(0, 0.5)]], "x", "s0") is None


def test_recipe_differences_mark_what_is_not_the_baselines(made):
    rows = {row.key: row.cells for row in recipe_rows(made[0])}
    assert rows["objective.0.distill"]["opsd_ema"] == ("reverse_kl", True) and rows["objective.0.distill"]["opd"] == ("\N{EN DASH}", False)
    assert "seed" not in rows and "base" not in rows["objective.0.distill"]
    assert dict(flattened({"a": [{"b": 1}, {"b": 2}], "c": [1, 2], "d": {}})) == {"a.0.b": 1, "a.1.b": 2, "c": [1, 2], "d": {}}


def test_the_latex_table_has_a_row_an_arm_and_escapes(made):
    lines = latex_table(made[0]).splitlines()
    assert lines[1] == r"\begin{tabular}{lrrrrlr}" and lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    rows = lines[5:-2]
    assert len(rows) == len(ARMS) and all(row.count("&") - row.count(r"\&") == 6 and row.endswith(r" \\") for row in rows)
    assert rows[4].startswith(r"opsd\_ema & ") and r"\textgreater{} budget" in latex_table(made[0])
    assert escaped("50 % & a_b {x} \\") == r"50 \% \& a\_b \{x\} \textbackslash{}"


def test_csv_files_hold_every_pair_and_every_point(made):
    summary, page = made
    pairs = list(csv.DictReader((page.parent / "pairs.csv").open()))
    assert len(pairs) == len(summary.pairs)
    row = next(row for row in pairs if (row["left"], row["right"], row["decoding"]) == ("opd", "grpo", PRIMARY))
    assert float(row["difference"]) == pytest.approx(summary.pair("opd", "grpo").interval.mean, rel=1e-5) and row["verdict"] == "better"
    points_of = list(csv.DictReader((page.parent / "curves.csv").open()))
    assert len(points_of) == sum(len(run.curve) for arm in summary.arms for run in arm.runs)


class Landmarks(HTMLParser):
    """What a screen reader goes by: tags with their attributes, in order."""

    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_can_be_read_by_ear_and_used_by_keyboard(made):
    reader = Landmarks()
    reader.feed(made[1].read_text())
    tags = [tag for tag, _ in reader.tags]
    assert [tags.count(tag) for tag in ("main", "nav", "footer", "h1")] == [1, 1, 1, 1]
    ids = {attrs["id"] for _, attrs in reader.tags if "id" in attrs}
    for tag, attrs in reader.tags:
        if tag == "section":
            assert attrs["aria-labelledby"] in ids
        if tag == "th":
            assert attrs.get("scope") in ("row", "col")
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or (attrs["role"] == "img" and len(attrs["aria-label"]) > 40)
        if "scroll" in attrs.get("class", "").split():
            assert attrs["tabindex"] == "0" and attrs["role"] == "region" and attrs["aria-label"]
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
