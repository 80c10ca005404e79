"""From a recipe to a running system: the only module that knows every concrete class."""

import copy
import hashlib
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from opd_rollout.backbone import watch
from opd_rollout.engine import Engine
from opd_rollout.process_engine import ChildSettings, ProcessEngine
from opd_rollout.replicas import Replicas
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import Sampling
from transformers import PreTrainedTokenizerBase

from opd.build import pretrained
from opd.build.devices import chunk_bytes_of
from opd.build.problems import Problems, load_problems, without_long, without_long_ones
from opd.build.speaking import desk_of, drawn_with
from opd.build.stored import open_stores
from opd.build.student import external_model, load_model, load_tokenizer, pad_id, room_for_prompts, served_paths, smallest_room, student_path
from opd.build.views import FOREIGN, OTHERS, Source, aligned, checked_views, with_writers
from opd.config.load import recipe_hash
from opd.config.recipe import EMA, Recipe
from opd.contexts import SignalViews, prompt_context
from opd.data.stream import LazyStream
from opd.guard.rules import parse_rules
from opd.launcher.ranks import ALONE, Ranks
from opd.learner.torch_learner import torch_learner
from opd.learner.types import Learner, LearnerSettings, OptimizerSettings
from opd.objective import Objective, Setting, build_objective
from opd.prompts import check_dataset_hint, check_lengths
from opd.replay_buffer import parse_replay
from opd.run.training import NoSink, Sink
from opd.sampler import parse_sampler
from opd.source import Codec, RolloutSource, SourceSettings, parse_source
from opd.teacher.local import LocalTeacher, frozen_copy
from opd.teacher.score import SignalScorer, Weights
from opd.teacher.stored import with_stores
from opd.text import chat
from opd.types import Prompt, Verifier
from opd.verify.adapt import checked

