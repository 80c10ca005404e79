"""The live view: a bar on a terminal, plain lines elsewhere, nothing when quiet; status.json beside it."""

import io
import json

import pytest
from rich.console import Console

from opd.run.live import LiveView, Status
from opd.run.roles import who_waits

ROW = {"loss/total": 0.1234, "accuracy/train": 0.5, "eval/dev": 0.25, "seconds/step": 1.5, "rate/tokens": 321.0}


def shown(view_steps, **options):
    file = io.StringIO()
    view = LiveView("arm", 3, quiet=False, console=Console(file=file, width=120, **options))
    view.start_at(0)
    for step in view_steps:
        view.update(step, ROW)
    view.say("[a long sentence] " * 12)
    view.close()
    return file.getvalue()


def test_without_a_terminal_there_are_plain_lines_that_are_not_wrapped():
    text = shown([1, 2, 3])
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert lines[0].startswith("step 1/3 loss 0.1234 accuracy 0.500 dev 0.250 s/step 1.50 tok/s 321, about ") and lines[0].endswith(" s left")
    assert lines[1].startswith("step 3/3")  # step 2 came less than ten seconds after step 1
    assert lines[2] == ("[a long sentence] " * 12).rstrip() or lines[2] == "[a long sentence] " * 12


def test_a_loss_that_rounds_to_zero_has_no_sign():
    file = io.StringIO()
    LiveView("arm", 1, quiet=False, console=Console(file=file, width=120)).update(1, {"loss/total": -2e-5})
    assert file.getvalue().startswith("step 1/1 loss 0.0000,")


def test_on_a_terminal_there_is_a_bar_with_the_same_numbers():
    text = shown([1, 2, 3], force_terminal=True)
    assert "\x1b[" in text and "3/3" in text and "loss 0.1234" in text and "tok/s 321" in text


def test_quiet_says_nothing(capfd):
    view = LiveView("arm", 2, quiet=True)
    view.update(2, ROW)
    view.say("hello")
    view.close()
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_status_names_state_step_phase_and_reason(tmp_path):
    status = Status(tmp_path / "status.json", 9)
    status.step(4)
    status.phase("rollout")
    status.write("preempted", "preempted (SIGTERM)")
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["step"], found["steps"], found["phase"], found["why"]) == ("preempted", 4, 9, "rollout", "preempted (SIGTERM)")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


IDLE, BUSY = {"state": "idle", "seconds": 2.04}, {"state": "generating", "seconds": 1.0}


@pytest.mark.parametrize(
    ("phase", "actors", "batches", "said"),
    [
        ("rollout", {"a": BUSY, "b": IDLE}, {}, "learner (rollout 0.5 s) waits for a (generating 1.0 s)"),
        ("learn", {"a": IDLE}, {}, "a (idle 2.0 s) waits for learner (learn 0.5 s)"),
        ("learn", {"a": IDLE, "b": IDLE}, {}, "a (idle 2.0 s), b (idle 2.0 s) wait for learner (learn 0.5 s)"),
        ("learn", {"a": BUSY}, {}, "learner (learn 0.5 s) beside a (generating 1.0 s)"),
        ("learn", {}, {"finished": 1, "begun": 2}, "1 finished batches wait for the learner, 2 begun"),
        ("rollout", {"a": {"state": "gone", "seconds": 9.0}}, {}, "learner (rollout 0.5 s)"),
        ("learn", {}, {}, ""),
    ],
)  # fmt: skip
def test_who_waits_for_whom(phase, actors, batches, said):
    assert who_waits(phase, 0.5, actors, batches) == said


def test_what_changes_by_itself_is_in_the_status_and_on_the_terminal_while_the_run_lasts(tmp_path):
    """The bar asks at the moment of drawing, not at the end of a step."""
    status, state = Status(tmp_path / "status.json", 9), dict(IDLE)
    status.tick()
    assert not list(tmp_path.iterdir()), "nothing is watched yet: a run that has not begun writes nothing"
    status.watch("actors", lambda: {"a": state})
    status.facts(next="evaluation after step 5")
    status.phase("learn")
    found = json.loads((tmp_path / "status.json").read_text())
    assert found["roles"]["a"] == IDLE and found["roles"]["learner"]["phase"] == "learn" and found["waits"].startswith("a (idle 2.0 s) waits for")
    file = io.StringIO()
    view = LiveView("arm", 3, quiet=False, console=Console(file=file, width=250, force_terminal=True), roles=status.words)
    view.update(1, ROW)
    state.update(BUSY)
    view._bar.refresh()
    view.close()
    assert "beside a (generating 1.0 s) | next: evaluation after step 5" in file.getvalue()
    status.write("finished")
    assert not {"roles", "waits"} & set(json.loads((tmp_path / "status.json").read_text()))
