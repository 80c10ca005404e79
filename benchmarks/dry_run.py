"""Recipes at full shape with random weights: seconds and tokens/s by phase, and peak memory.

    python benchmarks/dry_run.py                                  # Qwen3-0.6B and 1.7B shapes on a GPU
    python benchmarks/dry_run.py --scale 0.05 --tokens 16 --out /tmp/try.json   # checks the script

Each is `opd train RECIPE model.init=random learner.kind=torch engine=torch` in a process of its own; the last of the steps counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import opd

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("opsd_qwen3_0.6b_gsm8k", "opsd_qwen3_1.7b_math")
PHASES = {"rollout": "tokens/student", "teacher": "tokens/teacher", "learn": "tokens/learner"}


def one(recipe: str, o: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = opd.train(
            f"recipes/runs/{recipe}.yaml",
            {
                "model.init": "random", "model.scale": o.scale, "model.lora": None, "learner.kind": "torch", "engine.kind": "torch", "steps": o.steps,
                "rollout.prompts": o.prompts, "group": 1, "sampling.max_tokens": o.tokens, "eval.num_problems": 0, "eval.final_problems": 0,
                "checkpoint.every": 0, "checkpoint.best": False, "track.wandb": "disabled", "track.samples_every": 0,
            },
            folder=Path(scratch) / "run",
        )  # fmt: skip
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last, before = rows[-1], rows[-2]
    found = {"recipe": recipe, "seconds_a_step": last["seconds/step"], "phases": {}}
    for phase, counter in PHASES.items():
        seconds, count = last[f"seconds/{phase}"], last[counter] - before[counter]
        found["phases"][phase] = {"seconds": seconds, "tokens": count, "tokens_per_second": count / seconds}
    found |= {name: last[name] for name in ("engine_gap_nats", "loss/total", "seconds/learn/gradient", "seconds/learn/update")}
    if torch.cuda.is_available():
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens an answer")
    parser.add_argument("--only", choices=RECIPES)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/dry_run.json")
    o = parser.parse_args()
    os.chdir(ROOT)
    if o.recipe:
        print(json.dumps(one(o.recipe, o)))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    facts = {"date": time.strftime("%Y-%m-%d"), "device": device, "torch": torch.__version__, "scale": o.scale, "steps": o.steps, "rows": []}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for recipe in [o.only] if o.only else RECIPES:
        command = [sys.executable, __file__, "--recipe", recipe]
        for name in ("scale", "steps", "prompts", "tokens"):
            command += [f"--{name}", str(getattr(o, name))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800, check=False)
        if done.returncode:
            facts["rows"].append({"recipe": recipe, "did_not_run": "\n".join(done.stderr.strip().splitlines()[-3:])})
        else:
            facts["rows"].append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(facts["rows"][-1], flush=True)
        o.out.parent.mkdir(parents=True, exist_ok=True)
        o.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