CANARY_PROMPTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything that a run is made of, before the loop is closed around it."""

    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    num_parameters: int
    learner: Learner
    source: Source
    scorer: SignalScorer
    objective: Objective
    views: SignalViews
    problems: Problems
    encode: Callable[[Prompt], tuple[int, ...]]
    stop_ids: tuple[int, ...]


def build_parts(
    recipe: Recipe, *, verifier: Callable[..., Any] | None = None, check: Callable[..., None] | None = None, ranks: Ranks = ALONE, actors: Any = None
) -> Parts:
    """Models, engine, learner, teachers and data of a recipe. Raises ValueError for everything that could not work, before any step.

    ranks: who shares the prompts. check: called before every forward pass and verdict; may raise to end a long phase. actors: what
    `actors_of` started; without them everything is in this process and its children.
    """
    if recipe.sampling.temperature == 0:
        raise ValueError("sampling.temperature is 0: there is nothing to learn from greedy answers; greedy evaluation is eval.temperatures=[0]")
    parse_rules(recipe.guard.action, recipe.guard.rules)
    objective, choices = objective_of(recipe), {name: parse_weights(name, signal.weights) for name, signal in recipe.signals.items()}
    sampler = parse_sampler(recipe.rollout.sampler)
    problems = load_problems(recipe, verifier)
    mixture = parse_source(recipe.rollout.source)
    check_dataset_hint(problems.train if mixture.reads_data else (), mixture.hint)
    tokenizer = load_tokenizer(recipe, problems)
    specs = checked_views(recipe, problems, objective, choices)
    check_support_sizes(objective, len(tokenizer))
    model, encode = load_model(recipe, tokenizer), partial(_encode, tokenizer, recipe.data.thinking)
    distant = bool(actors) and recipe.engine.kind == "vllm"
    room = room_for_prompts(recipe, model.config, "the student", distant)
    problems = fitting(recipe, problems, encode, min(recipe.data.max_prompt_tokens, room))
    served = served_paths(recipe, choices) if actors else {}
    stores, loaded = open_stores(recipe, choices, objective, tokenizer)
    here = {name: kind for name, (kind, _) in choices.items() if name in loaded and name not in served}
    teachers = {n: external_model(choices[n][1], recipe, tokenizer, n, kind == FOREIGN) for n, kind in here.items() if kind in OTHERS}
    room_for_views = smallest_room(recipe, room, {name: teacher.config for name, teacher in teachers.items()}, served)
    if "frozen" in here.values() and recipe.model.lora is None:
        teachers |= dict.fromkeys([name for name, kind in here.items() if kind == "frozen"], frozen_copy(model))  # one copy under however many views
    spoken = frozen_copy(model) if speaks_apart(recipe) and not distant else model
    sent = shapes(model)
    if recipe.model.lora:
        add_adapters(model, recipe)
    learner, vocab_size = make_learner(recipe, model, tokenizer, average_of(choices), distant), len(tokenizer)
    stop_ids = chat.stop_ids(tokenizer, model.generation_config)
    asked = [encode(prompt) for prompt in problems.dev[:CANARY_PROMPTS]]
    if distant:
        engine = distant_engine(recipe, actors, model, sent, learner, vocab_size, asked, stop_ids, check, ranks)
    else:
        engine = make_engine(recipe, spoken, pad_id(tokenizer), vocab_size, check)
    verify = watched(problems.verify, {model, spoken, *teachers.values()}, check)
    reader = copy.deepcopy(tokenizer) if recipe.asynchrony.max_staleness else tokenizer  # two threads may not share one
    asks = partial(_encode, reader, recipe.data.thinking)
    codec = Codec(encode=asks, tokenize=partial(chat.tokenize, reader), decode=partial(chat.decode, reader), end=stop_ids[0])
    writer = engine if sampler is None else drawn_with(sampler, spoken, teachers, recipe, tokenizer)
    show = partial(prompt_context, reader, specs[mixture.view], room, codec.encode) if mixture.view else None
    source = RolloutSource(writer, problems.stream, verify, codec, sampling_of(recipe, stop_ids), source_settings(recipe, room), show, ranks.beside)
    source = with_writers(source, recipe, desk_of(engine, reader, room + recipe.sampling.max_tokens, stop_ids), reader, verify, choices, teachers)
    rows = {name: vocab_size if spec.tokenizer is None else len(spec.tokenizer) for name, spec in specs.items()}
    weights = {name: make_teacher(kind, recipe, learner, teachers.get(name), rows[name]) for name, kind in here.items()}
    weights |= {name: aligned(weights[name], tokenizer, spec.tokenizer) for name, spec in specs.items() if spec.tokenizer is not None}
    weights |= served_teachers(recipe, actors, served, tokenizer, check) if served else {}
    return Parts(
        tokenizer=tokenizer, engine=engine, learner=learner, source=source, objective=objective, encode=encode, stop_ids=stop_ids,
        num_parameters=sum(parameter.numel() for parameter in spoken.parameters()),
        scorer=SignalScorer(with_stores(weights, stores), objective.needs.signals),
        views=SignalViews(tokenizer, specs, room_for_views, {name: signal.domain for name, signal in recipe.signals.items()}),
        problems=replace(problems, verify=verify),
    )  # fmt: skip


def fitting(recipe: Recipe, problems: Problems, encode: Callable[[Prompt], tuple[int, ...]], longest: int) -> Problems:
    """The problems whose prompts fit. Raises ValueError for longer ones, unless the recipe leaves such training prompts out."""
    if "too_long" in recipe.data.repair and isinstance(problems.stream, LazyStream):
        problems = without_long_ones(problems, copy.deepcopy(encode), longest)
    elif "too_long" in recipe.data.repair:
        problems = without_long(problems, {prompt.id: len(encode(prompt)) for prompt in problems.train}, longest, recipe.seed)
    check_lengths([*problems.dev, *problems.test, *problems.train], encode, longest)
    return problems


def watched(verify: Verifier, modules: Collection[torch.nn.Module], check: Callable[..., None] | None) -> Verifier:
    """The verifier, and the modules' forward passes, with `check` asked before each."""
    if check is None:
        return verify
    for module in modules:
        watch(module, check)
    return checked(verify, check)


def make_engine(recipe: Recipe, model: torch.nn.Module, pad: int, vocab_size: int, check: Callable[..., None] | None) -> Any:
    """The engine around the module, in this process or, as copies, in processes of its own."""
    e, chunk_bytes = recipe.engine, chunk_bytes_of(recipe)
    if e.kind != "process":  # vLLM without its actors (opd eval, opd replay): the same weights speak here
        return TorchEngine(model, pad_id=pad, token_budget=e.token_budget, chunk_bytes=chunk_bytes, vocab_size=vocab_size)
    settings = ChildSettings(
        pad_id=pad, token_budget=e.token_budget, chunk_bytes=chunk_bytes, vocab_size=vocab_size, in_flight=recipe.asynchrony.in_flight
    )
    options = {"stall_seconds": e.stall_seconds} | ({} if check is None else {"check": check})
    model = model.cpu()  # its own copy; a child of the fork server shares the host's memory
    engines = [ProcessEngine(model, settings, **options) for _ in range(e.replicas)]
    return engines[0] if len(engines) == 1 else Replicas(engines)


