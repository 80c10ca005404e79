"""The report's sentences, and that they say what its tables say."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import fake_runs
import pytest

from opd.comparison.about import REWARDED, about, splits, task
from opd.comparison.answers import answers, cheaper_text, leading_pair, notes
from opd.comparison.arms import recipe_rows
from opd.comparison.costs import SCORED, SECONDS, TOKENS
from opd.comparison.report import write_report
from opd.comparison.results import PRIMARY, read_run
from opd.comparison.summary import Summary, summarise
from opd.comparison.wording import detectable_text, p_text, percent, percent_interval, points, points_interval, shortened
from opd.credit import CREDITS

ARMS = fake_runs.ARMS
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
    assert f"{best.label} {accuracy.replace(' | ', ' % (')})" in found[QUESTIONS[0]]
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
    assert f"measured with {pair.interval.seeds} seeds × 128 problems, it speaks about new seeds and new problems" in found[QUESTIONS[3]]


def test_arms_that_no_resolved_difference_separates_are_called_tied(made):
    """Verdicts by hand: the tie leads, then whom all of it beats; once its second arm is resolved to be worse, there is one winner."""
    summary, _ = made
    order = [arm.name for arm in summary.ranked]

    def said(better, third=0.0):
        """The first answer where exactly the pairs (place in the ranking, place) of `better` are resolved; `third`: how far below the first."""
        tests = dict(summary.ranked[2].tests)
        if third:
            tests[PRIMARY, "avg@k"] = replace(tests[PRIMARY, "avg@k"], mean=summary.ranked[0].test().mean - third)
        arms = tuple(replace(arm, tests=tests) if arm.name == order[2] else arm for arm in summary.arms)
        won = {(order[i], order[j]) for i, j in better}
        pairs = [
            replace(p, verdict="better" if (p.left, p.right) in won else "worse" if (p.right, p.left) in won else "unresolved") for p in summary.pairs
        ]
        return dict(answers(replace(summary, pairs=tuple(pairs), arms=arms)))[QUESTIONS[0]]

    labels, last = [arm.label for arm in summary.ranked], len(order) - 1
    rest = [(i, j) for i in (0, 1) for j in range(2, last + 1)]
    tie = said(rest)
    assert re.fullmatch(
        rf"{labels[0]} [\d.]+ % \(.*?\) and {labels[1]} [\d.]+ % \(.*?\) are tied for the highest test accuracy at temperature 1 "
        rf"\(95 % intervals\): the difference between them is unresolved\. Both are better than {labels[2]} .*{labels[last]} \([\d.]+ %\)\.",
        tie,
    )
    assert "has the highest" not in tie
    partly = said([pair for pair in rest if pair != (1, last)])
    assert f"; only {labels[0]} is resolved to be better than {labels[last]} (" in partly
    won = said([*rest, (0, 1)])
    assert won.startswith(f"{labels[0]} has the highest test accuracy at temperature 1: ") and "tied" not in won
    unclear = [(i, j) for i in (0, 1) for j in range(3, last + 1)]
    assert f" {labels[2]} " not in said(unclear).split(" are tied")[0] and f"none of them is resolved to be better than {labels[2]} (" in said(
        unclear
    )
    assert "no difference between them is resolved." in said([*unclear, *((2, j) for j in range(3, last + 1))], third=0.03)
    assert said([(0, j) for j in range(3, last + 1)] + [(1, 2)], third=0.03).startswith(f"{labels[0]} has the highest")  # 0 ~ 1, 0 ~ 2, but 1 > 2


def test_where_equal_cost_resolves_nothing_the_answer_says_so(made):
    summary, _ = made

    def said(verdict):
        arms = [
            replace(
                arm, matched={cost: replace(m, verdict=m.verdict and (verdict if cost == SECONDS else "better")) for cost, m in arm.matched.items()}
            )
            for arm in summary.arms
        ]
        return dict(answers(replace(summary, arms=tuple(arms))))[QUESTIONS[2]]

    assert "; at equal training seconds (" in said("unresolved") and said("unresolved").endswith(") no difference to grpo on dev is resolved.")
    assert "at equal" not in said("better")


def test_equal_cost_has_its_p_and_the_task_is_described(made):
    summary, page = made
    html = page.read_text()
    for arm in summary.arms:
        for matched in arm.matched.values():
            assert (matched.holm_p is None) == (matched.difference is None)
            assert matched.holm_p is None or (matched.holm_p > 0.05) <= (matched.verdict == "unresolved")
    assert "p (Holm)" in html[html.index("Table: Accuracy at equal cost") :].split("</thead>")[0]
    said = task(summary.arm("grpo").runs[0].recipe)
    assert said.startswith("The task, expr: Evaluate a nested expression modulo 7") and "What is checked: right answer, and every step" in said
    assert said.replace("'", "&#39;") in html
    assert task({"data": {"path": "d.jsonl", "verifier": {"fn": {}}}}) == "The task: questions of d.jsonl, answers judged by verifier fn."
    assert task({"data": {"task": "no such task"}}) == "" == task({})


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
        assert row["seeds needed"] == str(pair.seeds_needed or "> 100") and pair.interval.mean
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
        assert f"{other.label} needed fewest, 1 (0 to 2), a lead over {best.label} {word}: {best.label} needed 1.4\N{MULTIPLICATION SIGN} (" in said
        assert ("unresolved" if low < 1 else "fewer") in cheaper_text(changed)


def test_a_best_arm_that_generates_nothing_says_so(made):
    """Its cost has no ratio to the others': each is said by itself."""
    summary, _ = made
    best, others = summary.ranked[0], [arm for arm in summary.ranked[1:] if arm.reached[TOKENS].typical is not None]
    nothing = replace(best.reached[TOKENS], by_seed=tuple(0.0 for _ in best.reached[TOKENS].by_seed), typical=None, low=None, high=None)
    ratio = replace(best.ratio[TOKENS], value=None, why="no ratio: nothing of this kind was spent")
    sft = replace(best, reached={**best.reached, TOKENS: nothing}, ratio={**best.ratio, TOKENS: ratio})
    changed = replace(summary, arms=tuple(sft if arm.name == best.name else arm for arm in summary.arms), against_best={})
    said = dict(answers(changed))["At what cost?"]
    assert "on dev it generated nothing; " in said and "no ratio" not in said and "spent none" not in said
    quickest = min(others, key=lambda arm: arm.reached[TOKENS].typical)
    if quickest.name == summary.reference.name:
        assert f"{summary.reference.label} needed " in said
    else:
        assert f"{quickest.label} needed fewest of those that generate, " in said


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
    assert "measured with 1 seed × 128 problems, it speaks about new problems, these seeds only, and what another seed gives is not known." in said


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
        "self-distillation; teacher: a moving average of the student's weights (rate 0.1), which is also shown what the student is not "
        "(view facts: facts that the answer needs, without the way to it)"
    )
    theirs = replace(
        summary.arm("grpo"), runs=tuple(replace(run, facts={**run.facts, "trainer": "TRL's GRPOTrainer"}) for run in summary.arm("grpo").runs)
    )
    assert about(theirs) == "reinforcement learning from the verifier's rewards, trained by TRL's GRPOTrainer"


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


def test_sentences_name_ten_arms_at_most(made, monkeypatch):
    assert shortened(["a", "b", "c"]) == "a, b and c"
    assert shortened([str(n) for n in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8 and 9"
    assert shortened([str(n) for n in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8 and 3 more"
    summary, _ = made
    whole = dict(answers(summary))[QUESTIONS[1]]
    others = len(summary.ranked) - 2
    assert "more (see the differences)" not in whole and others > 1
    monkeypatch.setattr("opd.comparison.answers.MANY", 1)
    short = dict(answers(summary))[QUESTIONS[1]]
    assert short.endswith(f" and {others - 1} more (see the differences).") and whole.startswith(short.partition(" and ")[0])
