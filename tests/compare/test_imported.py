"""Runs made elsewhere: a real TRL log, W&B's real offline file, exports; what a user may type wrong; a comparison over imported runs."""

import csv
import json
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import wandb

from opd.cli import main
from opd.comparison.config import load_comparison, parse_comparison
from opd.comparison.difference import diff_runs
from opd.comparison.imported import dev_accuracies, import_run, merged, with_counters
from opd.comparison.results import PRIMARY, read_run
from opd.comparison.runner import compare
from opd.comparison.workers import Functions
from opd.run.offline import read_offline


@pytest.fixture
def state(request):
    """trainer_state.json of a GRPO run by TRL 1.16: 6 steps of 8 answers, logged every 2, evaluated every 3."""
    return request.config.rootpath / "tests/data/trl_trainer_state.json"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers(path, rights, k=2):
    """A generations file: problem n has rights[n] right answers of k."""
    lines = [{"problem": f"p{n}", "correct": sample < right, "domain": "ab"[n % 2]} for n, right in enumerate(rights) for sample in range(k)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_real_trl_log_becomes_a_run_by_hand(state, place):
    folder = import_run("trl", str(state), {"name": "t", "seed": 3, "completions": 8, "generations": answers(place / "g.jsonl", [0, 1, 2, 2])})
    run = read_run(folder)
    assert run.finished and run.seed == 3
    # generated: 8 answers a step, mean lengths 10, 8, 10 over two steps each; step 3 lies midway between 2 and 4
    assert run.costs["tokens/student"] == 8 * 2 * (10 + 8 + 10) and run.costs["tokens/learner"] == 960
    assert run.costs["seconds/total"] == pytest.approx(2 * (0.37973113599764474 + 0.25738041149998026 + 0.3214266075010528))
    assert [(p.step, p.accuracy, p.generated_tokens, p.scored_tokens) for p in run.curve] == [(3, 0.71875, 224.0, 480.0), (6, 0.6875, 448.0, 960.0)]
    assert run.finals[PRIMARY].row["avg@k"] == 5 / 8 and run.finals[PRIMARY].by_problem["avg@k"] == {"p0": 0.0, "p1": 0.5, "p2": 1.0, "p3": 1.0}
    assert run.finals[PRIMARY].domains["p1"] == "b" and [value for _, _, value in run.vitals["entropy/student"]][0] == pytest.approx(0.193435475)


def log_to_wandb(folder, rows, **options):
    run = wandb.init(project="p", dir=str(folder), mode="offline", settings=wandb.Settings(silent=True, console="off"), **options)
    for step, row in rows:
        run.log(row, step=step)
    run.finish()
    wandb.teardown()  # its service has then written everything
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    return path


def test_the_same_run_through_wandbs_offline_file(state, place):
    history = json.loads(state.read_text())["log_history"]
    rows = []
    for row in history:  # as the integration of transformers names them
        numbers = {key: value for key, value in row.items() if key not in ("step", "train_runtime")}
        named = {f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}": value for key, value in numbers.items()}
        rows.append((row["step"], {**named, "train/global_step": row["step"]}))
    file = log_to_wandb(place, rows, config={"learning_rate": 1e-4})
    one = read_run(import_run("wandb", str(file), {"name": "w", "completions": 8}))
    other = read_run(import_run("trl", str(state), {"name": "t", "completions": 8}))
    assert one.curve == other.curve and one.costs == other.costs and one.vitals == other.vitals
    assert one.recipe["settings"]["learning_rate"] == 1e-4
    found = diff_runs(place / "runs/w", place / "runs/t")
    assert {(run.name, key) for run, key in found.unrecorded} >= {("t", "settings"), ("t", "packages"), ("w", "code_hash")}


def test_csv_and_json_exports_of_our_own_names(place):
    rows = [{"_step": n, "loss/total": 1.0 / n, "tokens/student": 10.0 * n, "tokens/learner": 30.0 * n, "seconds/total": 2.0 * n} for n in (1, 2, 3)]
    rows[1]["eval/dev"] = 0.25
    (place / "h.json").write_text(json.dumps(rows))
    (place / "h.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (place / "h.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["_step", "loss/total", "tokens/student", "tokens/learner", "seconds/total", "eval/dev"])
        writer.writeheader()
        writer.writerows(rows)
    runs = [read_run(import_run("wandb", str(place / f"h.{end}"), {"name": end})) for end in ("json", "jsonl", "csv")]
    assert all(run.curve == runs[0].curve and run.costs == runs[0].costs for run in runs)
    assert [(p.step, p.accuracy, p.generated_tokens, p.scored_tokens, p.seconds) for p in runs[0].curve] == [(2, 0.25, 20.0, 60.0, 4.0)]


def test_a_chart_of_one_run_and_of_two(place):
    (place / "one.csv").write_text('"Step","a - eval/dev","a - eval/dev__MIN","a - eval/dev__MAX"\n1,0.5,0.5,0.5\n')
    with pytest.raises(ValueError, match="no training time is logged"):
        import_run("wandb", "one.csv", {"name": "x"})
    (place / "two.csv").write_text('"Step","a - eval/dev","b - eval/dev"\n1,0.5,0.6\n')
    with pytest.raises(ValueError, match=r"holds 2 runs \(a, b\): export one run a file"):
        import_run("wandb", "two.csv", {"name": "x"})


def test_time_is_taken_from_what_there_is():
    def seconds(rows, **given):
        options = type("O", (), {"completions": 0, "seconds": 0.0, **given})
        return [row["seconds/total"] for row in with_counters(merged(rows, {}), options)]

    assert seconds([{"step": 2, "loss": 1.0}, {"step": 4, "loss": 1.0}, {"step": 4, "train_runtime": 8.0}]) == [4.0, 8.0]
    assert seconds([{"_step": 1, "loss": 1.0, "_runtime": 3.0}, {"_step": 2, "loss": 1.0, "_runtime": 7.0}]) == [3.0, 7.0]
    assert seconds([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}], seconds=10.0) == [5.0, 10.0]
    assert merged([{"step": 1, "my/len": 4.0}], {"my/len": "length/mean"}) == {1: {"step": 1.0, "length/mean": 4.0}}
    with pytest.raises(ValueError, match="eval_reward is no accuracy"):
        dev_accuracies({1: {"eval_reward": 1.7}}, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trl"], "opd import takes a kind and a source"),
        (["tlr", "x", "name=n"], "knows trl and wandb, not 'tlr' (did you mean 'trl'?)"),
        (["trl", "none", "name=n"], "has no trainer_state.json: give the output_dir"),
        (["trl", "STATE"], "needs name=..."),
        (["trl", "STATE", "name=../n"], "needs name=..."),
        (["trl", "STATE", "name=n"], "give completions=N"),
        (["trl", "STATE", "name=n", "completion=8"], "unknown option 'completion' (did you mean 'completions'?)"),
        (["trl", "STATE", "name=n", "completions=eight"], "completions must be a number"),
        (["trl", "STATE", "name=n", "completions=8", "accuracy=eval_rewrd"], "no such metric (did you mean 'eval_reward'?)"),
        (["trl", "STATE", "name=n", "completions=8", "generations=no.jsonl"], "no.jsonl does not exist"),
        (["trl", "STATE", "name=n", "completions=8", "generations=bad.jsonl"], "line 1: every answer needs problem"),
        (["trl", "STATE", "name=n", "completions=8", "generations=uneven.jsonl"], "problems have 1 to 2 answers"),
        (["trl", "STATE", "name=there", "completions=8"], "runs/there exists: give another name"),
        (["wandb", "no.csv", "name=n"], "no.csv does not exist"),
        (["wandb", "h.parquet", "name=n"], "W&B exports are .csv, .json, .jsonl or .wandb files"),
        (["wandb", "bad.wandb", "name=n"], "is no file of W&B"),
        (["wandb", "torn.json", "name=n"], "torn.json is not valid JSON"),
        (["wandb", "nostep.json", "name=n"], "a row has no step"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(state, place, words, said, capfd):
    uneven = "".join(json.dumps({"problem": n, "correct": True}) + "\n" for n in (1, 2, 2))
    for name, text in {
        "bad.jsonl": '{"problem": 1}\n', "uneven.jsonl": uneven,
        "h.parquet": "", "bad.wandb": "PK12345678", "torn.json": "[{", "nostep.json": '[{"loss": 1}]',
    }.items():  # fmt: skip
        (place / name).write_text(text)
    (place / "runs/there").mkdir(parents=True)
    assert main(["import", *(str(state) if word == "STATE" else word for word in words)]) == 2
    error = capfd.readouterr().err
    assert said in error and error.count("\n") == 1 and not (place / "runs/n").exists()


def test_a_run_that_stopped_early_is_not_finished(state, place):
    content = {**json.loads(state.read_text()), "max_steps": 9}
    (place / "trainer_state.json").write_text(json.dumps(content))
    run = read_run(import_run("trl", ".", {"name": "t", "completions": 8}))
    assert (run.state, run.why) == ("preempted", "stopped at step 6 of 9")


def no_training(*_):
    raise AssertionError("an imported run was trained")


def test_a_comparison_of_imported_runs_reports_and_trains_nothing(state, place):
    for arm, rights in (("a", [0, 1, 1, 2, 2, 1]), ("b", [2, 2, 1, 2, 2, 2])):
        for seed in (0, 1):
            generations = answers(place / "g.jsonl", [min(2, right + seed % 2) for right in rights])
            import_run("trl", str(state), {"name": f"{arm}-{seed}", "seed": seed, "completions": 8, "generations": generations})
    arms = {arm: {"runs": f"runs/{arm}-{{seed}}"} for arm in "ab"}
    (place / "c.yaml").write_text(json.dumps({"name": "c", "arms": arms, "seeds": [0, 1], "budget": {"generated_tokens": 448}, "target": 0.7}))
    page = compare("c.yaml", functions=Functions(train=no_training, evaluate=no_training), quiet=True)
    html = page.read_text()
    with (page.parent / "results.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert float(rows["b"]["minus_a"]) == pytest.approx((11 / 12 + 12 / 12) / 2 - (7 / 12 + 11 / 12) / 2, abs=1e-4)
    assert "b has the highest test accuracy" in html and "TRL (trainer_state.json)" in html and "not recorded" in html


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ({}, "an arm needs either recipe"),
        ({"recipe": "opsd_expr", "runs": "runs/x-{seed}"}, "an arm needs either recipe"),
        ({"runs": "runs/x-{seed}", "set": {"optimizer.lr": 1}}, "leave out set and by"),
        ({"runs": "runs/x"}, "names one folder for 2 seeds"),
        ({"runs": "runs/x-{seed}"}, "runs/x-0 is no finished run folder (missing)"),
    ],
)
def test_an_arm_of_runs_that_cannot_be_is_refused(place, arm, said):
    raw = {"name": "c", "arms": {"a": arm}, "seeds": [0, 1], "budget": {"steps": 5}}
    (place / "c.yaml").write_text(json.dumps(raw))
    with pytest.raises(ValueError) as refused:
        parse_comparison(raw) if "either" in said or "leave" in said else load_comparison("c.yaml")
    assert said in str(refused.value)


def test_a_torn_offline_file_is_read_up_to_the_tear(place):
    file = log_to_wandb(place, [(n, {"x": n, "text": "y" * 500}) for n in range(200)])  # longer than a block of its format
    whole = read_offline(file)
    assert [row["x"] for row in whole.history] == list(range(200))
    (place / "torn.wandb").write_bytes(file.read_bytes()[:50_000])
    torn = read_offline(place / "torn.wandb")
    assert 20 < len(torn.history) < 200 and torn.history == whole.history[: len(torn.history)]
