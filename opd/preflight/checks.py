"""What a user would want to be told of a recipe before it runs: one small function a subject, each gives findings."""

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.version import Version

from opd.build.fused import check_fused
from opd.build.pretrained import num_experts
from opd.build.served import tensor_parallel
from opd.config.choices import nearest
from opd.config.recipe import Recipe
from opd.launcher.machines import master_address
from opd.preflight.facts import Facts, Finding
from opd.preflight.memory import ALL_LINEAR, linear_names, untargeted
from opd.run.folder import check_run

TESTED = {"torch": ("2.11", "2.14"), "transformers": ("5.17", "6"), "deepspeed": ("0.19.8", "0.20"), "vllm": ("0.27", "0.33"), "ray": ("2.50", "3")}
"""Versions that the project was tested with: from, below."""


def error(sentence: str) -> Finding:
    return Finding(severity="error", sentence=sentence)


def warning(sentence: str) -> Finding:
    return Finding(severity="warning", sentence=sentence)


def note(sentence: str) -> Finding:
    return Finding(severity="note", sentence=sentence)


def sampling(facts: Facts) -> Iterator[Finding]:
    s, full = facts.recipe.sampling, facts.recipe.rollout.source == "student"
    if s.temperature == 0:
        yield error("sampling.temperature is 0: there is nothing to learn from greedy answers; greedy evaluation is eval.temperatures=[0]")
    if full and (s.top_p < 1 or s.top_k):
        yield warning(
            "sampling.top_p or top_k cuts the distribution that answers are drawn from, and the loss is over the whole one: "
            "the gradient is biased; use top_p=1 top_k=0 for training"
        )
    if 0 < s.temperature < 0.5:
        yield warning(f"sampling.temperature={s.temperature:g}: groups of answers will hardly differ; 0.6 to 1 is usual")


def lengths(facts: Facts) -> Iterator[Finding]:
    s, data = facts.recipe.sampling, facts.recipe.data
    positions = _positions(facts.config)
    if positions is not None and s.max_tokens >= positions:
        yield error(f"sampling.max_tokens={s.max_tokens} leaves no room for a prompt: the student has {positions} positions; lower it")
    room = data.max_prompt_tokens if positions is None else min(data.max_prompt_tokens, max(0, positions - s.max_tokens))
    if facts.prompt_lengths and max(facts.prompt_lengths) > room and "too_long" not in data.repair:
        over = sum(length > room for length in facts.prompt_lengths)
        yield error(
            f"{over} of the first {len(facts.prompt_lengths)} prompts are longer than {room} tokens (longest {max(facts.prompt_lengths)}): "
            "raise data.max_prompt_tokens within what the model allows, lower sampling.max_tokens, or data.repair=[too_long]"
        )
    if facts.text_lengths:
        cut = sum(length > s.max_tokens for length in facts.text_lengths) / len(facts.text_lengths)
        if cut > 0.1:
            texts = {"solution": "reference solutions", "demonstration": "demonstrations"}.get(facts.text, f"data's texts {facts.text!r}")
            yield warning(f"sampling.max_tokens={s.max_tokens} is shorter than {cut:.0%} of the {texts}: answers of that length are cut")
    for name, config in facts.teachers.items():
        limit = _positions(config)
        if limit is not None and facts.prompt_lengths and max(facts.prompt_lengths) + s.max_tokens > limit:
            yield error(f"signals.{name}: its model has {limit} positions, fewer than the longest prompt and sampling.max_tokens together")


def tokens(facts: Facts) -> Iterator[Finding]:
    tokenizer = facts.tokenizer
    if tokenizer is None:
        return
    if tokenizer.chat_template is None:
        yield error("the student's tokenizer has no chat template: use an instruction-tuned model, or put a chat_template into its folder")
    stops = facts.generation.eos_token_id if facts.generation else None
    stops = [stops] if isinstance(stops, int) else stops or []
    if tokenizer.eos_token_id is None and not stops:
        yield error("neither the tokenizer nor the generation config names an end-of-sequence token: no answer could end")
    if stops and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        yield warning(
            f"the tokenizer ends a sequence with {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), the generation config with {stops}: both stop"
        )
    if facts.config is not None:
        rows = facts.config.get_text_config().vocab_size
        if rows < len(tokenizer):
            yield error(f"the model's head has {rows} rows, fewer than the tokenizer's {len(tokenizer)} tokens: they do not belong together")
        elif rows > len(tokenizer):
            yield note(f"the head has {rows - len(tokenizer)} rows beyond the {len(tokenizer)} tokens: they get probability 0 everywhere")


