"""What may go wrong while a run works: signals, non-finite losses, memory, disk, verifiers, two processes, changed inputs."""

import errno
import json
import os
import random
import signal
import threading

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
import yaml
from opd_rollout import torch_engine
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import opd.run.training
from opd.cli import main
from opd.learner.learner import PolicyLearner
from opd.learner.policy import Policy
from opd.run.folder import claimed

torch.set_num_threads(1)
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
RECIPE = {
    "method": "grpo",
    "model": {"shape": SHAPE},
    "data": {"task": "expr", "verifier": {"fn": f"{__name__}:verdict"}},
    "rollout": {"prompts": 2},
    "sampling": {"max_tokens": 8},
    "steps": 6,
    "updates": {"minibatches": 1},
    "objective": [{"policy": "reinforce", "advantage": "group_centered", "weight": {"fn": f"{__name__}:weight"}}],
    "optimizer": {"lr": 1e-2},
    "eval": {"every": 0, "num_problems": 0, "final_problems": 0},
    "checkpoint": {"every": 2},
    "learner": {"kind": "torch", "max_skipped": 2},
    "track": {"wandb": "disabled"},
}
BEHAVIOUR = {}


def verdict(prompt, text):
    """Judges by BEHAVIOUR["verdict"], else by a coin that text decides."""
    return BEHAVIOUR.get("verdict", lambda text: random.Random(text).random() < 0.5)(text)


def weight(now):
    """Ones, or what BEHAVIOUR["weight"] makes of them."""
    return BEHAVIOUR.get("weight", lambda ones: ones)(torch.ones_like(now.student_logp))


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run(*overrides) -> (exit status, stderr) of `opd train`; its folder is runs/r."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    BEHAVIOUR.clear()

    def train(*overrides):
        capfd.readouterr()
        status = main(["train", "recipe.yaml", "name=r", *overrides])
        said = capfd.readouterr().err
        assert "Traceback" not in said
        return status, said

    yield train
    BEHAVIOUR.clear()


def status_of(folder="runs/r"):
    with open(f"{folder}/status.json") as file:
        return json.load(file)


def metrics(folder="runs/r"):
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def weights(step):
    return load_file(f"runs/r/checkpoints/step-{step:06d}/model/model.safetensors")


def saved_steps():
    return sorted(int(name[5:]) for name in os.listdir("runs/r/checkpoints"))


def once(then, *, after):
    """A function that does nothing but on its `after`-th call."""
    calls = [0]

    def count(*_):
        calls[0] += 1
        if calls[0] == after:
            then()
        return calls[0]

    return count


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, 0, "SIGTERM"), (signal.SIGUSR1, 0, "SIGUSR1"), (signal.SIGINT, 130, "Ctrl-C")],
    ids=["SIGTERM", "SIGUSR1", "SIGINT"],
)
def test_a_signal_in_the_middle_of_generation_stops_within_one_forward_pass_and_saves(run, monkeypatch, number, code, name):
    draw, count = torch_engine.draw, once(lambda: os.kill(os.getpid(), number), after=8 * 3 + 4)  # in the fourth step
    drawn = []
    monkeypatch.setattr(torch_engine, "draw", lambda *a, **k: (drawn.append(count()), draw(*a, **k))[1])
    before = signal.getsignal(number)
    status, said = run("checkpoint.every=0")
    assert status == code and name in said and "run the same command to go on" in said
    assert drawn[-1] == 8 * 3 + 4 and signal.getsignal(number) is before
    assert status_of()["state"] == "preempted" and name in status_of()["why"] and saved_steps() == [3]
    status, said = run("checkpoint.every=0")
    assert status == 0 and "resumed after step 3" in said and status_of()["state"] == "finished"
    assert [row["step"] for row in metrics()] == [1, 2, 3, 4, 5, 6]


def test_a_signal_while_weights_change_waits_for_the_end_of_the_step(run, monkeypatch):
    step, count = PolicyLearner.step, once(lambda: os.kill(os.getpid(), signal.SIGTERM), after=3)
    monkeypatch.setattr(PolicyLearner, "step", lambda *a: (count(), step(*a))[1])
    status, _ = run("checkpoint.every=0")
    assert status == 0 and saved_steps() == [3] and len(metrics()) == 3


