"""vLLM's log-probabilities of its own answers against the learner's: mean and 99.9th percentile of the difference in nats, fp32 and bf16.

python benchmarks/parity_vllm.py               # -> benchmarks/results/parity_vllm.json, and a table; about 3 minutes on 2 cores
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from opd_rollout.sampling import request_seed  # noqa: E402
from opd_rollout.types import GenerateRequest, Sampling, ScoreRequest  # noqa: E402

from opd.build.system import actors_of, build_parts  # noqa: E402
from opd.config.load import load_recipe  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/runs/opsd_expr.yaml"
CHANGES = {
    "engine.kind": "vllm", "learner.kind": "torch", "track.wandb": "disabled", "eval.num_problems": 4, "eval.final_problems": 0,
    "engine.audit_nats": 100.0, "model.path": "models/expr-base",
}  # fmt: skip


def differences(dtype: str, prompts: int) -> torch.Tensor:
    """|vLLM - learner| of every token that vLLM drew, nats."""
    recipe = load_recipe(RECIPE, {**CHANGES, "model.dtype": dtype})
    with actors_of(recipe) as actors:
        parts = build_parts(recipe, actors=actors)
        stream: Any = parts.problems.stream
        asked = [GenerateRequest(prompt_ids=parts.encode(p), seed=request_seed(3, p.id, 0, 0)) for p in stream.take(prompts)]
        drawn = parts.engine.generate(asked, Sampling(max_tokens=recipe.sampling.max_tokens, stop_ids=parts.stop_ids))
        wanted = [ScoreRequest(context_ids=r.prompt_ids, completion_ids=c.token_ids) for r, c in zip(asked, drawn, strict=True)]
        scores = parts.learner.teacher_pass(wanted, "live")
        parts.engine.close()
    return torch.cat([(c.logprobs.double() - s.sampled.double()).abs() for c, s in zip(drawn, scores, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/parity_vllm.json")
    options = parser.parse_args()
    os.chdir(ROOT)
    rows = []
    for dtype in ("float32", "bfloat16"):
        gap = differences(dtype, options.prompts)
        found = {"mean": gap.mean().item(), "p99.9": gap.quantile(0.999).item(), "max": gap.max().item()}
        rows.append({"dtype": dtype, "tokens": len(gap), "nats": found})
        print(f"{dtype}: {len(gap)} tokens, " + ", ".join(f"{name} {value:.2g}" for name, value in found.items()) + " nats")
    facts = {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "machine": platform.machine(), "model": CHANGES["model.path"]}
    options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
