"""An arm from outside: supervised fine-tuning by trl's SFTTrainer on the same base, prompts and examinations.

In a comparison: `sft_trl: {recipe: recipes/runs/sft_expr.yaml, by: "opd.comparison.outside:train_sft", set: {steps: 60}}`.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from opd_rollout.types import ModuleWeights
from trl import SFTConfig, SFTTrainer
from trl.trainer.callbacks import TrainerCallback

from opd import api
from opd.build import pretrained
from opd.build.spending import num_devices, rates_of
from opd.build.student import student_path
from opd.build.system import Parts, build_parts
from opd.config.load import load_recipe
from opd.config.recipe import Recipe
from opd.eval import write_evaluation
from opd.run.folder import append_line, open_run
from opd.run.live import Status
from opd.run.spending import Spent, used_up
from opd.source import parse_source


def train_sft(recipe: str, overrides: Mapping[str, Any], folder: Path) -> Path:
    """Train the recipe's student with SFTTrainer and leave a run folder that `opd compare` reads; an unfinished one starts anew.

    Steps, batch (rollout.prompts), optimiser, schedule and clipping are the recipe's. Stops at its steps or its budget. Raises ValueError
    for a recipe whose prompts do not come from a dataset.
    """
    resolved = load_recipe(recipe, {**overrides, "track.wandb": "disabled", "learner.kind": "torch"})
    if api.finished(folder):
        return folder
    share, hint, *_ = parse_source(resolved.rollout.source)
    if share > 0 or not hint:
        raise ValueError(f"SFTTrainer learns from references: set rollout.source to {{dataset: HINT}}, not {resolved.rollout.source!r}")
    parts = build_parts(resolved)
    open_run(folder, resolved, api.facts(resolved, parts))
    for name in ("metrics.jsonl", "eval.jsonl"):
        (folder / name).unlink(missing_ok=True)
    model = pretrained.load_model(student_path(resolved))
    watch = _Watch(folder=folder, recipe=resolved, parts=parts, model=model)
    trainer = SFTTrainer(
        model=model,
        args=_arguments(resolved, folder),
        train_dataset=_references(resolved, parts, hint),
        processing_class=parts.tokenizer,
        callbacks=[watch.callback()],
    )
    watch.examine_dev(0)
    trainer.train()
    watch.finish()
    parts.learner.close()
    return folder


def _arguments(recipe: Recipe, folder: Path) -> SFTConfig:
    optimizer = recipe.optimizer
    return SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.rollout.prompts,
        learning_rate=optimizer.lr,
        lr_scheduler_type=optimizer.schedule if optimizer.warmup_steps == 0 or optimizer.schedule != "constant" else "constant_with_warmup",
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        max_grad_norm=optimizer.clip,
        max_length=None,
        completion_only_loss=True,
        include_num_input_tokens_seen="non_padding",
        seed=recipe.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=recipe.model.dtype == "bfloat16",
        gradient_checkpointing=recipe.model.gradient_checkpointing,
    )


def _references(recipe: Recipe, parts: Parts, hint: str) -> Dataset:
    """As many reference answers as all steps see, tokenised as our own training does; only completions carry loss."""
    rows = []
    for prompt in parts.problems.stream.take(recipe.steps * recipe.rollout.prompts):
        context = list(parts.encode(prompt))
        answer = parts.tokenizer(prompt.hints[hint], add_special_tokens=False)["input_ids"] + [parts.stop_ids[0]]
        rows.append({"input_ids": context + answer, "completion_mask": [0] * len(context) + [1] * len(answer)})
    return Dataset.from_list(rows)


@dataclass(slots=True, kw_only=True)
class _Watch:
    """Counts, examines and keeps the best weights while SFTTrainer trains."""

    folder: Path
    recipe: Recipe
    parts: Parts
    model: torch.nn.Module
    tokens: int = 0
    seconds: float = 0.0
    best: tuple[float, int] = (-1.0, 0)
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def callback(self) -> TrainerCallback:
        watch, status = self, Status(self.folder / "status.json", self.recipe.steps)

        class Callback(TrainerCallback):
            started = 0.0

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                Callback.started = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch.seconds += time.perf_counter() - Callback.started
                watch.step_done(state.global_step, int(state.num_input_tokens_seen))
                status.step(state.global_step)
                status.phase("learn")
                control.should_training_stop = control.should_training_stop or bool(watch.exhausted())

        return Callback()

    def exhausted(self) -> str:
        """Which of the recipe's stop rules has fired, or ""."""
        spent = Spent(learner=self.tokens, seconds=self.seconds, devices=num_devices(self.recipe), roles={"learner": self.seconds})
        return used_up(self.recipe.budget.limits(), spent, rates_of(self.recipe))

    def step_done(self, step: int, tokens: int) -> None:
        self.tokens = tokens
        row = {"tokens/student": 0, "tokens/teacher": 0, "tokens/learner": tokens, "seconds/total": self.seconds}
        append_line(self.folder / "metrics.jsonl", {"step": step, "version": step, **row})
        if self.recipe.eval.every and (step % self.recipe.eval.every == 0 or step == self.recipe.steps):
            self.examine_dev(step)

    def examine_dev(self, step: int) -> None:
        if not self.parts.problems.dev:
            return
        self._speak(step)
        result = api.examine(self.recipe, self.parts, self.parts.engine, "dev", self.parts.problems.dev, 1.0, self.recipe.eval.samples, step)
        write_evaluation(self.folder, result)
        if step and result.row["avg@k"] > self.best[0]:
            self.best = (result.row["avg@k"], step)
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def finish(self) -> None:
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)
        step = self.best[1] or self.recipe.steps
        self._speak(step)
        for temperature in self.recipe.eval.temperatures if self.parts.problems.test else ():
            problems, samples = self.parts.problems.test, self.recipe.eval.final_samples
            write_evaluation(self.folder, api.examine(self.recipe, self.parts, self.parts.engine, "test", problems, temperature, samples, step))
        Status(self.folder / "status.json", self.recipe.steps).write("finished", "trained by trl's SFTTrainer")

    def _speak(self, step: int) -> None:
        named = tuple((name, parameter.detach()) for name, parameter in self.model.named_parameters())
        self.parts.engine.load_weights(ModuleWeights(version=step, named=named))