def batch(facts: Facts) -> Iterator[Finding]:
    r = facts.recipe
    answers = r.rollout.prompts * r.group
    if answers % r.updates.minibatches:
        yield warning(f"{answers} answers a step do not divide into updates.minibatches={r.updates.minibatches}: the last is smaller")
    if r.updates.minibatches > answers:
        yield error(f"updates.minibatches={r.updates.minibatches} exceeds the {answers} answers of a step; lower it")
    longest = (max(facts.prompt_lengths) if facts.prompt_lengths else 0) + r.sampling.max_tokens
    if r.learner.token_budget < longest:
        yield warning(f"learner.token_budget={r.learner.token_budget} is less than the longest sequence ({longest}): such sequences go alone")
    if r.engine.token_budget < longest:
        yield warning(f"engine.token_budget={r.engine.token_budget} is less than one sequence ({longest}): answers are drawn one at a time")
    own_data = facts.problems and r.data.path and not r.data.stream and not facts.made_up
    if own_data and len(facts.problems.train) < r.rollout.prompts:
        yield warning(f"the data has {len(facts.problems.train)} prompts, fewer than rollout.prompts={r.rollout.prompts}: a step repeats some")
    if (
        facts.problems
        and r.data.path
        and not r.data.stream
        and not r.budget.limits()
        and r.steps * r.rollout.prompts > 20 * len(facts.problems.train)
    ):
        epochs = r.steps * r.rollout.prompts / len(facts.problems.train)
        yield warning(f"steps={r.steps} read the {len(facts.problems.train)} prompts {epochs:.0f} times over")


def schedule(facts: Facts) -> Iterator[Finding]:
    o, r = facts.recipe.optimizer, facts.recipe
    updates = r.steps * r.updates.minibatches * r.updates.epochs
    if o.warmup_steps >= updates:
        yield error(f"optimizer.warmup_steps={o.warmup_steps} is not below the {updates} updates of the run: the rate never reaches optimizer.lr")
    if r.model.lora is None and o.lr > 1e-3:
        yield warning(f"optimizer.lr={o.lr:g} is high for full fine-tuning; 1e-6 to 3e-5 is usual above 0.5B parameters, up to 3e-4 for tiny models")
    if r.model.lora is not None and o.lr < 2e-6:
        yield warning(f"optimizer.lr={o.lr:g} is low for LoRA; 5e-6 to 2e-4 is usual")
    for name, (kind, value) in facts.weights.items():
        rate = value if isinstance(value, float) else getattr(value, "rate", None)
        if kind == "ema" and rate == 1:
            yield warning(f"signals.{name}: an EMA rate of 1 is the live model; a live teacher can collapse")
        if kind == "ema" and rate == 0:
            yield warning(f"signals.{name}: an EMA rate of 0 never moves: `frozen` says so and costs no average")
        if kind == "live":
            yield warning(f"signals.{name}: a live teacher follows the student and can collapse with it; compare with frozen or an EMA")


def precision(facts: Facts) -> Iterator[Finding]:
    m = facts.recipe.model
    if m.dtype == "bfloat16" and not torch.cuda.is_available() and not facts.recipe.target.device:
        yield warning("model.dtype=bfloat16 on a CPU: log-probs are off by up to 1.5 nats in single tokens; use float32 here")
    if m.attention == "flash_attention_2" and _installed("flash_attn") is None:
        yield error("model.attention=flash_attention_2 needs the package flash-attn: pip install flash-attn, or model.attention=sdpa")
    if m.liger:
        try:
            check_fused("", planned=bool(facts.recipe.target.device))
        except ValueError as problem:
            yield error(str(problem))
    if m.lora is not None and _installed("peft") is None:
        yield error('model.lora needs peft: pip install "opd-train[train]"')


def adapters(facts: Facts) -> Iterator[Finding]:
    lora = facts.recipe.model.lora
    if lora is None or facts.config is None or lora.targets == ALL_LINEAR:
        return
    try:
        missing = untargeted(facts.config, lora.targets)
    except re.error as problem:
        yield error(
            f"model.lora.targets={lora.targets!r} is one text, so a pattern for whole names of layers, and not a valid one ({problem}); a list names"
        )
        return
    if "lm_head" in ([lora.targets] if isinstance(lora.targets, str) else lora.targets):
        yield error("model.lora.targets names lm_head: adapters on the head are not supported; leave it out")
    elif missing:
        known = linear_names(facts.config)
        yield error(
            f"model.lora.targets: the student has no linear layer {missing[0]!r}{nearest(missing[0], known)}; its layers: {', '.join(known)} "
            f"(a list of these, or {ALL_LINEAR})"
        )


