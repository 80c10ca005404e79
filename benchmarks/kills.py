"""SIGKILL to random processes of training runs, until so many have died: `python benchmarks/kills.py --kills 50 [--engine vllm]`.

Each run has two learner ranks, an engine process a rank, and their launcher. A victim is any of their processes, at a random moment from the
start on. A launcher that died is started again with the same command; whatever else dies, the run has to go on or stop so that the same command
resumes. Every run must end with the model, bit for bit, of a run that nobody disturbed, a ledger in which every step used its own prompts once,
and no process left.

--engine vllm: the learner is also Ray's driver, the student and its teacher are vLLM actors (AsyncLLM, whose engines are processes of their
own), and answers are written a step ahead of the learner. Victims: driver, both actors, both engines. vLLM's sums depend on which requests meet
in a batch, so the undisturbed run's numbers are met within 1e-3 instead of bit for bit; its tokens, prompts and ledger are the same.
"""

import argparse
import json
import math
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

ROOT = Path(__file__).resolve().parents[1]
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
VLLM = {
    **RECIPE,
    "model": {"shape": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}},
    "teacher": {"external": {"path": str(ROOT / "models/expr-base"), "engine": "vllm"}},
    "objective": [{"distill": "reverse_kl", "support": {"teacher_topk": {"k": 4, "tail": "bucket"}}}],
    "engine": {"kind": "vllm", "mode": "async", "restarts": 40, "deadline_seconds": 300},
    "asynchrony": {"max_staleness": 1},
    "learner": {"kind": "torch"},
}
del VLLM["launch"]
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


def victims_of(folder: Path, name: str, launcher: int) -> dict[int, str]:
    """pid -> role of what may be killed: everything, or with vLLM the driver, the actors and their engines."""
    alive, path = processes(folder), folder / "runs" / name / "status.json"
    if not name.startswith("vllm"):
        return alive
    roles = json.loads(path.read_text()).get("roles", {}) if path.is_file() else {}
    known = {one["pid"]: actor.removesuffix("-0") + " actor" for actor, one in roles.items() if one.get("pid")}
    found = {launcher: "driver"}
    for pid, command in commands(folder).items():
        if "VllmActor" in command:
            found[pid] = known.get(pid, "actor (starting)")
        elif "EngineCore" in command:
            found[pid] = known.get(parent_of(pid), "actor").removesuffix(" actor") + " engine"
    return found


def commands(folder: Path) -> dict[int, str]:
    """pid -> command line of every living process that works in `folder`: what Ray and vLLM start overwrites its environment with titles."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z" and os.readlink(entry / "cwd") == str(folder):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
    return found


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


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
    while (left := {**processes(folder), **commands(folder)}) and time.monotonic() < until:
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
            alive = victims_of(folder, name, launcher.pid)
            victim = dice.choice(sorted(alive))
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:  # it was just ending
                continue
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


def check(run: Path, undisturbed: Path, vllm: bool) -> None:
    """Raises AssertionError unless the ledger is whole and the model is the undisturbed one (with vLLM: its tokens and losses are)."""
    for name in ("ledger.jsonl", "metrics.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), f"{run.name}: {name} has steps twice or not at all"
        if name == "ledger.jsonl":
            assert [row["drawn"] for row in rows] == [PROMPTS * row["step"] for row in rows], f"{run.name}: prompts drawn twice or left out"
            assert rows == [json.loads(line) for line in (undisturbed / name).read_text().splitlines()], f"{run.name}: other prompts"
        elif vllm:
            for one, other in zip(rows, (json.loads(line) for line in (undisturbed / name).read_text().splitlines()), strict=True):
                assert one["tokens/student"] == other["tokens/student"], f"{run.name}: other answers in step {one['step']}"
                assert math.isclose(one["loss/total"], other["loss/total"], rel_tol=1e-3), f"{run.name}: another loss in step {one['step']}"
    if vllm:
        return
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (undisturbed / weights).read_bytes(), f"{run.name}: another model than that of the undisturbed run"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--engine", choices=("process", "vllm"), default="process")
    options.add_argument("--out", type=Path, help="default: kills.json or kills_vllm.json under benchmarks/results/")
    chosen = options.parse_args()
    vllm = chosen.engine == "vllm"
    out = chosen.out or Path(__file__).parent / "results" / ("kills_vllm.json" if vllm else "kills.json")
    dice, runs = random.Random(chosen.seed), []
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        folder = Path(scratch).resolve()
        (folder / "r.json").write_text(json.dumps(VLLM if vllm else RECIPE))
        disturbed(folder, f"undisturbed-{chosen.engine}", dice, 0)
        while (left := chosen.kills - sum(len(run["victims"]) for run in runs)) > 0:
            name = f"{chosen.engine}-{len(runs)}"
            runs.append(disturbed(folder, name, dice, left))
            check(folder / "runs" / name, folder / f"runs/undisturbed-{chosen.engine}", vllm)
            print(f"run {len(runs)}: {len(runs[-1]['victims'])} kills, ended as if nobody had been killed", flush=True)
            write(out, runs, chosen.seed)  # after every run: what was done stays, also when this is cut off


def write(out: Path, runs: list[dict[str, Any]], seed: int) -> None:
    roles = Counter(victim["role"] for run in runs for victim in run["victims"])
    result = {"kills": sum(roles.values()), "by_role": dict(sorted(roles.items())), "runs": runs, "seed": seed}
    result |= {"steps_a_run": STEPS, "machine": {"cpus": os.cpu_count(), "system": platform.platform()}, "date": time.strftime("%Y-%m-%d")}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
