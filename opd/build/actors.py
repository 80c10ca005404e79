"""From a recipe to its vLLM actors: the driver's side (which, on what) and a rank's side (engines and teachers over them)."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from opd_rollout.dispatch import Limits
from opd_rollout.engine import EngineLost
from opd_rollout.types import GenerateRequest, Sampling
from opd_rollout.vllm_cluster import ActorAddress, ActorPlan, check_installed, connect, start_actors
from opd_rollout.vllm_engine import EngineSettings, VllmEngine
from opd_rollout.vllm_types import ModelFiles, RunnerSettings
from opd_rollout.weight_sync import Canary
from transformers import PreTrainedTokenizerBase

from opd.build import pretrained
from opd.build.devices import visible_gpus
from opd.build.served import SUPPORT_LIMIT, WHOLE_VOCABULARY, check_served, tensor_parallel
from opd.build.student import served_positions, student_path
from opd.build.transfers import IPC, NCCL, make_transfer
from opd.config.recipe import Recipe
from opd.errors import RunFailed
from opd.launcher.ranks import Ranks
from opd.launcher.sweep import MARK, marked_processes
from opd.learner.types import Learner
from opd.learner.weights import FACTOR, whole_shape
from opd.objective.terms import SignalNeeds
from opd.teacher.score import Weights

Actors = ActorAddress | Mapping[str, Any]  # the launcher sends a mapping
STUDENT = "student"
CANARY_TOKENS = 16


def plans(recipe: Recipe, served: Mapping[str, str], gpus: Sequence[str]) -> list[ActorPlan]:
    """The actors of a recipe: the student's, and one for every teacher that vLLM serves (signal -> path). gpus: this machine's, in order.

    Colocated replicas share out the first ones. Raises ValueError for too few of those.
    """
    e, found, each = recipe.engine, [], recipe.engine.tensor_parallel if gpus else 0
    if e.kind == "vllm":
        shared = tuple(",".join(gpus[i * each : (i + 1) * each]) for i in range(e.replicas)) if e.placement == "colocated" and gpus else ()
        if shared and e.replicas * each > len(gpus):
            raise ValueError(
                f"engine.placement=colocated: {e.replicas} replicas on {each} GPUs each need {e.replicas * each} GPUs, and here are {len(gpus)}: "
                "lower engine.replicas or engine.tensor_parallel"
            )
        found.append(ActorPlan(role=STUDENT, replicas=e.replicas, gpus=each, restarts=e.restarts, shared_gpus=shared))
    return found + [ActorPlan(role=name, gpus=tensor_parallel(recipe, name) if gpus else 0, restarts=e.restarts) for name in served]


def learner_gpus(recipe: Recipe, gpus: Sequence[str]) -> int:
    """How many of this machine's GPUs the learner's ranks take, the first ones, with the actors that share them."""
    e, ranks = recipe.engine, 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else recipe.learner.ranks
    shared = e.replicas * e.tensor_parallel if e.kind == "vllm" and e.placement == "colocated" else 0
    return min(max(ranks, shared), len(gpus))


@contextmanager
def started(recipe: Recipe, served: Mapping[str, str], needs: Mapping[str, SignalNeeds]) -> Iterator[ActorAddress]:
    """The recipe's actors, started by this process, its driver; gone after the block, and soon after this process however it ends.

    served: signal -> path of the teachers behind vLLM; needs: what the objective asks of every signal. Raises ValueError for what the machine
    lacks, and for teachers that cannot deliver it.
    """
    check_placement(recipe)
    for name, path in served.items():
        check_served(recipe, name, path, needs.get(name, SignalNeeds()), on_gpu=bool(torch.cuda.device_count() or recipe.ray.address))
    gpus = visible_gpus()
    wanted, taken = plans(recipe, served, gpus), learner_gpus(recipe, gpus)
    short = "/tmp" if os.access("/tmp", os.W_OK) else None  # a socket's path has 107 bytes at most
    with tempfile.TemporaryDirectory(prefix="opd-ray-", dir=short, ignore_cleanup_errors=True) as scratch, marked_processes(Path(scratch)):
        options = {"address": recipe.ray.address, "gpus": gpus, "learner_gpus": taken, "folder": Path(scratch), "passed": {MARK: os.environ[MARK]}}
        with start_actors(wanted, **options) as where:
            yield where


def address_of(actors: Actors) -> ActorAddress:
    return actors if isinstance(actors, ActorAddress) else ActorAddress(**actors)


def check_placement(recipe: Recipe) -> None:
    """Raises ValueError for an engine that this machine or this recipe cannot have."""
    check_installed()
    e, has_gpus = recipe.engine, torch.cuda.is_available()
    if e.placement == "colocated" and not has_gpus:
        raise ValueError("engine.placement=colocated shares a GPU between learner and actors, and here is none: use engine.placement=separate")
    if e.transfer in (NCCL, IPC) and not has_gpus:
        raise ValueError(f"engine.transfer={e.transfer} sends from GPU to GPU, and here is none: use engine.transfer=shared_memory, or auto")
    if os.environ.get("DS_ACCELERATOR") == "cpu" and (e.transfer in (NCCL, IPC) or e.placement == "colocated"):
        raise ValueError(
            f"DS_ACCELERATOR=cpu keeps the learner off the GPUs, and engine.transfer={e.transfer} engine.placement={e.placement} needs it there: "
            "unset it, or use engine.transfer=shared_memory (or auto) with engine.placement=separate"
        )
    if e.kind == "vllm" and not Path(e.exchange).is_dir():
        raise ValueError(f"engine.exchange: {e.exchange} is no folder; name one in memory (/dev/shm) or on a disk, as large as the weights")
    if e.kind == "vllm" and recipe.rollout.sampler != "student":
        raise ValueError("rollout.sampler lets a teacher draw tokens, which vLLM cannot: use engine=torch, or rollout.sampler=student")


@contextmanager
def starting() -> Iterator[None]:
    """An engine that is lost before the run begins ends the command with a sentence. Raises RunFailed."""
    try:
        yield
    except EngineLost as lost:
        raise RunFailed(str(lost)) from lost


@starting()
def student_engine(
    recipe: Recipe,
    actors: Actors,
    model: torch.nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    learner: Learner,
    vocab_size: int,
    asked: Sequence[tuple[int, ...]],
    stop_ids: tuple[int, ...],
    check: Callable[[], None] | None,
    ranks: Ranks,
) -> VllmEngine:
    """The student's actors, with the learner's weights in them. asked: prompts of the canary that ends every weight update (none: a stop token)."""
    e, config, where = recipe.engine, model.config, address_of(actors)
    files = ModelFiles(config=json.dumps({**config.to_dict(), "architectures": [type(model).__name__]}, default=str))
    runner = _runner_settings(recipe, served_positions(recipe, config), -1 if vocab_size <= WHOLE_VOCABULARY else 20, e.tensor_parallel)
    if e.lora == "adapters":
        files, runner = ModelFiles(folder=student_path(recipe)), replace(runner, adapter=adapter_config(recipe, model))
        shapes = {name: tuple(whole_shape(parameter)) for name, parameter in model.named_parameters() if FACTOR in name}
    settings = EngineSettings(
        vocab_size=vocab_size, manifest=shapes, chunk=e.chunk, load_seconds=e.deadline_seconds, leads=ranks.leads, limits=_limits(recipe),
        in_flight=recipe.asynchrony.in_flight, resends=ranks.count == 1 and not recipe.asynchrony.max_staleness,
        tied="lm_head.weight" if getattr(config.get_text_config(), "tie_word_embeddings", False) else "", sleeps=e.placement == "colocated",
        user=f"{Path(where.exchange).name}/{ranks.rank}",
    )  # fmt: skip
    found, exchange = connect(where, STUDENT), Path(where.exchange or e.exchange)
    trainable = sum(whole_shape(parameter).numel() for parameter in model.parameters() if parameter.requires_grad)
    first, sending = ranks.rank % len(found), make_transfer(recipe, found, exchange, Path(where.exchange).name, ranks, trainable)
    turned = found[first:] + found[:first]  # ranks begin with different actors
    runner = replace(runner, transfer="" if runner.adapter else sending.backend)
    engine = VllmEngine(turned, files, runner, settings, transfer=sending.transfer, check=check, share=ranks.first)
    engine.route = sending.route
    sampling = Sampling(temperature=recipe.sampling.temperature, max_tokens=min(CANARY_TOKENS, recipe.sampling.max_tokens), stop_ids=stop_ids)
    engine.canary = Canary(
        requests=tuple(GenerateRequest(prompt_ids=prompt, seed=index) for index, prompt in enumerate(asked or [stop_ids[:1]])),
        sampling=sampling, reference=partial(learner.teacher_pass, weights="live"), limit_nats=e.audit_nats,
        collective=recipe.learner.zero_stage == 3,
    )  # fmt: skip
    engine.load_weights(learner.weights(learner.version))
    return engine


def adapter_config(recipe: Recipe, model: torch.nn.Module) -> str:
    """The adapter_config.json (peft) of the model's factors; vLLM reads rank, scale and the names of the adapted modules."""
    assert recipe.model.lora
    adapted = sorted({name.split(FACTOR)[0].rpartition(".")[2] for name, _ in model.named_parameters() if FACTOR in name})
    content = {"peft_type": "LORA", "r": recipe.model.lora.rank, "lora_alpha": recipe.model.lora.alpha, "target_modules": adapted}
    return json.dumps({**content, "bias": "none", "task_type": "CAUSAL_LM"})


