"""The learner's part of one self-distillation step, ours against TRL's SDFTTrainer, on the same batch of tokens, without generation.

    python benchmarks/learner_step.py                                        # Qwen3-0.6B and 1.7B shapes on a GPU
    python benchmarks/learner_step.py --device cpu --scale 0.05 --completion 24 --out /tmp/try.json   # checks the script

Random weights of the true shape, bf16 compute with fp32 masters, AdamW, reverse KL over the full vocabulary to a frozen teacher that
reads a longer prompt. Timed: the teacher's pass, forward, backward, clipping and the update; median of the repeats after two. Memory: the
allocator's peak of a whole step, and what model, teacher and optimiser hold before it. Each side runs in a process of its own.
"""

import argparse
import cProfile
import json
import os
import pstats
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from opd_rollout.types import Completion

from opd.build.pretrained import new_model
from opd.build.shapes import shape_config, shape_tokenizer
from opd.learner.torch_learner import torch_learner
from opd.learner.types import LearnerSettings, OptimizerSettings
from opd.objective import build_objective, join
from opd.teacher.local import LocalTeacher, frozen_copy
from opd.teacher.score import SignalScorer, Weights
from opd.types import Judged, Prompt, Verdict

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
SHAPES = {"Qwen/Qwen3-0.6B": 16, "Qwen/Qwen3-1.7B": 16}  # sequences


def tokens(count: int, length: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(vocabulary) for _ in range(length)) for _ in range(count)]


def timed(step: Any, device: str, repeats: int) -> dict[str, Any]:
    """Median seconds of `step` and, on a GPU, memory before and at the peak."""
    seconds = []
    for turn in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
            if turn == 2:
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
        began = time.perf_counter()
        loss = step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    found = {"seconds": statistics.median(seconds[2:]), "all_seconds": seconds[2:], "loss": float(loss)}
    if device == "cuda":
        found |= {"held_gib": held / GIB, "peak_gib": torch.cuda.max_memory_allocated() / GIB}
    return found


def batch_of(o: argparse.Namespace, vocabulary: int) -> tuple[list[Judged], list[tuple[int, ...]]]:
    """Answers of random tokens, and the longer prompts that the teacher reads."""
    judged, views = [], []
    prompts, hints, answers = (tokens(o.sequences, n, vocabulary, seed) for seed, n in enumerate((o.prompt, o.hint, o.completion)))
    for n, (prompt, hint, answer) in enumerate(zip(prompts, hints, answers, strict=True)):
        done = Completion(
            token_ids=answer, logprobs=torch.zeros(len(answer)), loss_mask=torch.ones(len(answer), dtype=torch.bool), source="student",
            temperature=1.0, finish="length", versions=((0, 0, len(answer)),),
        )  # fmt: skip
        asked = Prompt(id=str(n), messages=({"role": "user", "content": "?"},))
        verdict = Verdict(reward=0.0, correct=False)
        judged.append(Judged(prompt=asked, prompt_ids=prompt, completion=done, text="", verdict=verdict, group=n, member=0))
        views.append((*hint, *prompt))
    return judged, views


def show_profiles(o: argparse.Namespace, step: Callable[[], float]) -> None:
    """On stderr, what --profile and --kernels ask for."""
    if o.profile:
        profile = cProfile.Profile()
        step()
        profile.runcall(step)
        pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(45)
    if o.kernels:
        step()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as kernels:
            step()
            torch.cuda.synchronize()
        print(kernels.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=70), file=sys.stderr)


