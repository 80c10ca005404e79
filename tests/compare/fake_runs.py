"""Fabricated run folders: learning curves and answers with known parameters, in the files that training writes. Nothing here trains."""

import json
import math
import os
import zlib
from pathlib import Path

import numpy as np

from opd.accuracy import EvalResult, decoding_name, summarise, write_evaluation
from opd.config.load import load_recipe
from opd.run.folder import append_line, write_json

# arm -> (accuracy it tends to, generated tokens for 63 % of the way, teacher tokens a generated token, seconds a 1,000 generated tokens)
BEHAVIOUR = {
    "base": (0.42, 1e9, 0.0, 0.0),
    "sft": (0.74, 30_000, 0.0, 0.05),
    "grpo": (0.70, 90_000, 0.0, 0.25),
    "dr_grpo": (0.71, 85_000, 0.0, 0.25),
    "opd": (0.95, 16_000, 1.0, 0.42),
    "opsd": (0.93, 14_000, 1.6, 0.45),
    "opsd_ema": (0.935, 15_000, 1.6, 0.47),
    "opsd_live": (0.80, 12_000, 1.6, 0.45),
    "hybrid": (0.925, 22_000, 1.1, 0.48),
    "idle": (0.42, 1e9, 0.0, 0.25),
}
ARMS = ["base", "sft", "grpo", "opd", "opsd_ema", "opsd_live", "idle"]  # of the comparison that tests of the report share
START, TOKENS_PER_STEP = 0.42, 1_000


def arm_of(overrides):
    """Which behaviour the overrides name: the key `paper` carries it, because any text is legal there."""
    return overrides.get("paper", "base")


def true_accuracy(arm, tokens, seed, lr=3e-4):
    """Accuracy of an arm after so many generated tokens; collapses for opsd_live; best at lr 3e-4."""
    cap, tau, _, _ = BEHAVIOUR[arm]
    random = np.random.default_rng([seed, zlib.crc32(arm.encode())])
    mistuned = abs(math.log(lr / 3e-4)) / math.log(10)
    cap = START + (cap - START) * max(0.0, 1 - 0.6 * mistuned) + (0.02 * random.normal() if arm not in ("base", "idle") else 0.0)
    level = START + (cap - START) * (1 - math.exp(-tokens / (tau * math.exp(0.15 * random.normal()))))
    if arm == "opsd_live" and tokens > 40_000:
        level *= max(0.05, 1 - (tokens - 40_000) / 60_000)
    return min(0.985, max(0.01, level))


def fake_train(recipe, overrides, folder):
    """Stands in for opd.train: same arguments, same files, invented numbers."""
    return fabricate(Path(folder), recipe, dict(overrides), tokens=int(overrides.get("budget.generated_tokens", 100_000)))


def fake_evaluate(recipe, overrides, folder):
    """Stands in for the evaluation of an untrained model at several temperatures."""
    return fabricate(Path(folder), recipe, dict(overrides), tokens=0)


def failing_train(recipe, overrides, folder):
    """As fake_train, but one arm always fails and another one's process dies on one seed."""
    if arm_of(overrides) == "idle":
        raise RuntimeError("loss is not finite")
    if arm_of(overrides) == "hybrid" and overrides["seed"] == 1:
        os._exit(9)
    return fake_train(recipe, overrides, folder)


