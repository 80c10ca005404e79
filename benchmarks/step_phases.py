"""Where a step's time goes, by phase, for three methods on the embedded task expr.

python benchmarks/step_phases.py               # -> benchmarks/results/step_phases.json, and a table
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import opd  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"eval.num_problems": 0, "eval.final_problems": 0, "checkpoint.every": 0, "track.wandb": "disabled", "track.samples_every": 0}


def phases(recipe: str, learner: str, steps: int) -> dict[str, float]:
    """Median milliseconds of every phase over the steps after the third."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = opd.train(f"recipes/runs/{recipe}.yaml", {**QUIET, "steps": steps, "learner.kind": learner}, Path(scratch) / "run", quiet=True)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][3:]
    names = [name for name in rows[0] if name.startswith("seconds/") and name != "seconds/total"]
    return {name.removeprefix("seconds/"): 1000 * statistics.median(row[name] for row in rows) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/step_phases.json")
    options = parser.parse_args()
    os.chdir(ROOT)
    table = {}
    for recipe in ("opsd_expr", "opd_expr", "grpo_expr"):
        for learner in ("torch", "deepspeed"):
            found = phases(recipe, learner, options.steps)
            table[f"{recipe}, {learner}"] = found
            total = found["step"]
            shares = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in found.items() if name != "step" and value / total > 0.01)
            print(f"{recipe}, {learner} learner: {total:.0f} ms a step: {shares}")
    facts = {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "machine": platform.machine(), "threads": 1, "milliseconds": table}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
