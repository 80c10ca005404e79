import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import fake_runs
import pytest
from rich.console import Console

from opd.comparison.answers import sentences
from opd.comparison.arms import flattened, recipe_rows
from opd.comparison.breakdown import breakdowns
from opd.comparison.costs import COSTS, TOKENS
from opd.comparison.curves import Band, drawn_arms, marks, over_seeds, passed_band
from opd.comparison.exports import escaped, latex_table
from opd.comparison.figures import _axes, _curves
from opd.comparison.report import charts, write_report
from opd.comparison.results import GREEDY, PRIMARY, read_run
from opd.comparison.summary import summarise
from opd.comparison.table import rich_table
from opd.comparison.wording import (
    amount,
    duration,
    points,
    ratio_text,
    reach_text,
    seeds_text,
)

ARMS = fake_runs.ARMS


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
    assert lines[0].startswith(f"{best.label} {100 * best.test().mean:.1f} % (")
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
    assert rows["base"]["best_decoding"] == "greedy" and rows["opd"]["best_decoding"] == rows["opd"]["avg_at_k_best_decoding"] == ""
    assert float(rows["base"]["avg_at_k_best_decoding"]) == pytest.approx(summary.base_at_best[1].mean, abs=1e-4)
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
    assert "No arm reached 99.9 % on dev with every seed inside its budget" in " ".join(sentences(summary))


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


def test_the_groups_are_made_by_the_base_alone(made):
    """A second untrained arm that is always right (an examined teacher) leaves the base's groups as they were."""
    summary = made[0]
    arms = {"base": summary.comparison.arms["base"], "wise": summary.comparison.arms["base"].model_copy(update={"label": "wise"})}
    bare = [replace(run, finals={n: replace(f, domains={}, difficulties={}) for n, f in run.finals.items()}) for run in summary.arm("base").runs]
    right = {n: replace(f, by_problem={m: dict.fromkeys(v, 1.0) for m, v in f.by_problem.items()}) for n, f in bare[0].finals.items()}
    comparison = summary.comparison.model_copy(update={"arms": {**arms, "grpo": summary.comparison.arms["grpo"]}})
    [found] = breakdowns(summarise(comparison, [*bare, replace(bare[0], arm="wise", finals=right)], {}))
    shares = bare[0].finals[PRIMARY].by_problem["avg@k"]
    truth = {"never right": 0.0, "always right": 1.0}
    for group in found.groups:
        own = {problem for problem, share in shares.items() if truth.get(group.label, share) == share and (group.label in truth or 0 < share < 1)}
        assert set(group.problems) == own and own
    assert [group.label for group in found.groups] == ["never right", "sometimes right", "always right"] and "No problem was" not in found.note
    wise = {n: replace(f, by_problem={m: {p: max(s, 0.5) for p, s in v.items()} for m, v in f.by_problem.items()}) for n, f in bare[0].finals.items()}
    [found] = breakdowns(summarise(comparison, [replace(bare[0], finals=wise)], {}))
    assert [group.label for group in found.groups] == ["sometimes right", "always right"] and found.note.endswith("No problem was never right.")


def test_seeds_needed_are_said_only_where_seeds_vary(made, tmp_path):
    """Two untrained arms: no seeds vary. A difference of exactly 0: a dash. One that is not resolvable: > 100."""
    summary = made[0]
    untrained = summary.comparison.arms["base"]
    arms = {"base": untrained, "wise": untrained.model_copy(update={"label": "wise"}), "grpo": summary.comparison.arms["grpo"]}
    arms["twin"] = arms["grpo"].model_copy(update={"label": "twin"})
    of = {"base": "base", "wise": "base", "grpo": "grpo", "twin": "grpo"}
    runs = [replace(run, arm=name) for name, source in of.items() for run in summary.arm(source).runs]
    found = summarise(summary.comparison.model_copy(update={"arms": arms}), runs, {})
    html = write_report(tmp_path, found).read_text()
    row = re.search(r"twin</th>(.*?)</tr>", html[html.index("Table: Differences to the baseline") :], re.DOTALL)[1]
    assert row.rstrip().endswith("<td>–</td>") and found.pair("twin", "grpo").interval.mean == 0
    between = re.search(r"base − wise</th>(.*?)</tr>", html, re.DOTALL)[1]
    assert between.rstrip().endswith("<td>no seeds vary</td>")
    assert re.search(r"base − grpo</th>(.*?)</tr>", html, re.DOTALL)[1].rstrip().endswith(f"<td>{found.pair('base', 'grpo').seeds_needed}</td>")
    unclear = replace(found.pair("base", "grpo").interval, mean=0.001)
    assert (seeds_text(unclear, None), seeds_text(unclear, 7), seeds_text(replace(unclear, seeds=1), None)) == ("> 100", "7", "–")


