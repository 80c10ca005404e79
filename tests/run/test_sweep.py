"""Nothing that a run has started outlives it, however the run ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from opd.launcher.sweep import MARK, marked, marked_processes, state_of

SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
DEADLINE_SECONDS = 20.0


def lives(pid):
    from pathlib import Path

    return state_of(Path(f"/proc/{pid}")) not in ("", "Z")


def wait_until(done):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not done():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.05)


def test_what_was_started_inside_is_gone_after_the_block_and_nothing_else_is():
    bystander = subprocess.Popen(SLEEPER)
    try:
        with marked_processes() as outer:
            first = subprocess.Popen(SLEEPER)
            with marked_processes() as inner:
                second = subprocess.Popen(SLEEPER)
                wait_until(lambda: second.pid in marked(inner))
                assert first.pid not in marked(inner) and {first.pid, second.pid} <= set(marked(outer))
            assert not lives(second.pid) and lives(first.pid), "the inner run has ended, the outer one has not"
            assert os.environ[MARK] == outer
        assert not lives(first.pid) and MARK not in os.environ and lives(bystander.pid)
    finally:
        bystander.kill()
        bystander.wait()


RUN = """
import subprocess, sys, time
from pathlib import Path
from opd.launcher.sweep import marked_processes
folder = Path(sys.argv[1])
sleep = [sys.executable, "-S", "-c", "import time; print(1, flush=True); time.sleep(60)"]
with marked_processes(folder):
    kept = subprocess.Popen(sleep, env={}, stderr=(folder / "log").open("w"), stdout=subprocess.PIPE, start_new_session=True)  # no mark
    deep = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:], env={}, start_new_session=True).pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-S", "-c", deep, *sleep], stdout=subprocess.PIPE, text=True)
    kept.stdout.readline()
    print(kept.pid, parent.pid, parent.stdout.readline(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_takes_everything_with_it(tmp_path, number):
    """A process with the mark, one below it without, and an orphan that only has a file of the run's folder open."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    run = subprocess.Popen([sys.executable, "-c", RUN, str(folder)], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in run.stdout.readline().split()]
    assert len(pids) == 3 and all(lives(pid) for pid in pids)
    run.send_signal(number)
    run.wait()
    wait_until(lambda: not any(lives(pid) for pid in pids) and not folder.exists())
