"""Arms from outside: trl's SFTTrainer and GRPOTrainer on the same base, prompts, verifier and examinations.

In a comparison (recipes/compare/trl_expr.yaml): `grpo_trl: {recipe: recipes/runs/grpo_expr.yaml, by: "opd.comparison.outside:train_grpo"}`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from opd_rollout.types import ModuleWeights
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
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
from opd.text import chat
from opd.types import Prompt
from opd.verify import judge_all

MOST_PROMPTS = 1_000_000


def train_sft(recipe: str, overrides: Mapping[str, Any], folder: Path) -> Path:
    """Train the recipe's student with SFTTrainer and leave a run folder that `opd compare` reads; an unfinished one starts anew.

    Steps, batch (rollout.prompts), optimiser, schedule and clipping are the recipe's. Stops at its steps or its budget. Raises ValueError
    for a recipe whose prompts do not come from a dataset.
    """
    resolved = _resolved(recipe, overrides)
    if api.finished(folder):
        return folder
    share, hint, *_ = parse_source(resolved.rollout.source)
    if share > 0 or not hint:
        raise ValueError(f"SFTTrainer learns from references: set rollout.source to {{dataset: HINT}}, not {resolved.rollout.source!r}")
    watch = _watch(resolved, folder, SFTTrainer)
    own = {"per_device_train_batch_size": resolved.rollout.prompts, "max_length": None, "completion_only_loss": True}
    trainer = SFTTrainer(
        model=watch.model,
        args=SFTConfig(**_shared(resolved, folder), **own, include_num_input_tokens_seen="non_padding"),
        train_dataset=_references(resolved, watch.parts, hint),
        processing_class=watch.parts.tokenizer,
        callbacks=[watch.callback()],
    )
    return _run(watch, trainer)


def train_grpo(recipe: str, overrides: Mapping[str, Any], folder: Path) -> Path:
    """Train the recipe's student with GRPOTrainer and leave a run folder that `opd compare` reads; an unfinished one starts anew.

    Prompts and their order, group, sampling, updates a batch, clip, optimiser, schedule and verifier are the recipe's; generation and loss are
    trl's. Stops at its steps or its budget, looked at after whole batches. Raises ValueError for another objective than the method grpo's.
    """
    resolved = _resolved(recipe, overrides)
    if api.finished(folder):
        return folder
    clip = _clip(resolved)
    watch = _watch(resolved, folder, GRPOTrainer, updates=resolved.updates.minibatches)
    trainer = GRPOTrainer(
        model=watch.model,
        reward_funcs=[_reward(watch)],
        args=GRPOConfig(**_shared(resolved, folder, watch.updates), **clip, **_sampling(resolved)),
        train_dataset=_prompts(watch),
        processing_class=watch.parts.tokenizer,
        callbacks=[watch.callback()],
    )
    return _run(watch, trainer)


def _resolved(recipe: str, overrides: Mapping[str, Any]) -> Recipe:
    return load_recipe(recipe, {**overrides, "track.wandb": "disabled", "learner.kind": "torch"})


def _watch(recipe: Recipe, folder: Path, trainer: type, updates: int = 1) -> "_Watch":
    """The run folder, opened anew, with a second copy of the student that trl trains."""
    parts = build_parts(recipe)
    open_run(folder, recipe, {**api.facts(recipe, parts), "trainer": f"TRL's {trainer.__name__}"})
    for name in ("metrics.jsonl", "eval.jsonl"):
        (folder / name).unlink(missing_ok=True)
    return _Watch(folder=folder, recipe=recipe, parts=parts, model=pretrained.load_model(student_path(recipe)), updates=updates)


def _run(watch: "_Watch", trainer: SFTTrainer | GRPOTrainer) -> Path:
    watch.examine_dev(0)
    trainer.train()
    watch.finish(type(trainer).__name__)
    watch.parts.learner.close()
    return watch.folder


def _shared(recipe: Recipe, folder: Path, updates: int = 1) -> dict[str, Any]:
    """Arguments of every trainer; `updates` optimiser steps are one of ours."""
    optimizer = recipe.optimizer
    return {
        "output_dir": str(folder / "trl"),
        "max_steps": recipe.steps * updates,
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": optimizer.schedule if optimizer.warmup_steps == 0 or optimizer.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": optimizer.warmup_steps,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "max_grad_norm": optimizer.clip,
        "seed": recipe.seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": recipe.model.dtype == "bfloat16",
        "gradient_checkpointing": recipe.model.gradient_checkpointing,
    }


def _clip(recipe: Recipe) -> dict[str, Any]:
    """GRPOTrainer's arguments for the recipe's objective. Raises ValueError where that is not the method grpo's."""
    found = list(recipe.objective)
    policy = found[0].get("policy") if len(found) == 1 else None
    clip = policy.get("ppo_clip") if isinstance(policy, Mapping) else None
    wanted = {"policy": policy, "advantage": {"group_centered": {"std": True}}, "reduce": "sequence_mean"}
    if not isinstance(clip, Mapping) or found[0] != wanted or recipe.rollout.filter != "none" or recipe.rollout.source != "student":
        raise ValueError(f"GRPOTrainer stands beside the method grpo, without a filter or another source of answers, not beside {recipe.objective}")
    return {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.0, "epsilon": clip["low"], "epsilon_high": clip["high"]}


def _sampling(recipe: Recipe) -> dict[str, Any]:
    answers, sampling = recipe.rollout.prompts * recipe.group, recipe.sampling
    return {
        "num_generations": recipe.group,
        "per_device_train_batch_size": answers // recipe.updates.minibatches,
        "steps_per_generation": recipe.updates.minibatches,
        "max_completion_length": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "shuffle_dataset": False,
    }


