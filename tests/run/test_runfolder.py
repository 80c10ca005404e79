"""Run folders: atomic checkpoints, torn lines, full disks, another recipe's folder."""

import errno
import json
import os
import signal

import pytest

from opd.config.load import parse_recipe
from opd.errors import Preempted
from opd.run.folder import append_line, checkpoints, keep_lines, open_run, prune_checkpoints, read_lines, save_checkpoint
from opd.run.live import PhaseClock, Status
from opd.stop import StopRequest, stop_signals


def write_state(folder):
    (folder / "state.json").write_text("{}")


def test_a_rerun_with_another_recipe_is_refused_with_the_difference(tmp_path):
    open_run(tmp_path / "r", parse_recipe({"optimizer": {"lr": 1e-4}}), {})
    open_run(tmp_path / "r", parse_recipe({"optimizer": {"lr": 1e-4}, "track": {"wandb": "disabled"}}), {})
    with pytest.raises(ValueError, match="optimizer.lr: 0.0001 -> 0.001"):
        open_run(tmp_path / "r", parse_recipe({"optimizer": {"lr": 1e-3}}), {})
    facts = json.loads((tmp_path / "r/resolved.json").read_text())
    assert facts["packages"]["torch"] and facts["hardware"]["cpus"] == os.cpu_count()


def test_a_run_goes_on_after_an_upgrade_that_brought_a_key(tmp_path):
    recipe = parse_recipe({"optimizer": {"lr": 1e-4}})
    open_run(tmp_path / "r", recipe, {})
    resolved = tmp_path / "r/resolved.json"
    facts = json.loads(resolved.read_text())
    for section, key in (("checkpoint", "shard_mib"), ("optimizer", "clip")):
        del facts["recipe"][section][key]
    resolved.write_text(json.dumps(facts))
    open_run(tmp_path / "r", recipe, {})
    with pytest.raises(ValueError, match="optimizer.clip: 1.0 -> 7.0"):
        open_run(tmp_path / "r", parse_recipe({"optimizer": {"lr": 1e-4, "clip": 7.0}}), {})


def test_torn_last_line_is_left_out_and_later_steps_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_lines(path)] == [1, 2, 3]
    keep_lines(path, lambda row: row["step"] <= 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, write_state)

    def full(folder):
        (folder / "weights").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="disk is full.*last good one stays"):
        save_checkpoint(tmp_path, 2, full)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_another_error_while_saving_is_not_swallowed(tmp_path):
    def broken(folder):
        raise RuntimeError("no such tensor")

    with pytest.raises(RuntimeError, match="no such tensor"):
        save_checkpoint(tmp_path, 1, broken)


def test_pruning_keeps_newest_and_best(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, write_state)
    (tmp_path / "checkpoints/.step-000009.tmp").mkdir()
    prune_checkpoints(tmp_path, keep=2, best_step=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000003", "step-000004"]


def test_a_request_to_stop_waits_while_weights_change(tmp_path):
    request = StopRequest()
    clock = PhaseClock(Status(tmp_path / "status.json", 5), request)
    with stop_signals(request):
        os.kill(os.getpid(), signal.SIGUSR1)
        with clock("learn"):
            pass
        with pytest.raises(Preempted, match="SIGUSR1"), clock("rollout"):
            pass
    assert set(clock.seconds()) == {"learn"} and clock.seconds() == {}