def test_a_signal_between_two_verdicts_is_not_taken_for_an_error_of_the_verifier(run):
    judged = []
    count = once(lambda: os.kill(os.getpid(), signal.SIGTERM), after=5)
    BEHAVIOUR["verdict"] = lambda text: judged.append(count()) or 1.0
    assert run()[0] == 0 and judged[-1] == 5 and status_of()["state"] == "preempted" and not os.path.exists("runs/r/checkpoints")


def test_a_second_ctrl_c_ends_at_once_and_the_run_can_go_on(run):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    judged, count = [], once(twice, after=16 * 4 + 2)  # the fifth step
    BEHAVIOUR["verdict"] = lambda text: judged.append(count()) or float(len(text) % 2)
    status, said = run()
    assert status == 130 and "the last checkpoint stays" in said and "twice" in status_of()["why"] and saved_steps() == [2, 4]
    status, said = run()
    assert status == 0 and "resumed after step 4" in said


def test_a_signal_while_models_are_loaded_leaves_nothing(run, monkeypatch, tmp_path):
    monkeypatch.setattr("opd.build.system.load_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    status, said = run()
    assert status == 0 and "SIGTERM" in said and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(run, kind, poison):
    count = once(lambda: None, after=0)
    BEHAVIOUR["weight"] = lambda ones: ones * (poison if count() in (3, 4) else 1.0)
    status, said = run("checkpoint.every=1", "checkpoint.keep=9", f"learner.kind={kind}")
    assert status == 0 and "step 3: no update, the loss or its gradient is not finite" in said
    assert [row["updates/skipped"] for row in metrics()] == [0, 0, 1, 1, 0, 0]
    assert [row["updates/skipped_total"] for row in metrics()] == [0, 0, 1, 2, 2, 2]
    assert ["not finite" in row["skipped"] for row in metrics()] == [False, False, True, True, False, False]
    moved = [any(not torch.equal(weights(a)[name], weights(a + 1)[name]) for name in weights(a)) for a in range(1, 6)]
    assert moved == [True, False, False, True, True]
    assert "NaN" not in open("runs/r/metrics.jsonl").read()


def test_too_many_skipped_steps_stop_the_run_and_keep_the_last_good_checkpoint(run):
    count = once(lambda: None, after=0)
    BEHAVIOUR["weight"] = lambda ones: ones * (torch.nan if count() > 2 else 1.0)
    status, said = run()
    assert status == 1 and "3 steps in a row had a refused update" in said and "last good checkpoint stays" in said
    assert status_of()["state"] == "failed" and "TooManySkipped" in open("runs/r/error.txt").read()
    assert saved_steps() == [2, 4] and all(tensor.isfinite().all() for tensor in weights(4).values())
    assert all(torch.equal(weights(2)[name], weights(4)[name]) for name in weights(2))
    BEHAVIOUR.clear()
    assert run()[0] == 0 and len(metrics()) == 6 and not os.path.exists("runs/r/error.txt")


def test_out_of_memory_halves_the_token_budget_replays_and_says_so(run, monkeypatch):
    forward, refused = Policy.forward, []

    def small_only(self, layout, request):
        if torch.is_grad_enabled() and layout.input_ids.numel() > 200:
            refused.append(layout.input_ids.numel())
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, layout, request)

    monkeypatch.setattr(Policy, "forward", small_only)
    status, said = run("learner.token_budget=400", "steps=3")
    assert status == 0 and "step 1: out of memory; micro-batches of at most 200 tokens" in said and len(refused) == 1
    assert [row["learner/token_budget"] for row in metrics()] == [200, 200, 200]
    assert [row["learner/replays"] for row in metrics()] == [1, 0, 0]


def test_out_of_memory_elsewhere_is_a_sentence(run, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch_engine, "draw", full)
    status, said = run()
    assert status == 2 and "lower engine.token_budget" in said and "OutOfMemoryError" in open("runs/r/error.txt").read()


def out_of_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def unwritable(*_, **__):
    raise SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: \"No space left on device\" })")


