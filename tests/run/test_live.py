"""The live view: a bar on a terminal, plain lines elsewhere, nothing when quiet; status.json beside it."""

import io
import json

from rich.console import Console

from opd.run.live import LiveView, Status

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
