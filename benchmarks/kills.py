"""SIGKILL to random processes of training runs, until so many have died: `python benchmarks/kills.py --kills 50`.

Each run has two learner ranks, an engine process a rank, and their launcher. A victim is any of their processes, at a random moment from the
start on. A launcher that died is started again with the same command; whatever else dies, the run has to go on or stop so that the same command
resumes. Every run must end with the model, bit for bit, of a run that nobody disturbed, a ledger in which every step used its own prompts once,
and no process left.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

STEPS, PROMPTS = 60, 4
RECIPE = {
    "method": "opsd",
    "model": {"shape": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}},
    "data": {"task": "expr"},
    "group": 2,
    "rollout": {"prompts": PROMPTS},
    "sampling": {"max_tokens": 8},
    "steps": STEPS,
    "teacher": {"ema": {"rate": 0.1}},
    "eval": {"every": 0, "num_problems": 2, "final_problems": 0},
    "checkpoint": {"every": 2},
    "engine": {"kind": "process", "stall_seconds": 60},
    "learner": {"kind": "deepspeed", "ranks": 2, "zero_stage": 2},
    "launch": {"deadline_seconds": 300, "restarts": 20},
    "optimizer": {"lr": 1e-2},
    "track": {"wandb": "disabled", "samples_every": 0},
}
MARK = "OPD_KILLED"
PATIENCE_SECONDS = 900.0


def processes(folder: Path) -> dict[int, str]:
    """pid -> role of every living process of a run in `folder`, found by a variable that all of them inherit."""
    wanted, found = f"{MARK}={folder}".encode(), {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = role((entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " "))
        except OSError:
            continue
    return found


def role(command: str) -> str:
    """What a process of a run is, from its command line."""
    known = {"-m opd train": "launcher", "opd.launcher.beacon": "rank", "sweep.py": "guard", "forkserver": "engine", "resource_tracker": "tracker"}
    return next((name for words, name in known.items() if words in command), "other")


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """The launcher of the run `name`."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", MARK: str(folder)}
    with (folder / f"{name}.log").open("a") as log:
        words = [sys.executable, "-P", "-m", "opd", "train", "r.json", f"name={name}"]
        return subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log)


def num_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def wait_a_while(dice: random.Random, launcher: subprocess.Popen[bytes], run: Path) -> None:
    """Until a random moment: some time after a start, or some steps later."""
    until, steps = time.monotonic() + dice.uniform(0.2, 12.0), 0
    if dice.random() < 0.7:
        until, steps = time.monotonic() + PATIENCE_SECONDS, num_steps(run) + dice.randrange(1, 8)
    while time.monotonic() < until and launcher.poll() is None:
        if steps and num_steps(run) >= steps:
            time.sleep(dice.uniform(0.0, 0.4))
            return
        time.sleep(0.02)


def survivors(folder: Path) -> dict[int, str]:
    until = time.monotonic() + 30.0
    while (left := processes(folder)) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def disturbed(folder: Path, name: str, dice: random.Random, kills: int) -> dict[str, Any]:
    """One run with at most `kills` kills: whom they met and what followed."""
    run, victims, resumed, stopped = folder / "runs" / name, [], 0, 0
    launcher, started = start(folder, name), time.monotonic()
    while True:
        if len(victims) < kills:
            wait_a_while(dice, launcher, run)
        else:
            launcher.wait(PATIENCE_SECONDS)
        if launcher.poll() is None:
            alive = processes(folder)
            victim = dice.choice(sorted(alive))
            os.kill(victim, signal.SIGKILL)
            victims.append({"role": alive[victim], "after_step": num_steps(run)})
            if victim != launcher.pid:
                continue
            launcher.wait()
        assert not (left := survivors(folder)), f"{left} outlived the launcher"
        if launcher.returncode == 0:
            break
        resumed += launcher.returncode == -signal.SIGKILL
        stopped += launcher.returncode != -signal.SIGKILL
        assert stopped < 10, (folder / f"{name}.log").read_text()[-3000:]
        launcher = start(folder, name)
    return {"victims": victims, "launchers_started_again": resumed, "clean_stops_resumed": stopped, "seconds": time.monotonic() - started}


def check(run: Path, undisturbed: Path) -> None:
    """Raises AssertionError unless the ledger is whole and the model is the undisturbed one."""
    for name in ("ledger.jsonl", "metrics.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), f"{run.name}: {name} has steps twice or not at all"
        if name == "ledger.jsonl":
            assert [row["drawn"] for row in rows] == [PROMPTS * row["step"] for row in rows], f"{run.name}: prompts drawn twice or left out"
            assert rows == [json.loads(line) for line in (undisturbed / name).read_text().splitlines()], f"{run.name}: other prompts"
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (undisturbed / weights).read_bytes(), f"{run.name}: another model than that of the undisturbed run"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kills.json")
    chosen = options.parse_args()
    dice, runs = random.Random(chosen.seed), []
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        folder = Path(scratch)
        (folder / "r.json").write_text(json.dumps(RECIPE))
        disturbed(folder, "undisturbed", dice, 0)
        while (left := chosen.kills - sum(len(run["victims"]) for run in runs)) > 0:
            runs.append(disturbed(folder, f"run-{len(runs)}", dice, left))
            check(folder / "runs" / f"run-{len(runs) - 1}", folder / "runs/undisturbed")
            print(f"run {len(runs)}: {len(runs[-1]['victims'])} kills, model and ledger as if nobody had been killed", flush=True)
    roles = Counter(victim["role"] for run in runs for victim in run["victims"])
    result = {"kills": sum(roles.values()), "by_role": dict(sorted(roles.items())), "runs": runs, "seed": chosen.seed}
    result |= {"steps_a_run": STEPS, "machine": {"cpus": os.cpu_count(), "system": platform.platform()}, "date": time.strftime("%Y-%m-%d")}
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
