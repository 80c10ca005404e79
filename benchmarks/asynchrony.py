"""Asynchronous against synchronous: one engine process and one learner process, each pinned to a core of its own.

python benchmarks/asynchrony.py               # -> benchmarks/results/asynchrony.json, and a table; about 2 minutes on 2 cores
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from opd_rollout.replicas import Replicas  # noqa: E402

from opd import api  # noqa: E402
from opd.build import system as build  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/runs/opsd_expr.yaml"  # rollout takes about as long as teacher and update
QUIET = {
    "eval.num_problems": 0, "eval.final_problems": 0, "checkpoint.every": 0, "track.wandb": "disabled", "track.samples_every": 0,
    "guard.action": "off", "learner.kind": "torch", "engine.kind": "process",
}  # fmt: skip
WARM_UP = 3
make_engine = build.make_engine


def pinned(cores: Sequence[int]) -> Any:
    """make_engine, with every engine process on one of `cores` in turn."""

    def make(*arguments: Any) -> Any:
        engine = make_engine(*arguments)
        for index, one in enumerate(engine.engines if isinstance(engine, Replicas) else [engine]):
            os.sched_setaffinity(one.pid, {cores[index % len(cores)]})
        return engine

    return make


def run(changes: Mapping[str, Any], steps: int, engine_cores: Sequence[int]) -> list[dict[str, Any]]:
    """The metrics of a run's steps after the warm-up; this process, the learner, is on core 0."""
    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    build.make_engine = pinned(engine_cores)
    with tempfile.TemporaryDirectory() as scratch:
        folder = api.train(str(ROOT / RECIPE), {**QUIET, "steps": steps, **changes}, Path(scratch) / "run", quiet=True)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][WARM_UP:]


def step_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    return statistics.mean(row["seconds/step"] for row in rows)


def idle_share(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of the learner: what it waited for answers, over all its time."""
    return sum(row["seconds/rollout"] for row in rows) / sum(row["seconds/step"] for row in rows)


def facts() -> dict[str, Any]:
    return {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "machine": platform.machine(), "threads": 1, "recipe": RECIPE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/asynchrony.json")
    options = parser.parse_args()
    os.chdir(ROOT)
    kinds = {
        "synchronous": {},
        "max_staleness 1": {"asynchrony.max_staleness": 1},
        "max_staleness 1, in flight": {"asynchrony.max_staleness": 1, "asynchrony.in_flight": True},
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for _ in range(options.rounds):  # in turns, so that a slower minute meets all of them
        for name, changes in kinds.items():
            rows = run(changes, options.steps, [1])
            answers = statistics.mean(row.get("seconds/rollout/ahead", row["seconds/rollout"]) for row in rows)
            found[name].append({"step": step_seconds(rows), "idle": idle_share(rows), "rollout": answers})
    base = [one["step"] for one in found["synchronous"]]
    table = {}
    for name, runs in found.items():
        steps = [one["step"] for one in runs]
        ratios = [b / s for b, s in zip(base, steps, strict=True)]
        middle = {key: statistics.median(one[key] for one in runs) for key in ("step", "idle", "rollout")}
        table[name] = {**middle, "steps": steps, "speed_up": statistics.median(ratios), "speed_ups": ratios}
        print(
            f"{name}: {1000 * middle['step']:.0f} ms a step ({1000 * min(steps):.0f} to {1000 * max(steps):.0f}), learner idle "
            f"{100 * middle['idle']:.0f} %, answers {1000 * middle['rollout']:.0f} ms, {statistics.median(ratios):.2f} x the synchronous steps/s"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**facts(), "seconds": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