def side_ours(o: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.bfloat16 if o.device == "cuda" else torch.float32
    vocabulary = len(shape_tokenizer(o.shape, o.scale))
    model = new_model(shape_config(o.shape, o.scale), 0, device=o.device, dtype=dtype, attn_implementation="sdpa")
    budget = o.sequences * (o.prompt + o.hint + o.completion)
    local = LocalTeacher(frozen_copy(model), temperature=1.0, token_budget=budget, vocab_size=vocabulary)
    settings = LearnerSettings(token_budget=budget, gradient_checkpointing=False)
    learner = torch_learner(model, OptimizerSettings(lr=1e-6), settings, vocab_size=vocabulary)
    objective = build_objective([{"distill": "reverse_kl", "support": "full"}])
    (signal,) = objective.needs.signals
    scorer = SignalScorer({signal: Weights(scores=local.scores, head=local.head)}, objective.needs.signals)
    judged, views = batch_of(o, vocabulary)
    parts: dict[str, list[float]] = {"teacher": [], "learn": []}

    def step() -> float:
        began = time.perf_counter()
        prepared = learner.prepare(judged, objective.needs)
        samples = join(judged, prepared, scorer.score(judged, {signal: views}, prepared), objective)
        parts["teacher"].append(time.perf_counter() - began)
        report = learner.step(samples, objective.at(learner.version, {}), scorer.heads())
        parts["learn"].append(time.perf_counter() - began - parts["teacher"][-1])
        for phase in ("pack", "gradient", "update"):
            parts.setdefault(phase, []).append(report.meters[f"seconds/learn/{phase}"].mean)
        return report.meters["loss/total"].mean

    show_profiles(o, step)
    found = timed(step, o.device, o.repeats)
    return found | {f"{name}_seconds": statistics.median(values[2:]) for name, values in parts.items()}


def side_trl(o: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset  # here, because ours runs without the peer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    tokenizer = shape_tokenizer(o.shape, o.scale)
    vocabulary, on_gpu = len(tokenizer), o.device == "cuda"
    model = new_model(shape_config(o.shape, o.scale), 0, device=o.device, dtype=torch.float32, attn_implementation="sdpa")
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}], "privileged_context": "!"}] * o.sequences)
    with tempfile.TemporaryDirectory() as folder:
        config = SDFTConfig(
            output_dir=folder, per_device_train_batch_size=o.sequences, num_generations=1, max_completion_length=o.completion, max_steps=1,
            distillation_mode="full_logits", distillation_alpha=1.0, teacher_model_kind="base", learning_rate=1e-6, weight_decay=0.0,
            lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=not on_gpu, bf16=on_gpu, seed=0, temperature=1.0,
            num_loss_tokens_to_skip=0, gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        model.save_pretrained(folder + "/base")  # the trainer loads its teacher from there
        model.config._name_or_path = folder + "/base"
        trainer = SDFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        trainer.create_optimizer()
        model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        model.train()
        trainer.current_gradient_accumulation_steps = 1
        ids = [torch.tensor(tokens(o.sequences, n, vocabulary, seed)) for seed, n in enumerate((o.prompt, o.hint, o.completion))]
        prompt, hint, answer = (one.to(trainer.accelerator.device) for one in ids)
        teacher = torch.cat([hint, prompt, answer], dim=1)
        batch = {
            "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": answer, "completion_mask": torch.ones_like(answer),
            "teacher_input_ids": teacher, "teacher_attention_mask": torch.ones_like(teacher),
        }  # fmt: skip

        def step() -> float:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, batch)
            trainer.accelerator.backward(loss)
            trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return timed(step, o.device, o.repeats)


def measured(o: argparse.Namespace, shape: str, side: str) -> dict[str, Any]:
    """One side in a process of its own; why it did not run, where it did not."""
    command = [sys.executable, __file__, "--side", side, "--shape", shape, "--sequences", str(o.sequences or SHAPES[shape])]
    for name in ("device", "scale", "prompt", "hint", "completion", "repeats"):
        command += [f"--{name}", str(getattr(o, name))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    if done.returncode:
        return {"did_not_run": "\n".join(done.stderr.strip().splitlines()[-3:])}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), help="one shape alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--sequences", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--hint", type=int, default=256, help="tokens that the teacher reads besides")
    parser.add_argument("--completion", type=int, default=512, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="with --side ours: Python's profile of a step, on stderr")
    parser.add_argument("--kernels", action="store_true", help="with --side ours: the GPU's kernels of a step, on stderr")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/learner_step.json")
    o = parser.parse_args()
    if o.side:
        print(json.dumps({"ours": side_ours, "trl": side_trl}[o.side](o)))
        return
    device = torch.cuda.get_device_name() if o.device == "cuda" else "CPU"
    facts = {"date": time.strftime("%Y-%m-%d"), "device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    setting = {name: getattr(o, name) for name in ("scale", "prompt", "hint", "completion", "repeats")}
    rows = []
    for shape in [o.shape] if o.shape else SHAPES:
        for side in ("ours", "trl"):
            found = measured(o, shape, side)
            rows.append({"shape": shape, "sequences": o.sequences or SHAPES[shape], "side": side} | found)
            print({name: value for name, value in rows[-1].items() if name != "all_seconds"}, flush=True)
            o.out.parent.mkdir(parents=True, exist_ok=True)
            o.out.write_text(json.dumps({**facts, "setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