def speaks_apart(recipe: Recipe) -> bool:
    """Whether the engine has weights of its own: a sharded student cannot speak, and another process cannot share the learner's."""
    return is_sharded(recipe) or recipe.engine.kind != "torch"


def is_sharded(recipe: Recipe) -> bool:
    """Whether the learner keeps the student's weights in pieces (ZeRO 3)."""
    return recipe.learner.zero_stage == 3 and learner_kind(recipe) == "deepspeed"


def objective_of(recipe: Recipe) -> Objective:
    """The recipe's objective, judged legal against its signals, group and source."""
    return build_objective(recipe.objective, setting_of(recipe), recipe.controllers)


def setting_of(recipe: Recipe) -> Setting:
    """What the rest of a recipe says to its objective."""
    mixture = parse_source(recipe.rollout.source)
    sampled_in = None if mixture.student == 1 or not mixture.view else mixture.view if mixture.student == 0 else f"{mixture.view}, in part"
    return Setting(
        signals=tuple(recipe.signals), group=recipe.group, max_tokens=recipe.sampling.max_tokens, sampled_in=sampled_in,
        source="revised" if recipe.rollout.revise else mixture.kind,
        sampler=recipe.rollout.sampler != "student", max_staleness=recipe.asynchrony.max_staleness,
        max_age=recipe.rollout.replay.max_age if recipe.rollout.replay else 0,
    )  # fmt: skip


def add_adapters(model: torch.nn.Module, recipe: Recipe) -> None:
    """LoRA factors into the model; everything else is frozen."""
    from opd.learner.lora import add_lora

    assert recipe.model.lora
    lora = recipe.model.lora
    add_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=recipe.seed)


def make_learner(recipe: Recipe, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, average: EMA | None, distant: bool = False) -> Learner:
    """The learner that the recipe names; "auto" is deepspeed where it imports."""
    o, le, updates = recipe.optimizer, recipe.learner, recipe.updates
    optimizer = OptimizerSettings(
        lr=o.lr, schedule=o.schedule, warmup_steps=o.warmup_steps, weight_decay=o.weight_decay, betas=o.betas, clip=o.clip,
        total_steps=recipe.steps * updates.minibatches * updates.epochs,
    )  # fmt: skip
    settings = LearnerSettings(
        temperature=recipe.sampling.temperature, token_budget=le.token_budget, packed=le.packed, pad_id=pad_id(tokenizer),
        chunk_bytes=chunk_bytes_of(recipe), minibatches=updates.minibatches, epochs=updates.epochs, ema_rate=average and average.rate,
        ema_every=average.every if average else 1, gradient_checkpointing=recipe.model.gradient_checkpointing,
        merge_adapters=speaks_apart(recipe), adapters_alone=distant and recipe.engine.lora == "adapters",
        shard_bytes=recipe.checkpoint.shard_mib << 20,
    )  # fmt: skip
    if learner_kind(recipe) == "torch":
        return torch_learner(model, optimizer, settings, vocab_size=len(tokenizer))
    from opd.learner.deepspeed_learner import OFFLOADED, deepspeed_learner

    options = {"vocab_size": len(tokenizer), "zero_stage": le.zero_stage, "zero_options": OFFLOADED if le.offload else {}}
    return deepspeed_learner(model, optimizer, settings, **options)


def learner_kind(recipe: Recipe) -> str:
    """ "torch" or "deepspeed"; ValueError names the extra to install where deepspeed was asked for and is missing."""
    if recipe.learner.kind == "torch":
        return "torch"
    if find_spec("deepspeed"):
        return "deepspeed"
    if recipe.learner.kind == "deepspeed":
        raise ValueError('learner.kind is deepspeed, which is not installed: pip install "opd-train[train]", or learner.kind=torch')
    return "torch"


