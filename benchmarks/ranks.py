"""Two learner ranks with unequal work against one rank with all of it, at ZeRO 0 to 3: `python benchmarks/ranks.py`.

12 answers a step in groups of 4; rank 0 owns one group (1 or 2 micro-batches), rank 1 two (3 or 4). Written down: losses, their largest
relative difference to one rank's, and what a rank holds of masters, moments and averaged teacher (bytes; exact, not resident memory).
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["DS_ACCELERATOR"] = "cpu"

import torch  # noqa: E402

from opd.learner.deepspeed_learner import deepspeed_learner  # noqa: E402
from opd.learner.deepspeed_pieces import own_pieces  # noqa: E402
from tests.learner import cases  # noqa: E402
from tests.learner.rank import RATE, run  # noqa: E402

STEPS, TOKEN_BUDGET, DEADLINE_SECONDS = 5, 36, 300


def work(stage: int, out: Path) -> None:
    """One rank: trains and writes what it saw."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    options = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    learner = deepspeed_learner(
        cases.tiny_model(layers=4), RATE, cases.settings(ema_rate=0.1, token_budget=TOKEN_BUDGET), zero_stage=stage, zero_options=options
    )
    packed, gather = [], learner._updater.gather

    def counted(value: Any) -> list[Any]:
        packed.append(value) if isinstance(value, int) and not isinstance(value, bool) else None
        return gather(value)

    learner._updater.gather = counted
    started = time.perf_counter()
    reports = run(learner, cases.HYBRID, rank, world, steps=STEPS)
    seconds = time.perf_counter() - started
    pieces = own_pieces(learner._updater.module, stage, rank, learner._updater._own)
    states = {"masters": 0, "moments": 0, "average": sum(tensor.nbytes for tensor in learner._shadow.tensors.values())}
    for piece in pieces.values():
        for name, tensor in piece.states.items():
            states["masters" if name == "master" else "moments"] += tensor.nbytes
    micro_batches = packed[:STEPS]
    result = {"losses": cases.losses(reports), "bytes": states, "micro_batches": micro_batches, "seconds_a_step": seconds / STEPS}
    out.with_suffix(f".{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()


def launch(stage: int, world: int, folder: Path) -> list[dict[str, Any]]:
    """Every rank's result. Raises RuntimeError where one fails or is late."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = folder / f"zero{stage}-{world}"
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "rollout", "kernels"))
    shared = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["WORLD_SIZE"] = str(world)
    words = [sys.executable, "-W", "ignore", __file__, "--stage", str(stage), "--out", str(out)]
    ranks = []
    for rank in range(world):
        with out.with_suffix(f".{rank}.log").open("w") as log:
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
    try:
        for rank, process in enumerate(ranks):
            if process.wait(DEADLINE_SECONDS):
                raise RuntimeError(out.with_suffix(f".{rank}.log").read_text()[-2000:])
    finally:
        for process in ranks:
            process.kill()
    return [json.loads(out.with_suffix(f".{rank}.json").read_text()) for rank in range(world)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--stage", type=int, help="of a rank that this script has started")
    options.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ranks.json")
    chosen = options.parse_args()
    if chosen.stage is not None:
        work(chosen.stage, chosen.out)
        return
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        [alone] = launch(0, 1, Path(scratch))
        stages = {}
        for stage in range(4):
            pair = launch(stage, 2, Path(scratch))
            gap = max(abs(two - one) / abs(one) for one, two in zip(alone["losses"], pair[0]["losses"], strict=True))
            held = [rank["bytes"] for rank in pair]
            shares = [sum(one.values()) / sum(alone["bytes"].values()) for one in held]
            stages[f"zero_{stage}"] = {
                "losses": pair[0]["losses"], "largest_relative_difference": gap, "micro_batches": [rank["micro_batches"] for rank in pair],
                "bytes_by_rank": held, "share_of_one_rank": shares,
            }  # fmt: skip
            print(f"ZeRO {stage}: losses differ by {gap:.1e} at most, a rank holds {shares[0]:.2f} and {shares[1]:.2f} of what one rank holds")
    result = {"one_rank": alone, **stages, "machine": {"cpus": os.cpu_count(), "system": platform.platform()}, "date": time.strftime("%Y-%m-%d")}
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