@pytest.mark.parametrize(
    ("where", "failure"),
    [
        ("opd.learner.learner.torch.save", out_of_space),
        ("opd.learner.learner.PolicyLearner.export", unwritable),
        ("opd.run.training.append_line", out_of_space),
    ],
    ids=["optimizer", "weights", "metrics"],
)
def test_a_full_disk_keeps_the_last_good_checkpoint(run, monkeypatch, where, failure):
    count = once(lambda: monkeypatch.setattr(where, failure), after=3)
    step = PolicyLearner.step
    monkeypatch.setattr(PolicyLearner, "step", lambda *a: (count(), step(*a))[1])
    status, said = run()
    assert status == 2 and "the disk is full" in said and "stays" in said and "Free space" in said and said.count("opd: ") == 1
    assert saved_steps() == [2] and status_of()["state"] == "failed"


def test_after_a_full_disk_the_same_command_goes_on(run, monkeypatch):
    write, count = opd.run.training.write_json, once(out_of_space, after=2)
    monkeypatch.setattr(opd.run.training, "write_json", lambda *a: (count(), write(*a))[1])
    assert run()[0] == 2 and saved_steps() == [2]
    status, said = run()
    assert status == 0 and "resumed after step 2" in said and [row["step"] for row in metrics()] == [1, 2, 3, 4, 5, 6]


def test_abstentions_and_errors_are_counted_and_leave_the_means(run):
    def moody(text):
        if len(text) % 3 == 0:
            raise RuntimeError("sandbox is gone")
        return None if len(text) % 3 == 1 else 0.25

    BEHAVIOUR["verdict"] = moody
    assert run()[0] == 0
    rows = metrics()
    assert all(abs(row["reward/mean"] - 0.25) < 1e-12 for row in rows if "reward/mean" in row) and any("reward/mean" in row for row in rows)
    assert sum(row["verdict/error"] for row in rows) > 0 and sum(row["verdict/abstain"] for row in rows) > 0
    assert all(row["loss/total"] == 0 for row in rows)  # equal rewards of the judged: no advantage


def test_a_verifier_that_fails_on_everything_stops_the_run_and_nothing_is_lost(run):
    def broken(text):
        if len(metrics()) == 3:
            raise ConnectionError("sandbox is gone")
        return float(len(text) % 2)

    open_metrics = metrics
    BEHAVIOUR["verdict"] = lambda text: broken(text) if os.path.exists("runs/r/metrics.jsonl") else 1.0
    status, said = run("checkpoint.every=0")
    assert status == 2 and "the verifier failed on 16 of 16 answers" in said and "sandbox is gone" in said
    assert saved_steps() == [3] and len(open_metrics()) == 3 and status_of()["state"] == "failed"
    BEHAVIOUR.clear()
    status, said = run("checkpoint.every=0")
    assert status == 0 and "resumed after step 3" in said


def test_a_verifier_that_never_returns_ends_the_run_and_with_more_time_the_same_command_goes_on(run):
    def hangs(text):
        if os.path.exists("runs/r/metrics.jsonl") and len(metrics()) == 3:
            threading.Event().wait(600)
        return float(len(text) % 2)

    BEHAVIOUR["verdict"] = hangs
    status, said = run("checkpoint.every=0", "data.verifier_seconds=2")
    assert status == 2 and f"verifier {__name__}:verdict gave no verdict on prompt 'expr:" in said and "raise data.verifier_seconds" in said
    assert saved_steps() == [3] and len(metrics()) == 3 and status_of()["state"] == "failed" and "gave no verdict" in status_of()["why"]
    BEHAVIOUR["verdict"] = lambda text: float(len(text) % 2)
    status, said = run("checkpoint.every=0", "data.verifier_seconds=60")
    assert status == 0 and "resumed after step 3" in said


def test_two_processes_do_not_work_in_one_folder(run, tmp_path):
    assert run("steps=2")[0] == 0
    os.remove("runs/r/status.json")
    with claimed(tmp_path / "runs/r"):
        status, said = run("steps=2")
    assert status == 2 and "another process is working in runs/r" in said