def parse_weights(name: str, choice: Any) -> tuple[str, Any]:
    """(kind, value) of a signal's weights: live, frozen, ema with its rate, external with its path. Raises ValueError for anything else."""
    forms = "live | frozen | {ema: {rate: 0.05, every: 1}} | {external: {path: FOLDER}} (also engine: torch | vllm, tensor_parallel, tokenizer: own)"
    kind, given = (choice, {}) if isinstance(choice, str) else next(iter(choice.items())) if len(choice) == 1 else ("", None)
    given = given or {}
    if kind in ("live", "frozen") and not given:
        return kind, None
    if kind == "ema" and isinstance(given, Mapping) and set(given) <= {"rate", "every"}:
        rate, every = given.get("rate", 0.05), given.get("every", 1)
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate <= 1:
            raise ValueError(f"signals.{name}.weights: the EMA rate is {rate!r}; it must be a number from 0 (never moves) to 1 (the live weights)")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"signals.{name}.weights: the EMA moves every {every!r} rollout steps; it must be a whole number of at least 1")
        return kind, EMA(rate=rate, every=every)
    if kind == "external" and isinstance(given, Mapping) and set(given) <= {"path", "engine", "tokenizer", "tensor_parallel"}:
        if given.get("engine", "torch") not in ("torch", "vllm"):
            raise ValueError(f"signals.{name}.weights: the teacher's engine is {given['engine']!r}; use torch (in the learner's process) or vllm")
        shards = given.get("tensor_parallel", 1)
        if type(shards) is not int or shards < 1 or ("tensor_parallel" in given and given.get("engine") != "vllm"):
            raise ValueError(f"signals.{name}: tensor_parallel is a whole number of GPUs, at least 1, that share a teacher with engine: vllm")
        if given.get("tokenizer", "own") != "own":
            raise ValueError(f"signals.{name}: tokenizer is {given['tokenizer']!r}; write tokenizer: own, or leave it out")
        if "tokenizer" in given and given.get("engine") == "vllm":
            raise ValueError(f"signals.{name}: a teacher with a tokenizer of its own is scored in this process: leave out engine: vllm")
        if isinstance(given.get("path"), str) and given["path"]:
            return FOREIGN if "tokenizer" in given else "served" if given.get("engine") == "vllm" else kind, given["path"]
        key = "teacher" if name == "main" else f"signals.{name}.weights"
        raise ValueError(
            f"signals.{name}: an external teacher needs a model: {key}.external.path=FOLDER (or {{external: {{path: FOLDER}}}}). Without one: "
            "a method whose teacher is the student itself, shown more (opsd, sdft, sdpo), or one that has no teacher (grpo, sft)"
        )
    raise ValueError(f"signals.{name}.weights is {choice!r}; write {forms}")


def average_of(choices: Mapping[str, tuple[str, Any]]) -> EMA | None:
    """How the recipe's averaged teacher moves, None without one. Raises ValueError for two different averages."""
    averages = {value for kind, value in choices.values() if kind == "ema"}
    if len(averages) > 1:
        found = ", ".join(sorted(f"rate {a.rate} every {a.every}" for a in averages))
        raise ValueError(f"signals use several EMA rates or periods ({found}); the learner keeps one average")
    return averages.pop() if averages else None


def make_teacher(kind: str, recipe: Recipe, learner: Learner, module: torch.nn.Module | None, vocab_size: int) -> Weights:
    """The scorer of a signal: the student's weights live, averaged or without adapters; a frozen copy; or another model."""
    if module is None:
        weights = {"live": "live", "ema": "ema", "frozen": "adapter_off"}[kind]
        return Weights(scores=partial(learner.teacher_pass, weights=weights), head=partial(learner.head, weights))
    le, temperature = recipe.learner, recipe.sampling.temperature
    budget = 2 * le.token_budget  # a token that is only scored holds less than half of what one that is learned from holds
    teacher = LocalTeacher(
        module, temperature=temperature, token_budget=budget, chunk_bytes=chunk_bytes_of(recipe), packed=le.packed, vocab_size=vocab_size
    )
    return Weights(scores=teacher.scores, head=teacher.head)


def model_folders(recipe: Recipe) -> list[str]:
    """The student's folder (or "") and those of other teachers; hub names stay as they are. Raises ValueError for a folder that is not there."""
    paths = [value for name, signal in recipe.signals.items() for kind, value in [parse_weights(name, signal.weights)] if kind in OTHERS]
    return [student_path(recipe), *map(pretrained.find_model, paths)]


