"""SIGKILL to a rank or to the launcher at any moment: the run goes on or resumes, every prompt is used once, and no process survives.

OPD_KILLS=50 kills at more random moments than the five of every test run.
"""

import os
import random
import signal
import time

import pytest
import yaml

from tests.run.launched import TINY, finish, kill, lines, opd, start, started_in, status, survivors, wait_for

KILLS = int(os.environ.get("OPD_KILLS", "5"))
STEPS = 12


def write(folder, **changes):
    (folder / "r.yaml").write_text(yaml.safe_dump({**TINY, "steps": STEPS, **changes}))


def rank_pids(run):
    """The ranks' pids, once the run is in a step."""

    def found():
        if (run / "metrics.jsonl").is_file() and (run / "status.json").is_file():
            roles = status(run).get("roles", {})
            return [role["pid"] for role in roles.values()] if all(role["state"] != "ended" for role in roles.values()) else []

    return wait_for(found)


def check_ledger(run, steps=STEPS):
    """Every step once and in order, four prompts each, and none of the stream's prompts twice or left out."""
    ledger = lines(run / "ledger.jsonl")
    assert [row["step"] for row in ledger] == list(range(1, steps + 1))
    assert [row["drawn"] for row in ledger] == [4 * row["step"] for row in ledger]
    assert all(len(row["prompts"]) == 4 for row in ledger)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    write(folder)
    code, said = opd(folder, "train", "r.yaml", "name=run", "learner.ranks=2")
    assert code == 0, said
    check_ledger(folder / "runs/run")
    return folder / "runs/run"


def without_times(path):
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "rate/"))} for row in lines(path)]


def check_same(run, undisturbed):
    for name in ("metrics.jsonl", "ledger.jsonl", "eval.jsonl"):
        assert without_times(run / name) == without_times(undisturbed / name), name
    assert (run / "model/model.safetensors").read_bytes() == (undisturbed / "model/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_replaced_and_the_run_ends_bitwise_as_if_it_had_lived(tmp_path, undisturbed, rank):
    write(tmp_path)
    run = tmp_path / "runs/run"
    process = start(tmp_path, "train", "r.yaml", "name=run", "learner.ranks=2")
    wait_for(lambda: len(lines(run / "metrics.jsonl")) >= 3)
    victim = rank_pids(run)[rank]
    kill(victim)
    code, said = finish(process, tmp_path)
    assert code == 0, said
    assert f"opd: rank {rank} was killed by SIGKILL in phase " in said and "restarting from the last checkpoint (1 of 3" in said
    assert not os.path.exists(f"/proc/{victim}") and survivors(tmp_path) == []
    assert status(run)["restarts"] == 1
    check_ledger(run)
    check_same(run, undisturbed)


@pytest.mark.slow
def test_a_killed_launcher_takes_everything_along_and_the_same_command_resumes(tmp_path, undisturbed):
    write(tmp_path)
    run = tmp_path / "runs/run"
    process = start(tmp_path, "train", "r.yaml", "name=run", "learner.ranks=2")
    wait_for(lambda: len(lines(run / "metrics.jsonl")) >= 3)
    assert len(started_in(tmp_path)) >= 4  # launcher, guard, two ranks
    kill(process.pid)
    process.wait()
    assert survivors(tmp_path) == []
    code, said = opd(tmp_path, "train", "r.yaml", "name=run", "learner.ranks=2")
    assert code == 0 and "resumed after step" in said, said
    check_ledger(run)
    check_same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_kills_at_random_moments(tmp_path, undisturbed, seed):
    """A rank or the launcher, chosen by the seed, after a random time from the very start on."""
    dice = random.Random(seed)
    write(tmp_path)
    run = tmp_path / "runs/run"
    process = start(tmp_path, "train", "r.yaml", "name=run", "learner.ranks=2")
    time.sleep(dice.uniform(0.2, 9.0))
    others = [pid for pid in started_in(tmp_path) if pid != process.pid]
    victim = dice.choice([process.pid, *others]) if process.poll() is None else 0
    if victim:
        kill(victim)
    code, said = finish(process, tmp_path)
    assert not victim or not os.path.exists(f"/proc/{victim}")
    assert survivors(tmp_path) == []
    if code:
        assert code == -signal.SIGKILL and victim == process.pid, said
        code, said = opd(tmp_path, "train", "r.yaml", "name=run", "learner.ranks=2")
    assert code == 0, said
    check_ledger(run)
    check_same(run, undisturbed)
    assert survivors(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 0, "SIGTERM"), (signal.SIGUSR1, 0, "SIGUSR1")]
)
def test_asked_to_stop_all_ranks_save_the_last_whole_step_and_the_run_resumes_bitwise(tmp_path, undisturbed, number, code, words):
    write(tmp_path)
    run = tmp_path / "runs/run"
    process = start(tmp_path, "train", "r.yaml", "name=run", "learner.ranks=2")
    wait_for(lambda: len(lines(run / "metrics.jsonl")) >= 3)
    process.send_signal(number)
    ended, said = finish(process, tmp_path)
    assert ended == code and words in said and "run the same command to go on" in said, said
    assert status(run)["state"] == "preempted" and survivors(tmp_path) == []
    assert max(run.glob("checkpoints/step-*")).name == f"step-{len(lines(run / 'metrics.jsonl')):06d}"
    ended, said = opd(tmp_path, "train", "r.yaml", "name=run", "learner.ranks=2")
    assert ended == 0, said
    check_same(run, undisturbed)


