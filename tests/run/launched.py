"""Runs with several ranks in processes of their own, and what is left of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
TINY = {
    "method": "opsd",
    "model": {"shape": SHAPE},
    "data": {"task": "expr"},
    "group": 2,
    "rollout": {"prompts": 4},
    "sampling": {"max_tokens": 8},
    "steps": 6,
    "eval": {"every": 3, "num_problems": 3, "final_problems": 3, "final_samples": 2},
    "checkpoint": {"every": 2},
    "learner": {"kind": "deepspeed"},
    "launch": {"deadline_seconds": 60},
    "optimizer": {"lr": 1e-2},
    "track": {"wandb": "disabled", "samples_every": 3},
}
DEADLINE_SECONDS = 420  # not a limit to reach: of machines where others work too
NEWEST: list[tuple[subprocess.Popen, Path]] = []


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen:
    """`opd WORDS` in `folder`; its output goes to the file `said`."""
    with (folder / "said").open("a") as said:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "opd", *words],
            cwd=folder,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OPD_TEST": str(folder), **environment},
            stdout=said,
            stderr=said,
        )
    NEWEST[:] = [(process, folder)]
    return process


def finish(process: subprocess.Popen, folder: Path) -> tuple[int, str]:
    """(exit status, everything said so far)."""
    status = process.wait(timeout=DEADLINE_SECONDS)
    return status, (folder / "said").read_text()


def opd(folder: Path, *words: str) -> tuple[int, str]:
    return finish(start(folder, *words), folder)


def survivors(folder: Path, seconds: float = 20.0) -> list[int]:
    """Processes that a run in `folder` has left, after the time that they may take to end."""
    until = time.monotonic() + seconds
    while (alive := started_in(folder)) and time.monotonic() < until:
        time.sleep(0.1)
    return alive


def started_in(folder: Path) -> list[int]:
    """Every living process that descends from a run in `folder`: found by what all of them inherit."""
    wanted, found = f"OPD_TEST={folder}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def wait_for(condition, seconds: float = DEADLINE_SECONDS):
    """The condition's first true value; fails with what the newest process said when that ended without it."""
    until = time.monotonic() + seconds
    while True:
        ended = [process.poll() is not None for process, _ in NEWEST]
        if value := condition():
            return value
        said = "".join((folder / "said").read_text()[-3000:] for _, folder in NEWEST)
        assert not any(ended), f"the run ended before:\n{said}"
        assert time.monotonic() < until, f"nothing happened in {seconds:.0f} s; said so far:\n{said}"
        time.sleep(0.02)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