def input_facts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Hashes of what the run starts from, compared when it is resumed."""
    files = [path for path in (recipe.data.path, recipe.data.eval_path) if path]
    made_up = recipe.model.init == "random"  # nothing is asked of the hub then
    return {
        "learner": learner_kind(recipe),
        "template_hash": template_hash(tokenizer),
        "data_hash": pretrained.content_hash(recipe_hash(recipe.data), files, [recipe.data.path] * recipe.data.stream),
        "model_hash": pretrained.fingerprint([folder for folder in model_folders(recipe) if folder and not (made_up and not Path(folder).is_dir())]),
    }


def distant_engine(*arguments: Any) -> Engine:
    """See opd.build.actors.student_engine; Ray is imported only here."""
    from opd.build.actors import student_engine

    return student_engine(*arguments)


def served_teachers(*arguments: Any) -> dict[str, Weights]:
    """See opd.build.actors.served_teachers."""
    from opd.build.actors import served_teachers as serve

    return serve(*arguments)


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that an engine of its own will be sent, tied ones once; before adapters and shards change the names."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def actors_of(recipe: Recipe) -> AbstractContextManager[Any]:
    """The vLLM actors that a recipe asks for, started by this process and gone after the block; None for one that asks for none.

    Raises ValueError where vLLM or Ray is not installed, or the machine lacks what they need.
    """
    choices = {name: parse_weights(name, signal.weights) for name, signal in recipe.signals.items()}
    served = served_paths(recipe, choices)
    if recipe.engine.kind != "vllm" and not served:
        return nullcontext()
    if missing := [name for name in ("ray", "vllm") if not find_spec(name)]:
        raise ValueError(
            f'engine=vllm needs {" and ".join(missing)}, which is not installed: pip install "opd-train[gpu]", or on a machine without a GPU '
            '"opd-train[cpu]"; engine=torch needs neither'
        )
    from opd.build.actors import started

    return started(recipe, served, objective_of(recipe).needs.signals)


def check_support_sizes(objective: Objective, vocab_size: int) -> None:
    """Raises ValueError for a support larger than the vocabulary."""
    for term in objective.terms:
        if term.support and (term.support.by_student or term.support.kind == "teacher_topk") and term.support.k > vocab_size:
            raise ValueError(
                f"term {term.name!r}: support k is {term.support.k} but the vocabulary has {vocab_size} tokens; "
                f"lower objective support k to at most {vocab_size}, or use support: full"
            )


def sampling_of(recipe: Recipe, stop_ids: tuple[int, ...]) -> Sampling:
    s = recipe.sampling
    return Sampling(temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, max_tokens=s.max_tokens, stop_ids=stop_ids)


def source_settings(recipe: Recipe, room: int) -> SourceSettings:
    mixture, r = parse_source(recipe.rollout.source), recipe.rollout
    return SourceSettings(
        num_prompts=r.prompts, group=recipe.group, seed=recipe.seed, student_share=mixture.student, dataset_hint=mixture.hint,
        view=mixture.view, paired=mixture.paired, schedule=mixture.schedule, filter=r.filter,
        max_refill=r.max_refill, overlong=r.overlong, max_prompt_tokens=min(recipe.data.max_prompt_tokens, room),
        replay=parse_replay(**r.replay.model_dump()) if r.replay else None,
    )  # fmt: skip


def check_tracking(wanted: str) -> None:
    """Raises ValueError for W&B without the package, or online without a key. "auto" needs neither."""
    if wanted in ("online", "offline") and not find_spec("wandb"):
        raise ValueError(f'track.wandb is {wanted}, but wandb is not installed: pip install "opd-train[train]", or set track.wandb=disabled')
    if wanted == "online":
        from opd.run.track import has_key

        if not has_key():
            raise ValueError("track.wandb is online, but nobody is logged in: run `wandb login`, set WANDB_API_KEY, or set track.wandb=offline")


def open_sink(recipe: Recipe, folder: Path, run_id: str) -> Sink:
    """W&B as the recipe says, or nothing; "auto" without wandb installed is nothing."""
    if recipe.track.wandb == "disabled" or not find_spec("wandb"):
        return NoSink()
    from opd.run.track import WandbSink, wandb_mode

    mode, texts = wandb_mode(recipe.track.wandb), recipe.track.texts
    labels = {"group": recipe.track.group, "job_type": recipe.track.job_type, "tags": recipe.track.tags}
    config = recipe.model_dump(mode="json", exclude=None if texts else {"data": {"system"}})
    return WandbSink(folder=folder, project=recipe.track.project, mode=mode, config=config, run_id=run_id, texts=texts, labels=labels)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names the chat template in the run's record."""
    return hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=8).hexdigest()


def _encode(tokenizer: PreTrainedTokenizerBase, thinking: bool | None, prompt: Prompt) -> tuple[int, ...]:
    return chat.render(tokenizer, prompt.messages, thinking=thinking)
