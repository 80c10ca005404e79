"""Bytes a token that a teacher behind vLLM sends, against K x (4 + 4); and memory while a learner is slow to take the scores.

python benchmarks/teacher_payload.py           # -> benchmarks/results/teacher_payload.json, and a table; about 2 minutes on 2 cores
"""

import argparse
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ray  # noqa: E402
from opd_rollout.types import ScoreRequest  # noqa: E402
from opd_rollout.vllm_cluster import ActorPlan, connect, start_actors  # noqa: E402
from opd_rollout.vllm_engine import EngineSettings, VllmEngine, _job  # noqa: E402
from opd_rollout.vllm_types import ModelFiles, RunnerSettings  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, CONTEXT, ANSWER = 32_000, 40, 120
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


def requests(number: int, k: int, dice: random.Random) -> list[ScoreRequest]:
    def ids(length: int) -> tuple[int, ...]:
        return tuple(dice.randrange(VOCABULARY) for _ in range(length))

    return [ScoreRequest(context_ids=ids(CONTEXT), completion_ids=ids(ANSWER), k=k) for _ in range(number)]


def wire_bytes(engine: VllmEngine, asked: list[ScoreRequest]) -> int:
    """Of one answer of the actor, as Ray serialises it."""
    handle, jobs = engine._pool.replicas[0].handle, [_job(request) for request in asked]
    scored = ray.get(handle.score.remote(jobs, 1.0, engine._parcel.stamp, VOCABULARY), timeout=300)
    return len(ray.cloudpickle.dumps(scored, protocol=5))


def private_mebibytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--slow", type=float, default=0.5, help="seconds that the learner takes over each batch")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/teacher_payload.json")
    options = parser.parse_args()
    os.chdir(ROOT)
    dice, rows, memory = random.Random(0), [], []
    with tempfile.TemporaryDirectory() as saved, start_actors([ActorPlan(role="teacher")]) as where:
        Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, max_position_embeddings=512, **SHAPE)).save_pretrained(saved)
        runner = RunnerSettings(mode="offline", dtype="float32", positions=256, max_logprobs=128)
        engine = VllmEngine(connect(where, "teacher"), ModelFiles(folder=saved), runner, EngineSettings(vocab_size=VOCABULARY, chunk=16))
        actor = ray.get(engine._pool.replicas[0].handle.pid.remote(), timeout=60)
        for k in (8, 32, 128):
            size = wire_bytes(engine, requests(16, k, dice)) / (16 * ANSWER)
            rows.append({"k": k, "bytes_a_token": size, "theory": 8 * k, "ratio": size / (8 * k)})
            print(f"K = {k}: {size:.0f} bytes a token, {size / (8 * k):.2f} of K x (4 + 4)")
        asked = requests(64, 128, dice)
        for call in range(options.calls):
            scores = engine.score(asked, 1.0)
            time.sleep(options.slow)  # the learner at work
            del scores
            if call % 5 == 4:
                memory.append({"calls": call + 1, "learner": round(private_mebibytes(os.getpid()), 1), "actor": round(private_mebibytes(actor), 1)})
        print(f"private MiB with a learner {options.slow} s behind each batch: first {memory[0]}, last {memory[-1]}")
    facts = {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "machine": platform.machine(), "vocabulary": VOCABULARY}
    options.out.write_text(json.dumps({**facts, "rows": rows, "private_mebibytes": memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
