"""Functions of one's own that never return, and quick ones, under opd.verify.deadline."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from opd.errors import VerifierStuck
from opd.types import Prompt, Verdict
from opd.verify import as_verifier, deadline, judge, judge_all, make_verifier
from opd.verify.cache import VerdictCache, cached
from opd.verify.parts import Part, rubric_verifier, sum_verifier

PROMPT = Prompt(id="p-7", messages=({"role": "user", "content": "q"},), answer="4")
SECONDS = 0.3


def loops(prompt, text):
    while True:
        pass


def loops_over_errors(prompt, text):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass


def catches_everything_once(prompt, text):
    try:
        loops(prompt, text)
    except:  # noqa: E722
        return 0.0


def turns_it_into_an_error(prompt, text):
    try:
        loops(prompt, text)
    except BaseException:
        raise RuntimeError("odd") from None


async def awaits(completion):
    await asyncio.sleep(600)


async def computes(completion):
    loops(None, None)


def waits_for_a_lock(prompt, text):
    held = threading.Lock()
    held.acquire()
    held.acquire()


STUCK = {
    "a loop": loops,
    "a loop that swallows errors": loops_over_errors,
    "one that swallows everything": catches_everything_once,
    "one that raises something else": turns_it_into_an_error,
    "a sleep": lambda prompt, text: time.sleep(600),
    "a lock": waits_for_a_lock,
    "another process": lambda prompt, text: subprocess.run(["sleep", "600"]),
    "a pattern": lambda prompt, text: re.match(r"(a|aa)+$", "a" * 80 + "b"),
    "a coroutine that waits": awaits,
    "a coroutine that computes": computes,
}


@pytest.mark.parametrize("function", STUCK.values(), ids=STUCK)
def test_a_function_that_never_returns_is_an_error_that_names_all_and_no_verdict(function):
    before, started = signal.getsignal(signal.SIGURG), time.monotonic()
    with pytest.raises(VerifierStuck) as stuck:
        judge(as_verifier(function, seconds=SECONDS), PROMPT, "4")
    assert str(stuck.value) == (
        f"verifier {__name__}:{function.__qualname__} gave no verdict on prompt 'p-7' within 0.3 s; mend it, or raise data.verifier_seconds"
    )
    assert SECONDS <= time.monotonic() - started < 60 and signal.getsignal(signal.SIGURG) is before
    assert as_verifier(lambda prompt, text: 1.0, seconds=30)(PROMPT, "4").correct  # the next call has a deadline of its own


def test_it_ends_a_batch_whatever_lies_around_the_function(tmp_path):
    stuck = as_verifier(loops, seconds=SECONDS)
    rubric = type("Rubric", (), {"funcs": [loops], "weights": [1.0]})
    around = [sum_verifier({"a": Part(verify=stuck)}, "a"), rubric_verifier(rubric, SECONDS)]
    around.append(cached(stuck, VerdictCache(tmp_path / "v.sqlite", "1", str)))
    around.append(make_verifier({"sum": {"of": {"a": {"fn": f"{__name__}:loops"}}}}, seconds=SECONDS))
    for verify in around:
        with pytest.raises(VerifierStuck, match=f"{__name__}:loops gave no verdict on prompt 'p-7'"):
            judge_all(verify, [(PROMPT, "4")])


def test_a_quick_function_keeps_its_thread_its_state_and_its_own_signals():
    lock, seen = threading.Lock(), []  # what cannot be pickled

    def verify(prompt, text):
        def ring(number, frame):
            raise TimeoutError

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        try:
            time.sleep(600)
        except TimeoutError:
            with lock:
                seen.append((threading.current_thread(), text))
            return float(len(seen))
        finally:
            signal.signal(signal.SIGALRM, before)

    verifier = as_verifier(verify, seconds=30)
    assert [verifier(PROMPT, text) for text in "ab"] == [Verdict(reward=1.0, correct=True), Verdict(reward=2.0, correct=True)]
    assert seen == [(threading.main_thread(), "a"), (threading.main_thread(), "b")]


def test_a_function_inside_of_another_has_the_deadline_that_ends_first():
    inner = as_verifier(loops, seconds=60)
    with pytest.raises(VerifierStuck, match="within 0.3 s"):
        as_verifier(lambda prompt, text: inner(prompt, text), seconds=SECONDS)(PROMPT, "4")


def in_thread(function):
    """What the function returns or raises in another thread."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return found[0]