def test_another_recipe_in_the_same_folder_is_refused_with_the_difference_and_nothing_changes(run, tmp_path):
    assert run()[0] == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, said = run("optimizer.lr=0.5", "group=4")
    assert status == 2 and "group: 8 -> 4; optimizer.lr: 0.01 -> 0.5" in said and "name=" in said
    assert run()[0] == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_fits_into_memory_and_what_is_kept_may_change_on_a_resume(run):
    count = once(lambda: os.kill(os.getpid(), signal.SIGTERM), after=16 * 3 + 1)
    BEHAVIOUR["verdict"] = lambda text: float(count() % 2)
    assert run()[0] == 0 and status_of()["state"] == "preempted"
    status, _ = run("learner.token_budget=100", "checkpoint.keep=1", "checkpoint.best=false", "checkpoint.every=1")
    assert status == 2  # which checkpoint is the result is not a matter of memory
    status, said = run("learner.token_budget=100", "checkpoint.keep=1", "checkpoint.every=1")
    assert status == 0 and "resumed after step 3" in said and saved_steps() == [6]
    assert [row["learner/token_budget"] for row in metrics()] == [16384] * 3 + [100] * 3
    with open("runs/r/resolved.json") as file:
        assert "learner.token_budget: 16384 -> 100" in json.load(file)["changed_on_resume"]


def test_a_folder_that_is_no_run_is_left_alone(run, tmp_path):
    (tmp_path / "runs/r").mkdir(parents=True)
    (tmp_path / "runs/r/thesis.tex").write_text("chapter 1")
    status, said = run()
    assert status == 2 and "is no run folder" in said and [path.name for path in (tmp_path / "runs/r").iterdir()] == ["thesis.tex"]


def test_data_that_changed_under_a_run_are_refused(run, tmp_path):
    lines = [json.dumps({"question": f"{n}+1?", "answer": str(n + 1)}) for n in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    words = [f"data={json.dumps({**RECIPE['data'], 'task': '', 'path': 'data.jsonl'})}", "model.vocabulary=300", "checkpoint.every=1"]
    count = once(lambda: os.kill(os.getpid(), signal.SIGTERM), after=20)
    BEHAVIOUR["verdict"] = lambda text: float(count() % 2)
    assert run(*words)[0] == 0 and status_of()["state"] == "preempted"
    (tmp_path / "data.jsonl").write_text("\n".join(lines[:-1]))
    status, said = run(*words)
    assert status == 2 and "the data changed since the run began" in said
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    assert run(*words)[0] == 0 and status_of()["state"] == "finished"


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_a_checkpoint_that_cannot_be_read_is_refused_rather_than_started_anew(run, tmp_path, kind):
    assert run(f"learner.kind={kind}", "steps=2")[0] == 0
    os.remove("runs/r/status.json")
    folder = tmp_path / "runs/r/checkpoints/step-000002"
    for path in (folder / "learner").rglob("*.pt"):
        path.write_bytes(path.read_bytes()[:100].ljust(path.stat().st_size, b"?"))  # the size is right, the content is not
    status, said = run(f"learner.kind={kind}", "steps=2")
    assert status == 2 and "step-000002 cannot be read" in said and "delete that folder" in said and len(metrics()) == 2


def test_a_damaged_checkpoint_is_left_out(run):
    count = once(lambda: os.kill(os.getpid(), signal.SIGTERM), after=16 * 4 + 1)
    BEHAVIOUR["verdict"] = lambda text: float(count() % 2)
    assert run()[0] == 0 and saved_steps() == [2, 4]
    os.truncate("runs/r/checkpoints/step-000004/learner/optimizer.pt", 100)
    status, said = run()
    assert status == 0 and "step-000004 is incomplete and left out" in said and "resumed after step 2" in said and len(metrics()) == 6


def test_an_unfinished_run_is_no_starting_point(run):
    count = once(lambda: os.kill(os.getpid(), signal.SIGTERM), after=20)
    BEHAVIOUR["verdict"] = lambda text: float(count() % 2)
    run()
    status, said = run("name=next", "init=runs/r")
    assert status == 2 and "init: run runs/r is preempted; finish it first" in said and not os.path.exists("runs/next")


def test_weights_that_are_not_numbers_are_refused(run, tmp_path):
    assert run("steps=1")[0] == 0
    path = tmp_path / "runs/r/model/model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    status, said = run("name=next", "init=runs/r")
    assert status == 2 and "not finite" in said and "runs/r/model" in said