def fabricate(folder, recipe, overrides, *, tokens, problems=128):
    """Write a finished run folder for the arm that `overrides` name."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved, arm, seed = load_recipe(recipe, overrides), arm_of(overrides), overrides["seed"]
    lr = overrides.get("optimizer.lr", 3e-4)
    facts = {"schema_version": 1, "git_commit": "0" * 40, "packages": {"torch": "2.13.0"}, "created": "2030-01-02T03:04:05Z"}
    hardware = {"machine": "x86_64", "cpus": 2, "cpu": "An invented CPU"}
    write_json(folder / "resolved.json", {**facts, "recipe": resolved.model_dump(mode="json"), "hardware": hardware})
    random = np.random.default_rng([seed, zlib.crc32(arm.encode()), tokens])
    difficulty = np.random.default_rng(0).normal(0, 1.6, problems)
    for name in ("metrics.jsonl", "eval.jsonl", "guard.jsonl"):
        (folder / name).unlink(missing_ok=True)
    steps = tokens // TOKENS_PER_STEP
    every = max(1, steps // 12)
    curve = [_metrics(folder, arm, seed, lr, step, random, every, difficulty) for step in range(steps + 1)]
    if arm == "opsd_live" and tokens > 40_000:
        append_line(folder / "guard.jsonl", {"step": 70, "rule": "dev_fall", "action": "warn", "message": "dev accuracy 0.41, at best 0.79"})
    best = max((point for point in curve if point and (point[0] or not steps)), key=lambda point: point[1])
    if resolved.eval.final_problems:
        for temperature in resolved.eval.temperatures:
            level = true_accuracy(arm, best[0] * TOKENS_PER_STEP, seed, lr)
            _evaluate(folder, best[0], "test", temperature, _sharpened(level, temperature), difficulty, random)
            if not steps:
                _evaluate(folder, 0, "dev", temperature, _sharpened(level, temperature), difficulty, random)
    write_json(folder / "status.json", {"state": "finished", "step": steps, "steps": steps, "why": f"all {steps} steps done"})
    return folder


def _sharpened(level, temperature):
    return min(0.99, level + 0.10 * (1 - temperature) * (1 - level))


def _metrics(folder, arm, seed, lr, step, random, every, difficulty):
    level, generated = true_accuracy(arm, step * TOKENS_PER_STEP, seed, lr), step * TOKENS_PER_STEP
    if step:
        _, _, teacher, seconds = BEHAVIOUR[arm]
        append_line(
            folder / "metrics.jsonl",
            {
                "step": step,
                "version": step,
                "loss/total": 0.5 * math.exp(-step / 40) + 0.02 * random.random(),
                "accuracy/train": level,
                "length/mean": 12 + 3 * math.sin(step / 9) + random.random(),
                "length/truncated": 0.4 * (1 - level) ** 2,
                "entropy/student": 0.9 * (1 - level) + 0.02 * random.random(),
                "tokens/student": 0 if arm == "sft" else generated,  # references are not generated
                "tokens/teacher": teacher * generated,
                "tokens/learner": generated,
                "seconds/total": seconds * generated / 1_000,
            },
        )
    if step % every:
        return None
    return step, _evaluate(folder, step, "dev", 1.0, level, difficulty, random)


def _evaluate(folder, step, split, temperature, level, difficulty, random):
    k = 4 if split == "test" and temperature > 0 else 1
    logit = _shift_for(level, difficulty) + difficulty
    correct = random.random((len(difficulty), k)) < (1 / (1 + np.exp(-logit)))[:, None]
    lines = [
        {
            "problem": f"{split}-{p}",
            "sample": sample,
            "question": f"question {p}?",
            "text": "an invented answer",
            "answer": str(p) if correct[p, sample] else f"wrong {p % 3}",
            "expected": str(p),
            "status": "score",
            "reward": float(correct[p, sample]),
            "correct": bool(correct[p, sample]),
            "feedback": "",
            "domain": ("arithmetic", "algebra", "geometry")[p % 3],
            "difficulty": ("hard", "middle", "easy")[int(3 * (difficulty < difficulty[p]).mean() * 0.999)],
            "length": 12,
            "finish": "stop",
        }
        for p in range(len(difficulty))
        for sample in range(k)
    ]
    decoding = decoding_name(temperature)
    row = {"step": step, "suite": "fake", "split": split, "decoding": decoding, "temperature": temperature, **summarise(lines, k)}
    row |= {"tokens": 12 * len(lines), "seconds": 0.1}
    row["generations"] = f"generations/fake-{split}-{decoding.replace(' ', '-')}-step-{step:06d}.jsonl"
    write_evaluation(folder, EvalResult(row=row, generations=tuple(lines)))
    return row["avg@k"]


def _shift_for(level, difficulty):
    low, high = -12.0, 12.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 / (1 + np.exp(-(middle + difficulty)))).mean() < level else (low, middle)
    return low


def comparison_yaml(folder, arms, *, seeds=(0, 1, 2), tokens=100_000, tune=True, workers=2, name="fake"):
    """Write a recipe and a comparison over fabricated arms; returns the comparison's path."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    objective = [{"policy": "ppo_clip", "advantage": "group_centered"}]
    recipe.write_text(json.dumps({"data": {"task": "expr"}, "model": {"path": "models/fake"}, "group": 8, "objective": objective}))
    truncated = [{"distill": "reverse_kl", "support": {"student_topk": {"k": 16, "tail": "drop"}}, "allow": ["truncated_reverse_kl"]}]
    comparison = {
        "name": name,
        "title": "Invented numbers: RL and distillation on one budget",
        "description": "Fabricated run folders for looking at the page.",
        "arms": {
            arm: {"recipe": str(recipe), "set": {"paper": arm, **({"objective": truncated} if arm == "opsd_ema" else {})}, "train": arm != "base"}
            for arm in arms
        },
        "seeds": list(seeds),
        "budget": {"generated_tokens": tokens},
        "eval": {"num_problems": 128, "final_samples": 4},
        "baseline": "grpo",
        "target": 0.65,
        "workers": workers,
    }
    if tune:
        comparison["tune"] = {"grid": {"optimizer.lr": [1e-4, 3e-4, 1e-3, 3e-3]}, "seeds": [1000]}
    path = folder / "comparison.yaml"
    path.write_text(json.dumps(comparison))
    return path