def parallel(facts: Facts) -> Iterator[Finding]:
    e, r = facts.recipe.engine, facts.recipe
    shared = [("engine.tensor_parallel", e.tensor_parallel, "the student", facts.config)] if e.kind == "vllm" else []
    served = [name for name, (kind, _) in facts.weights.items() if kind == "served"]
    shared += [(f"signals.{name}: tensor_parallel", tensor_parallel(r, name), "the teacher", facts.teachers.get(name)) for name in served]
    for key, shards, whose, config in shared:
        heads = None if config is None else config.get_text_config().num_attention_heads
        if heads and heads % shards:
            fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            yield error(f"{key}={shards} does not divide {whose}'s {heads} attention heads: use one of {fits}")
    if r.learner.kind == "torch" and r.learner.zero_stage > 1:
        yield warning(
            f"learner.zero_stage={r.learner.zero_stage} is DeepSpeed's, and learner.kind is torch: it shards nothing; use learner.kind=deepspeed"
        )


def architecture(facts: Facts) -> Iterator[Finding]:
    if facts.config is None or not (experts := num_experts(facts.config)):
        return
    if facts.recipe.engine.kind == "vllm":
        yield error(f"the student is a mixture of {experts} experts, and routing replay is not supported: use engine=torch, or a dense model")
    else:
        yield warning(
            f"the student is a mixture of {experts} experts: its routing may change with the shape of a batch, so log-probs of rollout and learner "
            "may differ, and routing replay is not supported; never trained by the project"
        )


def objective(facts: Facts) -> Iterator[Finding]:
    if facts.objective is None:
        return
    if facts.objective.allowed:
        yield note(f"biased forms that the recipe allows: {', '.join(facts.objective.allowed)}")
    if facts.recipe.rollout.filter == "mixed_groups" and facts.recipe.group < 2:
        yield error("rollout.filter=mixed_groups with group=1: a group of one is never mixed, so every prompt would be dropped; raise group")
    external = [name for name, (kind, path) in facts.weights.items() if kind == "external" and name not in facts.teachers]
    for name in external:
        yield note(f"signals.{name}: its model could not be read, so its memory is not in the plan")


def evaluation(facts: Facts) -> Iterator[Finding]:
    ev = facts.recipe.eval
    if ev.num_problems == 0 and facts.recipe.checkpoint.best:
        yield note("eval.num_problems=0: no checkpoint can be chosen on dev, the last one is reported")
    if 0 < ev.final_problems < 100:
        yield warning(
            f"eval.final_problems={ev.final_problems}: the standard error of an accuracy near one half is {50 / ev.final_problems**0.5:.0f} points"
        )
    data = facts.recipe.data
    if facts.problems and data.path and not (data.eval_path or data.stream or facts.made_up) and len(facts.problems.train) < 200:
        yield note("few records: dev and test problems are held out from them; data.eval_path names a file of its own")


def machine(facts: Facts) -> Iterator[Finding]:
    for package, (lowest, below) in TESTED.items():
        found = _installed(package)
        if found is not None and not Version(lowest) <= Version(Version(found).base_version) < Version(below):
            yield warning(f"{package} {found} is outside the tested range ({lowest} to below {below})")
    port = os.environ.get("MASTER_PORT")
    if port and port.isdigit() and _taken("127.0.0.1", int(port)):
        yield error(f"MASTER_PORT={port} is taken by another process; choose a free one or unset it")
    launch = facts.recipe.launch
    if launch.nodes > 1 and not facts.recipe.target.device:
        try:
            host, number = master_address(launch.master)
            if launch.node_rank == 0 and _taken(host, number):
                yield error(f"launch.master={launch.master} is taken by another process; give a free port of machine 0")
        except ValueError as problem:
            yield error(str(problem))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        yield note(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set in this shell: a run started here would wait for other ranks")


def run_folder(recipe: Recipe) -> Iterator[Finding]:
    """Of the recipe as it was given: a run's folder keeps that."""
    if not recipe.name:
        return
    try:
        check_run(Path("runs") / recipe.name, recipe)
    except ValueError as problem:
        yield error(str(problem))


def disk(facts: Facts, needed: int, checkpoint: int) -> Iterator[Finding]:
    """needed: bytes of the run folder at its largest, of which each checkpoint takes `checkpoint`."""
    free = shutil.disk_usage(Path.cwd()).free
    if needed > free:
        kept = facts.recipe.checkpoint.keep + facts.recipe.checkpoint.best + 1
        yield (warning if facts.recipe.target.device else error)(
            f"{kept} checkpoints of {checkpoint / 2**30:.1f} GiB and the model do not fit the {free / 2**30:.1f} GiB that are free here; "
            "lower checkpoint.keep or run on a larger disk"
        )


def _positions(config) -> int | None:
    return None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _taken(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2.0)
        return probe.connect_ex((host, port)) == 0


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    sampling,
    lengths,
    tokens,
    batch,
    schedule,
    precision,
    adapters,
    parallel,
    architecture,
    objective,
    evaluation,
    machine,
)
