"""A recipe with several ranks: the same training as with one, one writer, mistakes refused before anything starts."""

import json

import pytest
import yaml
from pytest import approx

from opd.config.load import parse_recipe, recipe_hash
from opd.launcher.ranks import dealt
from tests.run.launched import TINY, finish, lines, opd, start, status, survivors, wait_for


def write(folder, **changes):
    (folder / "r.yaml").write_text(yaml.safe_dump({**TINY, **changes}))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_train_as_one(tmp_path, stage):
    write(tmp_path, learner={"kind": "deepspeed", "zero_stage": stage}, updates={"minibatches": 2})
    for name, ranks in (("one", 1), ("two", 2)):
        code, said = opd(tmp_path, "train", "r.yaml", f"name={name}", f"learner.ranks={ranks}")
        assert code == 0, said
    one, two = tmp_path / "runs/one", tmp_path / "runs/two"
    rows = zip(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"), strict=True)
    for alone, shared in rows:
        assert shared["loss/total"] == approx(alone["loss/total"], rel=1e-3, abs=1e-6)
        for name in ("tokens/student", "tokens/teacher", "tokens/learner", "reward/mean", "length/mean", "views/main", "step"):
            assert shared[name] == approx(alone[name], rel=1e-6), name
    for alone, shared in zip(lines(one / "ledger.jsonl"), lines(two / "ledger.jsonl"), strict=True):
        assert sorted(alone["prompts"]) == sorted(shared["prompts"]) and alone["drawn"] == shared["drawn"] == 4 * alone["step"]
    for alone, shared in zip(lines(one / "eval.jsonl"), lines(two / "eval.jsonl"), strict=True):
        assert {**alone, "seconds": 0} == {**shared, "seconds": 0}
    for pattern in ("generations/*", "samples/*"):
        assert {path.name for path in one.glob(pattern)} == {path.name for path in two.glob(pattern)} != set()
    assert json.loads((two / "chosen.json").read_text()) == json.loads((one / "chosen.json").read_text())
    found = status(two)
    assert (found["state"], found["step"], found["restarts"], found["version"]) == ("finished", 6, 0, 6)
    assert survivors(tmp_path) == []


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_ranks_as_if_nothing_had_changed(tmp_path):
    """1 rank, then 2, then 1, with a teacher that is averaged, and so in pieces."""
    changes = {"steps": 24, "teacher": {"ema": {"rate": 0.2}}, "eval": {"every": 0, "num_problems": 2, "final_problems": 0}}
    write(tmp_path, **changes, learner={"kind": "deepspeed", "zero_stage": 2}, optimizer={"lr": 1e-3})
    code, said = opd(tmp_path, "train", "r.yaml", "name=alone")
    assert code == 0, said
    run = tmp_path / "runs/moved"
    for ranks, until in ((1, 3), (2, 12)):
        process = start(tmp_path, "train", "r.yaml", "name=moved", f"learner.ranks={ranks}")
        wait_for(lambda: len(lines(run / "metrics.jsonl")) >= until)  # noqa: B023
        process.terminate()
        code, said = finish(process, tmp_path)
        assert code == 0 and status(run)["state"] == "preempted", said
    code, said = opd(tmp_path, "train", "r.yaml", "name=moved", "learner.ranks=1")
    assert code == 0 and said.count("resumed after step") == 2, said
    for alone, moved in zip(lines(tmp_path / "runs/alone/metrics.jsonl"), lines(run / "metrics.jsonl"), strict=True):
        assert moved["loss/total"] == approx(alone["loss/total"], rel=1e-3, abs=1e-6)
        assert moved["tokens/student"] == alone["tokens/student"]
    assert lines(tmp_path / "runs/alone/ledger.jsonl")[-1]["drawn"] == lines(run / "ledger.jsonl")[-1]["drawn"] == 4 * 24
    assert survivors(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["learner.ranks=3"], "rollout.prompts is 4, which 3 ranks cannot share evenly (each owns whole groups): use rollout.prompts=6, or"),
        (["learner.ranks=2", "learner.kind=torch"], "learner.kind torch is one process: use learner.kind=deepspeed, or learner.ranks=1"),
        (["launch.nodes=2"], "every machine needs launch.master=HOST:PORT of machine 0"),
        (["launch.nodes=2", "launch.master=host"], "every machine needs launch.master=HOST:PORT of machine 0"),
        (["launch.nodes=2", "launch.master=h:1", "launch.node_rank=2"], "launch.node_rank is 2, but with launch.nodes=2 they go from 0 to 1"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_when_the_recipe_loads(words, sentence):
    with pytest.raises(ValueError) as refused:
        parse_recipe(TINY, words)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_how_a_run_is_launched_does_not_make_it_another_run():
    changed = parse_recipe(TINY, ["learner.ranks=2", "launch.restarts=1"])
    assert recipe_hash(changed) == recipe_hash(parse_recipe(TINY))


def test_prompts_are_dealt_in_turn_to_the_ranks_that_miss_some():
    assert [dealt("abcdef", [3, 3], rank) for rank in range(2)] == [list("ace"), list("bdf")]
    assert [dealt("abcd", [1, 0, 3], rank) for rank in range(3)] == [["a"], [], list("bcd")]
