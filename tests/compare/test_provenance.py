"""Code, data and company of the runs: what the page warns of, and what a new recipe key does to runs that exist."""

import json
from dataclasses import replace

import fake_runs
import pytest

from opd.comparison.config import load_comparison
from opd.comparison.jobs import reported_jobs
from opd.comparison.provenance import at_a_time, versions, warnings
from opd.comparison.report import setup, write_report
from opd.comparison.results import read_run


def with_facts(summary, change):
    """The summary with the runs that `change(run)` returns; the one that never ran stays as it is."""
    runs = {arm.name: tuple(change(run) if run.facts else run for run in arm.runs) for arm in summary.arms}
    return replace(summary, arms=tuple(replace(arm, runs=runs[arm.name], tuned=None) for arm in summary.arms))


def on(run, *, recipe=None, ended="", **facts):
    return replace(run, facts={**run.facts, **facts}, recipe=recipe or run.recipe, ended=ended or run.ended)


def test_runs_on_several_versions_of_the_code_are_named_in_a_box_and_in_the_set_up(made, tmp_path):
    """opd of seed 1 ran on changed source files of the same commit, grpo of seed 2 on another commit: seeds 1 and 2 are mixed, 0 is not."""

    def change(run):
        if (run.arm, run.seed) == ("opd", 1):
            return on(run, code_hash="b" * 16)
        return on(run, code_hash="c" * 16, git_commit="1" * 40) if (run.arm, run.seed) == ("grpo", 2) else on(run, code_hash="a" * 16)

    changed = with_facts(made[0], change)
    assert [len(version.runs) for version in versions(run for arm in changed.arms for run in arm.runs)] == [16, 1, 1]  # one of 19 never ran
    [box] = warnings(changed)
    assert box.heading == "Runs of 3 versions of the code"
    assert "commit 000000000000, source files bbbbbbbbbbbb: opd (seed 1)." in box.lines
    assert "commit 111111111111, source files cccccccccccc: grpo (seed 2)." in box.lines
    assert box.lines[-1].startswith("Differences are paired by seed, and in seeds 1 and 2 trained arms ran on different code, which")
    assert dict(setup(changed))["Commits"] == "000000000000, 111111111111"
    html = write_report(tmp_path, changed).read_text()
    assert html.index('<dl class="answers">') < html.index(box.heading) < html.index('id="arms"')
    assert all(line in html for line in box.lines)


def test_one_version_of_the_code_and_of_the_data_gives_no_box(made):
    same = with_facts(made[0], lambda run: on(run, code_hash="a" * 16, data_hash="d" * 16))
    assert warnings(made[0]) == [] and warnings(same) == []
    assert dict(setup(same))["Commit"] == "0" * 12 and dict(setup(same))["Data"] == "hash dddddddddddd, the same for every run"
    moved = with_facts(made[0], lambda run: on(run, code_hash="a" * 16, git_commit=str(run.seed) * 40))  # commits that touched no source file
    assert warnings(moved) == []


def test_versions_by_seed_are_said_to_leave_the_pairs_alone(made):
    [box] = warnings(with_facts(made[0], lambda run: on(run, code_hash=str(run.seed) * 16)))
    assert box.lines[-1] == "Differences are paired by seed, and within every seed all trained arms ran on the same code."


def test_other_data_are_warned_of_and_a_new_key_at_its_default_is_not(made):
    def older(run):
        data = {key: value for key, value in run.recipe["data"].items() if key not in ("stream", "buffer")}
        return on(run, recipe={**run.recipe, "data": data}, data_hash="d" * 16)

    grown = with_facts(made[0], lambda run: on(run, data_hash="e" * 16) if run.arm == "base" else older(run))
    assert warnings(grown) == []
    said = dict(setup(grown))["Data"]
    assert "hash eeeeeeeeeeee: base" in said and "The same data: older code knew no data.buffer and data.stream" in said

    def limited(run):
        return on(run, recipe={**run.recipe, "data": {**run.recipe["data"], "limit": 7}}, data_hash="e" * 16)

    [box] = warnings(with_facts(made[0], lambda run: limited(run) if run.arm == "opd" else older(run)))
    assert box.heading == "Runs on different data"
    assert "data_hash eeeeeeeeeeee: opd (seeds 0, 1 and 2)." in box.lines
    assert any(line.startswith("data.limit: 0 in base; ") and line.endswith("; 7 in opd (seeds 0, 1 and 2).") for line in box.lines)
    [box] = warnings(with_facts(made[0], lambda run: on(run, data_hash=("d" if run.arm == "opd" else "e") * 16)))
    assert box.lines[-1] == "Recipes ask for the same data, so the content of its files changed between these runs."


@pytest.mark.parametrize(("ends", "most"), [((10, 20, 30), 1), ((11, 21, 30), 2), ((25, 29, 30), 3)])
def test_how_many_runs_went_on_at_a_time(made, ends, most):
    """Three runs that start at minutes 0, 10 and 20; an end at a start does not overlap."""
    runs = [
        on(run, created=f"2030-01-01T00:{start:02d}:00Z", ended=f"2030-01-01T00:{end:02d}:00Z")
        for run, start, end in zip(made[0].arm("opd").runs, (0, 10, 20), ends, strict=True)
    ]
    assert at_a_time(runs) == most and at_a_time(made[0].arm("grpo").runs) == 0
    changed = with_facts(made[0], lambda run: next((own for own in runs if (own.arm, own.seed) == (run.arm, run.seed)), run))
    assert [box.heading for box in warnings(changed)] == (["Runs overlapped"] if most > changed.comparison.workers else [])
    assert dict(setup(changed))["Wall clock"].startswith(
        f"seconds were measured with {f'up to {most}' if most > 1 else 'one'} of these runs at a time"
    )


def test_a_key_that_runs_did_not_know_does_not_make_them_run_again(tmp_path):
    """A finished run whose record lacks a key is found where that key stands at its default; with another value it is another run."""
    path = fake_runs.comparison_yaml(tmp_path / "in", ["grpo"], seeds=(0,), tokens=3_000, tune=False)
    [job] = reported_jobs(load_comparison(str(path)), tmp_path, {})
    fake_runs.fake_train(job.recipe, job.overrides, job.folder)
    old = job.folder.with_name("seed-0-0ddba11f")  # the hash that a version with fewer keys gave
    job.folder.rename(old)
    resolved = json.loads((old / "resolved.json").read_text())
    del resolved["recipe"]["data"]["buffer"], resolved["recipe"]["profile"]
    resolved["recipe"]["learner"]["token_budget"] = 4321  # the default that it had: nothing is learned from it
    (old / "resolved.json").write_text(json.dumps(resolved))
    [again] = reported_jobs(load_comparison(str(path)), tmp_path, {})
    assert again.folder == old and read_run(again.folder).finished
    changed = load_comparison(str(path), {"arms": {"grpo": {"set": {"paper": "grpo", "group": 4}}}})
    assert [one.folder.exists() for one in reported_jobs(changed, tmp_path, {})] == [False]
    asked = load_comparison(str(path), {"arms": {"grpo": {"set": {"paper": "grpo", "learner.token_budget": 5000}}}})  # asked for: seconds may differ
    assert [one.folder.exists() for one in reported_jobs(asked, tmp_path, {})] == [False]
    resolved["recipe"]["optimizer"]["lr"] = 0.5  # a value that the record holds is never replaced by today's default
    (old / "resolved.json").write_text(json.dumps(resolved))
    assert [one.folder for one in reported_jobs(load_comparison(str(path)), tmp_path, {})] == [job.folder]