@pytest.mark.slow
def test_a_stalled_rank_is_named_with_its_phase_in_bounded_time(tmp_path):
    write(tmp_path, steps=5000, checkpoint={"every": 0}, launch={"deadline_seconds": 40, "restarts": 0}, eval={"num_problems": 0, "every": 0})
    run = tmp_path / "runs/run"
    process = start(tmp_path, "train", "r.yaml", "name=run", "learner.ranks=2")
    wait_for(lambda: len(lines(run / "metrics.jsonl")) >= 3)
    os.kill(rank_pids(run)[1], signal.SIGSTOP)
    started = time.monotonic()
    code, said = finish(process, tmp_path)
    assert code == 1 and time.monotonic() - started < 100
    assert "stalled: rank 1 in phase " in said and "(stopped, silent for 40 s)" in said and "rank 0 waits in phase" in said, said
    assert status(run)["state"] == "failed" and "rank 1 in phase" in status(run)["why"]
    assert survivors(tmp_path) == []


@pytest.mark.slow
def test_restarts_are_bounded_and_the_sentence_says_what_happened(tmp_path):
    write(tmp_path, checkpoint={"every": 0}, launch={"restarts": 0})
    run = tmp_path / "runs/run"
    process = start(tmp_path, "train", "r.yaml", "name=run", "learner.ranks=2")
    wait_for(lambda: len(lines(run / "metrics.jsonl")) >= 2)
    kill(rank_pids(run)[1])
    code, said = finish(process, tmp_path)
    assert code == 1 and "opd: rank 1 was killed by SIGKILL in phase" in said and "run the same command to go on" in said, said
    assert status(run)["state"] == "failed" and survivors(tmp_path) == []


@pytest.mark.slow
def test_one_ranks_mistake_ends_all_of_them_with_one_sentence(tmp_path):
    one_fails = "import os\n\n\ndef judge(prompt, text):\n    if os.environ['RANK'] == '1':\n        raise OSError('no judge')\n    return 1.0\n"
    (tmp_path / "judge.py").write_text(one_fails)
    write(tmp_path, data={"task": "expr", "verifier": {"fn": "judge:judge"}}, eval={"num_problems": 0, "final_problems": 0})
    code, said = opd(tmp_path, "train", "r.yaml", "name=run", "learner.ranks=2", "steps=2")
    assert code == 0, said  # half of the answers are judged: no reason to stop
    (tmp_path / "judge.py").write_text("def judge(prompt, text):\n    raise OSError('no judge')\n")
    code, said = opd(tmp_path, "train", "r.yaml", "name=other", "learner.ranks=2", "steps=2")
    assert code == 2 and said.count("the verifier failed on 8 of 8 answers of this step") == 1 and "Traceback" not in said, said
    assert survivors(tmp_path) == []