def test_in_another_thread_the_call_is_given_up():
    release, local = threading.Event(), threading.local()

    def verify(prompt, text):
        if text == "wait":
            release.wait(600)
        if text == "fail":
            raise KeyError("unit")
        local.count = getattr(local, "count", 0) + 1
        return local.count

    quick = as_verifier(verify, seconds=30)
    judged = in_thread(lambda: [judge(quick, PROMPT, text) for text in ("a", "fail", "b")])
    assert [verdict.reward for verdict in judged] == [1.0, 0.0, 2.0] and judged[1] == Verdict(status="error", feedback="KeyError: 'unit'")
    stuck = in_thread(lambda: judge(as_verifier(verify, seconds=SECONDS), PROMPT, "wait"))
    assert isinstance(stuck, VerifierStuck) and "gave no verdict on prompt 'p-7' within 0.3 s" in str(stuck)
    release.set()
    ends = time.monotonic() + 30
    while any(thread.name == "verifier" for thread in threading.enumerate()):  # also those whose owner is gone
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_watch_that_somebody_ended_is_replaced():
    verifier = as_verifier(loops, seconds=SECONDS)
    with pytest.raises(VerifierStuck):
        verifier(PROMPT, "4")
    [watch] = [pid for pid in children(os.getpid()) if "deadline_watch" in command(pid)]
    os.kill(watch, signal.SIGKILL)
    os.waitid(os.P_PID, watch, os.WEXITED | os.WNOWAIT)
    with pytest.raises(VerifierStuck):
        verifier(PROMPT, "4")
    assert [pid for pid in children(os.getpid()) if "deadline_watch" in command(pid)] != [watch]


def children(parent):
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, above = entry.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(above) == parent and state != "Z":
            found.append(int(entry.parent.name))
    return found


def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


SCRIPT = """
import itertools, os, sys, threading, time
from opd.types import Prompt
from opd.verify import as_verifier, deadline

deadline.GRACE_SECONDS = 0.3
PROMPT = Prompt(id="p", messages=({"role": "user", "content": "q"},), answer="4")

def verdict(prompt, text):
    if text == "hold":
        sum(itertools.repeat(0))  # the interpreter's lock is never given up, and no signal is looked at
    while text == "swallow":
        try:
            time.sleep(600)
        except BaseException:
            pass
    threading.Event().wait(600 if text == "wait" else 0)

verify = as_verifier(verdict, seconds=0.5)
print(as_verifier(verdict, seconds=60)(PROMPT, "quick").status, flush=True)
where = {"main": lambda function: function(), "thread": lambda function: (t := threading.Thread(target=function)).start() or t.join()}[sys.argv[1]]
where(lambda: verify(PROMPT, sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("where", "text", "status"),
    [("main", "hold", -9), ("thread", "hold", -9), ("main", "swallow", -9), ("thread", "wait", 0), ("main", "wait", 1)],
)
def test_the_process_ends_whatever_the_function_does_and_leaves_nobody(where, text, status):
    said = subprocess.run([sys.executable, "-c", SCRIPT, where, text], capture_output=True, text=True, timeout=120)  # its end closes all pipes
    assert said.returncode == status and said.stdout == "abstain\n"
    assert "__main__:verdict gave no verdict on prompt 'p' within 0.5 s; mend it, or raise data.verifier_seconds" in said.stderr
    assert ("nothing could interrupt it" in said.stderr) == (status < 0)


def test_the_watch_ends_with_a_process_that_is_killed():
    kill = SCRIPT.replace("where(lambda", "print(deadline._watch is not None, flush=True); os.kill(os.getpid(), 9); where(lambda")
    process = subprocess.Popen([sys.executable, "-c", kill, "main", "quick"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=120)  # returns when the watch, which shares the error pipe, has ended
    assert process.returncode == -signal.SIGKILL and out == "abstain\nTrue\n"


def test_the_recipe_s_default_is_the_function_s():
    from opd.config.recipe import Data

    assert Data().verifier_seconds == deadline.SECONDS == 300.0
