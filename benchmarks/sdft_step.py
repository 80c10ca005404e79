"""One self-distillation step, ours against TRL's SDFTTrainer: same base, prompts, hints, batch, new tokens and divergence.

    python benchmarks/sdft_step.py                 # both sides, all bases, 3 rounds in turn -> benchmarks/results/sdft_step.json
    python benchmarks/sdft_step.py --rounds 1 --bases large --add    # one more round of one row, beside those that the results have

Each side runs in its own process with the machine's cores; the figure is the median wall time of steps 4.. and the process's peak resident memory.
Setting: frozen teacher that sees the facts, reverse KL over the full vocabulary, 32 prompts x 1 sample, at most 72 new tokens, AdamW lr 3e-4, plain
torch on both sides (TRL's trainer runs without DeepSpeed, so ours does), all else by default, but ours learns the embedded bases in micro-batches of
at most 768 tokens (the same gradient; in one pass a step takes about 3 % less and 110 MiB more). Bases: `long`, the embedded one with an
end of sequence that it never writes, so that all 32 answers have 72 tokens; `embedded`, the same, whose answers end after about 11; `large`, a
random model of its shape with 32,000 tokens, whose answers do not end either.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

import opd
from opd import loop
from opd.tasks import TASKS
from opd.tasks.types import HINT_TEMPLATES

ROOT = Path(__file__).resolve().parents[1]
BATCH, NEW_TOKENS, LEARNING_RATE = 32, 72, 3e-4
TOKEN_BUDGET = {"long": 768, "embedded": 768, "large": 16384}
LARGE_VOCABULARY = 32000
BASES = {"long": "embedded base, 72 new tokens", "embedded": "embedded base, answers that end", "large": "32,000 tokens, 72 new tokens"}


def make_base(kind: str, folder: Path) -> Path:
    """A folder of the model that `kind` (of BASES) names; the large one's tokenizer is filled up with unused tokens."""
    source = ROOT / "models/expr-base"
    if kind == "embedded":
        return source
    tokenizer = AutoTokenizer.from_pretrained(source)
    if kind == "long":
        tokenizer.eos_token = tokenizer.unk_token
        model = AutoModelForCausalLM.from_pretrained(source)
    else:
        set_seed(0)
        tokenizer.add_tokens([f"<unused{n}>" for n in range(LARGE_VOCABULARY - len(tokenizer))])
        config = AutoConfig.from_pretrained(source)
        config.vocab_size = LARGE_VOCABULARY
        model = AutoModelForCausalLM.from_config(config)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_trl(base: Path, steps: int) -> list[float]:
    """Seconds of every optimiser step of TRL's trainer."""
    from datasets import Dataset  # here, because its memory and the trainer's would be counted as ours
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    stream = TASKS["expr"].prompts("train", 0, TASKS["expr"].difficulties[0])
    prompts = [next(stream) for _ in range(BATCH * steps)]
    rows = [{"prompt": [dict(m) for m in p.messages], "privileged_context": p.hints["facts"]} for p in prompts]
    stamps: list[float] = []

    class Stamp(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            stamps.append(time.perf_counter())

        def on_train_end(self, args, state, control, **kwargs):
            stamps.append(time.perf_counter())

    template = HINT_TEMPLATES["facts"].replace("{hint}", "{privileged_context}").replace("{question}", "{prompt}")
    with tempfile.TemporaryDirectory() as output:
        config = SDFTConfig(
            output_dir=output, per_device_train_batch_size=BATCH, num_generations=1, max_completion_length=NEW_TOKENS, max_steps=steps,
            distillation_mode="full_logits", distillation_alpha=1.0, teacher_model_kind="base", learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", weight_decay=0.0, report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, bf16=False,
            teacher_prompt_template=template, disable_tqdm=True, seed=0, temperature=1.0,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        trainer = SDFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(base), callbacks=[Stamp()]
        )
        trainer.train()
    return [b - a for a, b in zip(stamps, stamps[1:], strict=False)]


def run_opd(base: Path, steps: int, token_budget: int) -> list[float]:
    """Seconds from the start of a step to that of the next, through the public entry point."""
    stamps: list[float] = []
    train_step = loop.train_step

    def stamped(step, system):
        stamps.append(time.perf_counter())
        return train_step(step, system)

    loop.train_step = stamped
    with tempfile.TemporaryDirectory() as output:
        opd.train(
            "recipes/runs/opsd_expr.yaml",
            {
                "model.path": str(base), "steps": steps, "rollout.prompts": BATCH, "group": 1, "sampling.max_tokens": NEW_TOKENS, "view": "facts",
                "teacher": "frozen", "objective": [{"distill": "reverse_kl", "support": "full"}], "optimizer.lr": LEARNING_RATE,
                "eval.num_problems": 0, "eval.final_problems": 0,
                "learner.kind": "torch", "learner.token_budget": token_budget,
                "checkpoint.every": 0, "checkpoint.best": False, "track.wandb": "disabled", "track.samples_every": 0,
            },
            folder=Path(output) / "run",
        )  # fmt: skip
    loop.train_step = train_step
    return [b - a for a, b in zip(stamps, stamps[1:], strict=False)]


def side(name: str, base: Path, steps: int, token_budget: int) -> dict[str, float]:
    """One measured process."""
    command = [sys.executable, __file__, "--side", name, "--base", str(base), "--steps", str(steps), "--token-budget", str(token_budget)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(base: str, steps: int, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """A row of the results: medians of both sides, and the median over the rounds of their ratio."""
    row: dict[str, Any] = {"base": base, "steps": steps, "rounds": rounds}
    for figure in ("seconds", "peak_mib"):
        row |= {f"{figure}_{name}": statistics.median(r[name][figure] for r in rounds) for name in ("trl", "opd")}
        row[f"{figure}_ratio"] = statistics.median(r["opd"][figure] / r["trl"][figure] for r in rounds)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of the embedded bases; the large vocabulary gets a third of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bases", nargs="*", choices=tuple(BASES), default=list(BASES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sdft_step.json")
    parser.add_argument("--add", action="store_true", help="keep the rows and rounds that --out holds, and add to them")
    parser.add_argument("--side", choices=("trl", "opd"))
    parser.add_argument("--base", type=Path)
    parser.add_argument("--token-budget", type=int)
    options = parser.parse_args()
    if options.side:
        more = (options.token_budget,) if options.side == "opd" else ()
        seconds = (run_trl if options.side == "trl" else run_opd)(options.base, options.steps, *more)
        status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory before exec
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
        print(json.dumps({"seconds": statistics.median(seconds[3:]), "peak_mib": peak}))
        return
    stored = json.loads(options.out.read_text())["rows"] if options.add and options.out.exists() else []
    table = {row["base"]: row for row in stored}
    for kind in options.bases:
        with tempfile.TemporaryDirectory() as scratch:
            base = make_base(kind, Path(scratch))
            steps = options.steps // 3 if kind == "large" else options.steps
            rounds = [{name: side(name, base, steps, TOKEN_BUDGET[kind]) for name in ("trl", "opd")} for _ in range(options.rounds)]
        name = BASES[kind]
        if name in table and table[name]["steps"] != steps:
            parser.error(f"{options.out} has rounds of {table[name]['steps']} steps for {name}; add more of the same number")
        table[name] = summary(name, steps, [*(table[name]["rounds"] if name in table else []), *rounds])
        print({k: v for k, v in table[name].items() if k != "rounds"})
    facts = {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "machine": platform.machine(), "rows": list(table.values())}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(ROOT / "benchmarks/__pycache__", ignore_errors=True)


if __name__ == "__main__":
    main()