def test_time_axes_count_in_the_unit_of_their_label(made):
    """A run of 252 seconds: ticks at 0, 1, 2 ... minutes, not at 1.7 min."""
    runs = [replace(run, curve=tuple(replace(p, seconds=10 * p.seconds) for p in run.curve)) for arm in made[0].arms for run in arm.runs]
    found = summarise(made[0].comparison, runs, {})
    styles = {arm.name: "s0" for arm in found.arms}
    [(_, drawn)] = [chart for chart in charts(found, styles) if chart[0] == "Accuracy against training time"]
    ticks = re.findall(r'y="272" text-anchor="middle">([^<]+)<', drawn)
    assert ticks == ["0", "1", "2", "3", "4"] and ">training time, min<" in drawn


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
    assert len(rows) == len(ARMS) + 1 and all(row.count("&") - row.count(r"\&") == 6 and row.endswith(r" \\") for row in rows)
    at_best = made[0].base_at_best[1]
    assert rows[1].startswith(f"base at its best, greedy & {100 * at_best.mean:.1f} (") and rows[1].endswith(r") &  &  &  &  &  \\")
    assert rows[5].startswith(r"opsd\_ema & ") and r"\textgreater{} budget" in latex_table(made[0])
    assert escaped("50 % & a_b {x} \\") == r"50 \% \& a\_b \{x\} \textbackslash{}"


def test_csv_files_hold_every_pair_and_every_point(made):
    summary, page = made
    pairs = list(csv.DictReader((page.parent / "pairs.csv").open()))
    assert len(pairs) == len(summary.pairs)
    row = next(row for row in pairs if (row["left"], row["right"], row["decoding"]) == ("opd", "grpo", PRIMARY))
    assert float(row["difference"]) == pytest.approx(summary.pair("opd", "grpo").interval.mean, rel=1e-5) and row["verdict"] == "better"
    points_of = list(csv.DictReader((page.parent / "curves.csv").open()))
    assert len(points_of) == sum(len(run.curve) for arm in summary.arms for run in arm.runs)
    of_runs = list(csv.DictReader((page.parent / "runs.csv").open()))
    assert [(row["arm"], int(row["seed"])) for row in of_runs] == [(arm.name, run.seed) for arm in summary.arms for run in arm.runs]
    run = next(run for arm in summary.arms if arm.name == "grpo" for run in arm.runs)
    row = next(row for row in of_runs if (row["arm"], int(row["seed"])) == ("grpo", run.seed))
    assert float(row["test_temperature_1"]) == pytest.approx(run.finals[PRIMARY].row["avg@k"], rel=1e-5)
    assert float(row["dev_last"]) == pytest.approx(run.curve[-1].accuracy, rel=1e-5)
    assert float(row["dev_best"]) == pytest.approx(max(point.accuracy for point in run.curve), rel=1e-5)


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


def test_only_the_base_has_a_row_at_its_best_decoding(made, tmp_path):
    """A second untrained arm, such as a teacher that is examined, is not given the base's."""
    comparison = made[0].comparison
    arms = {"base": comparison.arms["base"], "wise": comparison.arms["base"].model_copy(update={"label": "wise"}), "opd": comparison.arms["opd"]}
    runs = [replace(run, arm=name) for name, of in (("base", "base"), ("wise", "base"), ("opd", "opd")) for run in made[0].arm(of).runs]
    summary = summarise(comparison.model_copy(update={"arms": arms, "baseline": "opd"}), runs, {})
    assert write_report(tmp_path, summary).read_text().count(" at its best<small>") == 1
    assert [cell for cell in rich_table(summary).columns[0]._cells if "greedy" in cell] == ["base at its best, greedy"]


def test_the_terminals_table_fits_80_columns_and_cuts_no_word(made):
    summary = replace(made[0], base_at_best=("temperature 0.2", made[0].base_at_best[1]))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(rich_table(summary))
    printed = console.export_text()
    assert max(map(len, printed.splitlines())) <= 80 and "\N{HORIZONTAL ELLIPSIS}" not in printed
    assert "> budget" in printed and "T=0.2" in printed and "greedy" in printed


def test_of_many_arms_the_baseline_and_the_most_accurate_are_drawn(made, tmp_path, monkeypatch):
    summary = made[0]
    trained = [arm.name for arm in summary.arms if arm.trained]
    assert [arm.name for arm in drawn_arms(summary)] == trained and "Drawn are" not in write_report(tmp_path, summary).read_text()
    monkeypatch.setattr("opd.comparison.curves.MOST_CURVES", 3)
    assert [arm.name for arm in drawn_arms(summary)] == ["grpo", "opd", "opsd_ema"], "the baseline is fourth of six"
    page = write_report(tmp_path, summary).read_text()
    assert f"Drawn are the baseline and the most accurate on test; curves.csv has the other {len(trained) - 3} too." in page
    legends = re.findall(r'<ul class="legend">(.*?)</ul>', page, flags=re.DOTALL)
    assert legends and all(text.count('class="key s') == 3 for text in legends)
    with (tmp_path / "curves.csv").open() as file:
        assert set(trained) <= {row["arm"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("label", ["GRPO", "GRPO + OPSD on wrong answers"])
def test_a_pictures_legend_lies_within_it(label):
    bands = [(n, Band(label=f"{label} {n}", style="", x=(0.0, 1.0), mean=(0.0, 1.0), low=(0.0, 0.5), high=(0.5, 1.0))) for n in range(7)]
    figure, axes = _axes("tokens", "accuracy")
    _curves(axes, bands, scale=100)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