@starting()
def served_teachers(
    recipe: Recipe,
    actors: Actors,
    served: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    check: Callable[[], None] | None,
) -> dict[str, Weights]:
    """Signal -> the scorer behind vLLM. Raises ValueError for a teacher whose tokens do not fit the recipe, or that vLLM cannot load."""
    found, vocab_size, temperature, where = {}, len(tokenizer), recipe.sampling.temperature, address_of(actors)
    for name, path in served.items():
        folder = pretrained.find_model(path)
        pretrained.check_same_tokens(tokenizer.get_vocab(), pretrained.load_tokenizer(folder).get_vocab(), path)
        positions = served_positions(recipe, pretrained.load_config(folder))
        runner = _runner_settings(recipe, positions, -1 if vocab_size <= WHOLE_VOCABULARY else SUPPORT_LIMIT, tensor_parallel(recipe, name))
        e = recipe.engine
        settings = EngineSettings(vocab_size=vocab_size, chunk=e.chunk, load_seconds=e.deadline_seconds, limits=_limits(recipe))
        engine = VllmEngine(connect(where, name), ModelFiles(folder=folder), runner, settings, check=check)
        found[name] = Weights(scores=partial(engine.score, temperature=temperature), actors=engine.status)
    return found


def _runner_settings(recipe: Recipe, positions: int, max_logprobs: int, num_shards: int) -> RunnerSettings:
    e, has_gpus = recipe.engine, torch.cuda.is_available()
    mode = e.mode if e.mode != "auto" else "async" if has_gpus or recipe.asynchrony.max_staleness else "offline"
    return RunnerSettings(
        mode=mode, dtype=recipe.model.dtype, positions=positions, max_logprobs=max_logprobs, tensor_parallel=num_shards, kv_bytes=e.kv_bytes,
        memory_share=e.memory_share, sleeps=e.placement == "colocated",
    )  # fmt: skip


def _limits(recipe: Recipe) -> Limits:
    e = recipe.engine
    return Limits(work_seconds=e.deadline_seconds, start_seconds=e.deadline_seconds, straggler_factor=e.straggler_factor)
