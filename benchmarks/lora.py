"""LoRA against full fine-tuning: peak memory and seconds of one learner step, on a tiny and on a Qwen3-0.6B-shaped model.

python benchmarks/lora.py [SHAPE MODE] [--scale S]     # writes benchmarks/results/lora.json; without words: every shape and mode, one after the other

SHAPE is tiny or 0.6B, MODE full or lora (rank 16 on every linear layer). Each measurement is a process of its own: random weights in float32, the
plain torch learner's whole step (forward, backward, AdamW) on the same few answers under negative log-likelihood, after one step that allocates. Peak
memory is the process's largest resident size; what it had after the imports is given beside it.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from opd_rollout.types import Sampling
from transformers import AutoModelForCausalLM

from opd.build.shapes import shape_config
from opd.config.load import parse_recipe
from opd.learner.lora import add_lora
from opd.learner.torch_learner import torch_learner
from opd.learner.types import LearnerSettings, OptimizerSettings
from opd.objective import Setting, build_objective
from opd.source import dataset_completion
from opd.types import Judged, Prompt, Sample, Verdict

OUT = Path("benchmarks/results/lora.json")
MODEL = "Qwen/Qwen3-0.6B"
SHAPES = {"tiny": (0.125, 8, 64, 5), "0.6B": (1.0, 2, 64, 2)}  # scale of the model, answers, tokens of each, steps that are timed
RANK = 16


def resident() -> int:
    """Bytes, the largest so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def samples_of(answers: int, length: int, vocabulary: int) -> list[Sample]:
    """Answers of `length` tokens to prompts of half as many, random ids."""
    torch.manual_seed(0)
    found = []
    for n in range(answers):
        prompt_ids, ids = (tuple(torch.randint(vocabulary, (size,)).tolist()) for size in (length // 2, length))
        completion = dataset_completion(ids, Sampling(temperature=1.0, max_tokens=length, stop_ids=(0,)))
        judged = Judged(
            prompt=Prompt(id=str(n), messages=()), prompt_ids=prompt_ids, completion=completion, text="", verdict=Verdict(), group=n, member=0
        )
        found.append(Sample(judged=judged, scores={}, advantage={}, route={"nll": 1.0}))
    return found


def measure(shape: str, mode: str, scale: float | None) -> dict[str, object]:
    """One measurement, in this process."""
    before = resident()
    scaled, answers, length, steps = SHAPES[shape]
    config = shape_config(MODEL, scale or scaled)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    weights = sum(parameter.numel() for parameter in model.parameters())
    if mode == "lora":
        add_lora(model, rank=RANK, alpha=2.0 * RANK, targets="all-linear", seed=0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    recipe = parse_recipe({"objective": [{"nll": {}}], "rollout": {"source": {"dataset": "solution"}}})
    objective = build_objective(recipe.objective, Setting(signals=(), group=1, source="dataset", max_tokens=length)).at(0, {})
    learner = torch_learner(model, OptimizerSettings(lr=1e-5), LearnerSettings(token_budget=2 * length))
    samples, seconds = samples_of(answers, length, config.vocab_size), []
    for _ in range(steps + 1):
        started = time.perf_counter()
        report = learner.step(samples, objective, {})
        seconds.append(time.perf_counter() - started)
    assert not report.skipped
    return {
        "parameters": weights, "trained": trained, "tokens a step": answers * (length + length // 2),
        "seconds a step": round(statistics.median(seconds[1:]), 3), "steps timed": steps,
        "GiB before the model": round(before / 2**30, 2), "peak GiB": round(resident() / 2**30, 2), "loss": report.meters["loss/total"].mean,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--scale", type=float)
    given = parser.parse_args()
    if len(given.words) != 2:
        for shape in SHAPES:
            for mode in ("full", "lora"):
                subprocess.run([sys.executable, __file__, shape, mode], check=True)
        return
    shape, mode = given.words
    found = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    found |= {"command": "python benchmarks/lora.py", "date": str(date.today()), "rank": RANK, "learner": "torch, float32, AdamW",
              "machine": f"{os.cpu_count()} cores, no GPU, {torch.get_num_threads()} threads, Python {platform.python_version()}"}  # fmt: skip
    found.setdefault(shape, {})[mode] = measure(shape, mode, given.scale)
    if {"full", "lora"} <= found[shape].keys():
        full, lora = found[shape]["full"], found[shape]["lora"]
        above = [one["peak GiB"] - one["GiB before the model"] for one in (lora, full)]
        found[shape]["lora over full"] = {
            "seconds": round(lora["seconds a step"] / full["seconds a step"], 2), "peak memory above the imports": round(above[0] / above[1], 2)
        }  # fmt: skip
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found[shape], indent=1))


if __name__ == "__main__":
    main()
