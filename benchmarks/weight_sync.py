"""A weight update of a vLLM actor on a CPU, against copying the same bytes once and vLLM's own reload of a folder; and memory over many updates.

python benchmarks/weight_sync.py               # -> benchmarks/results/weight_sync.json, and a table; about 4 minutes on 2 cores
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ray  # noqa: E402
from opd_rollout.shared_memory import num_bytes, remove, write  # noqa: E402

from opd.build.system import Parts, actors_of, build_parts  # noqa: E402
from opd.config.load import load_recipe  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/runs/opsd_expr.yaml"
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
CHANGES = {"engine.kind": "vllm", "learner.kind": "torch", "track.wandb": "disabled", "eval.num_problems": 4, "eval.final_problems": 0}


def sync(parts: Parts) -> None:
    """One update as a run makes it: written, loaded by the actor."""
    parts.learner.version += 1
    parts.engine.load_weights(parts.learner.weights(parts.learner.version))


def copy(parts: Parts, folder: Path) -> None:
    """The same bytes into a new file in memory, nothing else."""
    weights = parts.learner.weights(parts.learner.version)
    path = folder / "opd-copied"
    _, lock = write(path, weights.metadata(), weights.buckets())
    remove(path, lock)


def reload_from(actor: Any, saved: str) -> float:
    """Seconds that vLLM's reload_weights takes inside the actor."""

    def inside(self: Any) -> float:
        self._runner._llm.llm_engine.vllm_config.load_config.load_format = "safetensors"  # it was opened without weights
        started = time.perf_counter()
        self._runner._thread.submit(self._runner._llm.collective_rpc, "reload_weights", None, (), {"weights_path": saved}).result()
        return time.perf_counter() - started

    return ray.get(actor.__ray_call__.remote(inside), timeout=300)


def private_mebibytes(pid: int) -> float:
    """Memory of a process that nobody shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def timed(act: Callable[[], Any]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/weight_sync.json")
    options = parser.parse_args()
    os.chdir(ROOT)
    recipe = load_recipe(RECIPE, {**CHANGES, "model.path": "", "model.shape": SHAPE})
    with actors_of(recipe) as actors, tempfile.TemporaryDirectory() as saved:
        parts = build_parts(recipe, actors=actors)
        canary, parts.engine.canary = parts.engine.canary, None
        parts.learner.policy.model.save_pretrained(saved)
        actor, exchange = parts.engine._pool.replicas[0].handle, Path(recipe.engine.exchange)
        pids = {"learner": os.getpid(), "actor": ray.get(actor.pid.remote(), timeout=60)}
        size = num_bytes(parts.learner.weights(0).metadata())
        found: dict[str, list[float]] = {"sync": [], "copy": [], "reload": [], "with canary": []}
        for index in range(options.rounds + 1):  # in turns; the first round warms up
            row = {"sync": timed(lambda: sync(parts)), "copy": timed(lambda: copy(parts, exchange)), "reload": reload_from(actor, saved)}
            parts.engine.canary = canary
            row["with canary"] = timed(lambda: sync(parts))
            parts.engine.canary = None
            for name, value in row.items() if index else ():
                found[name].append(value)
        ratios = [s / (c + r) for s, c, r in zip(found["sync"], found["copy"], found["reload"], strict=True)]
        memory = []
        for index in range(options.updates + 1):
            if index % 20 == 0:
                memory.append({"updates": index, **{name: round(private_mebibytes(pid), 1) for name, pid in pids.items()}})
            sync(parts)
        parts.engine.canary = canary
        sync(parts)  # raises unless the actor still agrees with the learner
        gap = parts.engine.last_gap
        parts.engine.close()
    middle = {name: statistics.median(values) for name, values in found.items()}
    for name, value in middle.items():
        print(f"{name}: {1000 * value:.0f} ms ({1000 * min(found[name]):.0f} to {1000 * max(found[name]):.0f})")
    print(f"{size >> 20} MiB; sync over copy and reload: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"private MiB after {memory[1]['updates']} updates {memory[1]}, after {memory[-1]['updates']} {memory[-1]}")
    facts = {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "machine": platform.machine(), "threads": 1, "bytes": size}
    table = {"seconds": found, "ratios": ratios, "ratio": statistics.median(ratios), "private_mebibytes": memory, "nats_after": gap.mean}
    options.out.write_text(json.dumps({**facts, **table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