def _drawn(recipe: Recipe, parts: Parts, tokens: int = 0) -> list[Prompt]:
    """The prompts of all steps, in the order in which our own training draws them; a step samples `tokens` at least.

    Raises ValueError where nothing but seconds or the like bounds the steps: trl wants all of its data at once.
    """
    steps = recipe.steps
    if tokens and recipe.budget.generated_tokens:
        steps = min(steps, -(-recipe.budget.generated_tokens // tokens))
    if steps * recipe.rollout.prompts > MOST_PROMPTS:
        raise ValueError(f"trl wants all prompts at once, and {steps:,} steps are too many: give the arm as many as it may need, set: {{steps: 500}}")
    return parts.problems.stream.take(steps * recipe.rollout.prompts)


def _prompts(watch: "_Watch") -> Dataset:
    drawn = _drawn(watch.recipe, watch.parts, tokens=watch.recipe.rollout.prompts * watch.recipe.group)
    watch.prompts.update({prompt.id: prompt for prompt in drawn})
    return Dataset.from_list([{"prompt": [dict(message) for message in prompt.messages], "prompt_id": prompt.id} for prompt in drawn])


def _reward(watch: "_Watch") -> Callable[..., list[float]]:
    """The recipe's verifier as a reward function of trl's, which also counts what was generated."""

    def verifier(completion_ids: Sequence[Sequence[int]], prompt_id: Sequence[str], **_: Any) -> list[float]:
        watch.generated += sum(len(ids) for ids in completion_ids)
        texts = [chat.decode(watch.parts.tokenizer, ids) for ids in completion_ids]
        verdicts = judge_all(watch.parts.problems.verify, [(watch.prompts[name], text) for name, text in zip(prompt_id, texts, strict=True)])
        for name, verdict in zip(prompt_id, verdicts, strict=True):
            if verdict.status != "score":
                raise ValueError(f"GRPOTrainer wants a score of every answer; none for prompt {name!r}: {verdict.feedback or verdict.status}")
        return [verdict.reward for verdict in verdicts]

    return verifier


def _references(recipe: Recipe, parts: Parts, hint: str) -> Dataset:
    """As many reference answers as all steps see, tokenised as our own training does; only completions carry loss."""
    rows = []
    for prompt in _drawn(recipe, parts):
        context = list(parts.encode(prompt))
        answer = parts.tokenizer(prompt.hints[hint], add_special_tokens=False)["input_ids"] + [parts.stop_ids[0]]
        rows.append({"input_ids": context + answer, "completion_mask": [0] * len(context) + [1] * len(answer)})
    return Dataset.from_list(rows)


@dataclass(slots=True, kw_only=True)
class _Watch:
    """Counts, examines and keeps the best weights while a trainer of trl's works; `updates` of its steps are one of ours."""

    folder: Path
    recipe: Recipe
    parts: Parts
    model: torch.nn.Module
    updates: int
    prompts: dict[str, Prompt] = field(default_factory=dict)
    done: int = 0
    generated: int = 0
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
                if state.global_step % watch.updates:
                    return
                watch.step_done(state.global_step // watch.updates, int(state.num_input_tokens_seen))
                status.step(state.global_step // watch.updates)
                status.phase("learn")
                control.should_training_stop = control.should_training_stop or bool(watch.exhausted())

        return Callback()

    def exhausted(self) -> str:
        """Which of the recipe's stop rules has fired, or ""."""
        devices, roles = num_devices(self.recipe), {"learner": self.seconds}
        spent = Spent(student=self.generated, learner=self.tokens, seconds=self.seconds, devices=devices, roles=roles)
        return used_up(self.recipe.budget.limits(), spent, rates_of(self.recipe))

    def step_done(self, step: int, tokens: int) -> None:
        self.tokens, self.done = tokens, step
        row = {"tokens/student": self.generated, "tokens/teacher": 0, "tokens/learner": tokens, "seconds/total": self.seconds}
        append_line(self.folder / "metrics.jsonl", {"step": step, "version": step, **row})
        if self.recipe.eval.every and (step % self.recipe.eval.every == 0 or step == self.recipe.steps):
            self.examine_dev(step)

    def examine_dev(self, step: int) -> None:
        if not self.parts.problems.dev:
            return
        self._speak(step)
        result = api.examine(self.recipe, self.parts, self.parts.engine, "dev", self.parts.problems.dev, 1.0, self.recipe.eval.samples, step)
        write_evaluation(self.folder, result)
        accuracy = result.row["avg@k"]
        if step and accuracy is not None and accuracy > self.best[0]:
            self.best = (accuracy, step)
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def finish(self, trainer: str) -> None:
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)
        step = self.best[1] or self.recipe.steps
        self._speak(step)
        for temperature in self.recipe.eval.temperatures if self.parts.problems.test else ():
            problems, samples = self.parts.problems.test, self.recipe.eval.final_samples
            write_evaluation(self.folder, api.examine(self.recipe, self.parts, self.parts.engine, "test", problems, temperature, samples, step))
        status = Status(self.folder / "status.json", self.recipe.steps)
        status.step(self.done)
        status.write("finished", f"trained by TRL's {trainer}")

    def _speak(self, step: int) -> None:
        named = tuple((name, parameter.detach()) for name, parameter in self.model.named_parameters())
        self.parts.engine.load_weights(ModuleWeights(version=step, named=named))
