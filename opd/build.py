"""From a recipe to a running system: the only module that knows every concrete class."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import Sampling
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, Qwen3Config
from transformers.utils import logging as transformers_logging

from opd import chat
from opd.bpe import train_byte_bpe
from opd.config import PACKAGED, Recipe, Signal
from opd.learner.torch_learner import torch_learner
from opd.learner.types import Learner, LearnerSettings, OptimizerSettings
from opd.objective import Objective, Setting, build_objective
from opd.prompts import PromptStream, check_lengths, read_prompts, shuffled_stream, split_prompts, task_prompts, task_stream
from opd.run import NoSink, Sink
from opd.source import Codec, RolloutSource, SourceSettings, parse_source
from opd.tasks import HINT_TEMPLATES, TASKS
from opd.tasks.tokenizer import character_tokenizer
from opd.teacher.local import LocalTeacher, frozen_copy
from opd.teacher.score import SignalScorer, Weights
from opd.types import Judged, Prompt, Verifier
from opd.verify import as_verifier, make_verifier
from opd.views import TEMPLATES, ViewSpec, render_views, resolve_view

transformers_logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """What the student trains on and is examined on, and who judges."""

    stream: PromptStream
    dev: Sequence[Prompt]
    test: Sequence[Prompt]
    verify: Verifier
    templates: Mapping[str, str]
    corpus: Callable[[], Sequence[str]]
    suite: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything that a run is made of, before the loop is closed around it."""

    tokenizer: PreTrainedTokenizerBase
    engine: TorchEngine
    learner: Learner
    source: RolloutSource
    scorer: SignalScorer
    objective: Objective
    views: Mapping[str, ViewSpec]
    problems: Problems
    encode: Callable[[Prompt], tuple[int, ...]]
    stop_ids: tuple[int, ...]
    max_context: int


def build_parts(recipe: Recipe, *, verifier: Callable[..., Any] | None = None) -> Parts:
    """Models, engine, learner, teachers and data of a recipe. Raises ValueError for everything that could not work, before any step."""
    objective = objective_of(recipe)
    problems = load_problems(recipe, verifier)
    tokenizer = load_tokenizer(recipe, problems)
    model = load_model(recipe, tokenizer)
    encode = partial(_encode, tokenizer)
    room = model.config.get_text_config().max_position_embeddings - recipe.sampling.max_tokens
    check_lengths([*problems.dev, *problems.test], encode, min(recipe.data.max_prompt_tokens, room))
    check_support_sizes(objective, len(tokenizer))
    frozen = {name: frozen_copy(model) for name, signal in recipe.signals.items() if signal.weights == "frozen" and recipe.model.lora is None}
    if recipe.model.lora:
        add_adapters(model, recipe)
    learner = make_learner(recipe, model, tokenizer)
    vocab_size = len(tokenizer)
    engine = TorchEngine(
        model, pad_id=tokenizer.pad_token_id, token_budget=recipe.engine.token_budget, chunk_bytes=recipe.learner.chunk_bytes, vocab_size=vocab_size
    )
    stop_ids = chat.stop_ids(tokenizer, model.generation_config)
    codec = Codec(encode=encode, tokenize=partial(chat.tokenize, tokenizer), decode=partial(chat.decode, tokenizer), end=stop_ids[0])
    source = RolloutSource(engine, problems.stream, problems.verify, codec, sampling_of(recipe, stop_ids), source_settings(recipe, room))
    teachers = {name: make_teacher(name, signal, recipe, learner, frozen.get(name), tokenizer) for name, signal in recipe.signals.items()}
    return Parts(
        tokenizer=tokenizer,
        engine=engine,
        learner=learner,
        source=source,
        scorer=SignalScorer(teachers, objective.needs.signals),
        objective=objective,
        views={name: resolve_view(signal.view, problems.templates) for name, signal in recipe.signals.items()},
        problems=problems,
        encode=encode,
        stop_ids=stop_ids,
        max_context=room,
    )


def objective_of(recipe: Recipe) -> Objective:
    """The recipe's objective, judged legal against its signals, group and source."""
    share, _hint = parse_source(recipe.rollout.source)
    source = "student" if share == 1 else "dataset" if share == 0 else "mixed"
    return build_objective(recipe.objective, Setting(signals=tuple(recipe.signals), group=recipe.group, source=source))


def load_problems(recipe: Recipe, verifier: Callable[..., Any] | None) -> Problems:
    """Prompts and verifier: an embedded task, or a JSONL file with held-out lines."""
    data, ev = recipe.data, recipe.eval
    if bool(data.task) == bool(data.path):
        raise ValueError("data: give either task (embedded: " + ", ".join(sorted(TASKS)) + ") or path (a JSONL file)")
    choice = data.verifier if data.verifier != "auto" else ("task" if data.task else "math")
    verify = as_verifier(verifier) if verifier else make_verifier(choice)
    if data.task:
        task = TASKS.get(data.task)
        level = data.difficulty
        stream = task_stream(data.task, data.split, recipe.seed, level)
        assert task is not None
        return Problems(
            stream=stream,
            dev=task_prompts(data.task, "dev", ev.num_problems, difficulty=level),
            test=task_prompts(data.task, "test", ev.final_problems, difficulty=level),
            verify=verify,
            templates=HINT_TEMPLATES,
            corpus=lambda: [task.characters],
            suite=data.task,
        )
    gold = None if verifier or not isinstance(choice, str) else verify
    prompts = read_prompts(data.path, columns=data.columns, system=data.system, verify=gold)
    held_out = ev.num_problems + ev.final_problems
    if data.eval_path:
        exam = read_prompts(data.eval_path, columns=data.columns, system=data.system, verify=gold)[:held_out]
    elif held_out:
        prompts, exam = split_prompts(prompts, min(held_out, max(2, len(prompts) // 5)))
    else:
        exam = []
    num_dev = min(ev.num_problems, len(exam) // 2 if ev.final_problems else len(exam))
    return Problems(
        stream=shuffled_stream(prompts, recipe.seed),
        dev=exam[:num_dev],
        test=exam[num_dev : num_dev + ev.final_problems],
        verify=verify,
        templates=TEMPLATES,
        corpus=lambda: [m["content"] for p in prompts for m in p.messages] + [h for p in prompts for h in p.hints.values()],
        suite=Path(data.path).stem,
    )


def find_model(path: str) -> str:
    """A folder here, a folder inside the package, or a hub name; ValueError when a local-looking path is not there."""
    for candidate in (Path(path), *(root.parent / path for root in PACKAGED), *(root.parent / "_models" / Path(path).name for root in PACKAGED)):
        if (candidate / "config.json").is_file():
            return str(candidate)
    if path.startswith((".", "/", "models/", "runs/")):
        raise ValueError(f"no model folder {path!r} (no config.json there); give a Hugging Face folder or a hub name")
    return path


def student_path(recipe: Recipe) -> str:
    """Where the student's weights come from: `init` (a run's last or best model) or model.path; "" for a new model."""
    if not recipe.init:
        return find_model(recipe.model.path) if recipe.model.path else ""
    folder = Path(recipe.init)
    status = folder / "status.json"
    if not status.is_file():
        raise ValueError(f"init: {folder} is no run folder (no status.json)")
    if (state := json.loads(status.read_text())["state"]) != "finished":
        raise ValueError(f"init: run {folder} is {state}; finish it first (opd train with its recipe resumes it)")
    return str(folder / "model")


def load_tokenizer(recipe: Recipe, problems: Problems) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for a new model a character tokenizer (embedded task) or a byte-level BPE trained on the data."""
    path = student_path(recipe)
    if path:
        return _from_pretrained(AutoTokenizer, path)
    if recipe.data.task:
        return character_tokenizer(problems.corpus()[0])
    return train_byte_bpe(problems.corpus(), recipe.model.vocabulary)


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The student in its dtype; random weights are drawn from the recipe's seed."""
    path, m = student_path(recipe), recipe.model
    options: dict[str, Any] = {"dtype": getattr(torch, m.dtype), "attn_implementation": m.attention}
    if path and m.init == "pretrained":
        model = _from_pretrained(AutoModelForCausalLM, path, **options)
    else:
        config = _from_pretrained(AutoConfig, path) if path else new_config(m.shape, tokenizer)
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            model = AutoModelForCausalLM.from_config(config, **options)
    if not path:
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise ValueError(f"the model's head has {rows} rows, fewer than the tokenizer's {len(tokenizer)} tokens: they do not belong together")
    return model


def new_config(shape: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """A small Qwen3 configuration; `shape` overrides its sizes."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    sizes |= {"intermediate_size": 3 * shape.get("hidden_size", 128), "max_position_embeddings": 512, "tie_word_embeddings": True}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    unknown = set(shape) - set(Qwen3Config().to_dict())
    if unknown:
        raise ValueError(f"model.shape: Qwen3 has no {', '.join(sorted(unknown))}; see transformers.Qwen3Config")
    return Qwen3Config(**{**sizes, **ids, **shape})


def _from_pretrained(loader: Any, path: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {path!r} with {loader.__name__}: {str(error).splitlines()[0]}") from error


def add_adapters(model: torch.nn.Module, recipe: Recipe) -> None:
    """LoRA factors into the model; everything else is frozen."""
    from opd.learner.lora import add_lora

    assert recipe.model.lora
    lora = recipe.model.lora
    add_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=recipe.seed)


def make_learner(recipe: Recipe, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Learner:
    """The learner that the recipe names; "auto" is deepspeed where it imports."""
    o, le, updates = recipe.optimizer, recipe.learner, recipe.updates
    optimizer = OptimizerSettings(
        lr=o.lr, schedule=o.schedule, warmup_steps=o.warmup_steps, weight_decay=o.weight_decay, betas=o.betas, clip=o.clip,
        total_steps=recipe.steps * updates.minibatches * updates.epochs,
    )  # fmt: skip
    settings = LearnerSettings(
        temperature=recipe.sampling.temperature, token_budget=le.token_budget, packed=le.packed, pad_id=tokenizer.pad_token_id,
        chunk_bytes=le.chunk_bytes, minibatches=updates.minibatches, epochs=updates.epochs, ema_rate=ema_rate(recipe),
        gradient_checkpointing=recipe.model.gradient_checkpointing,
    )  # fmt: skip
    vocab_size = len(tokenizer)
    if learner_kind(recipe) == "torch":
        return torch_learner(model, optimizer, settings, vocab_size=vocab_size)
    from opd.learner.deepspeed_learner import deepspeed_learner

    return deepspeed_learner(model, optimizer, settings, vocab_size=vocab_size, zero_stage=le.zero_stage)


def learner_kind(recipe: Recipe) -> str:
    """ "torch" or "deepspeed"; ValueError names the extra to install where deepspeed was asked for and is missing."""
    if recipe.learner.kind == "torch":
        return "torch"
    if find_spec("deepspeed"):
        return "deepspeed"
    if recipe.learner.kind == "deepspeed":
        raise ValueError('learner.kind is deepspeed, which is not installed: pip install "opd-train[train]", or learner.kind=torch')
    return "torch"


def ema_rate(recipe: Recipe) -> float | None:
    """The rate of the recipe's averaged teacher, None without one. Raises ValueError for two different rates."""
    rates = {weights["ema"].get("rate", 0.05) for weights in _choices(recipe) if isinstance(weights, dict) and "ema" in weights}
    rates |= {0.05} if "ema" in _choices(recipe) else set()
    if len(rates) > 1:
        raise ValueError(f"signals use several EMA rates ({', '.join(map(str, sorted(rates)))}); the learner keeps one average")
    return rates.pop() if rates else None


def _choices(recipe: Recipe) -> list[Any]:
    return [signal.weights for signal in recipe.signals.values()]


def make_teacher(
    name: str, signal: Signal, recipe: Recipe, learner: Learner, frozen: torch.nn.Module | None, tokenizer: PreTrainedTokenizerBase
) -> Weights:
    """The scorer of a signal: the student's weights live, averaged or without adapters; a frozen copy; or another model."""
    choice = signal.weights
    kind = choice if isinstance(choice, str) else next(iter(choice), "")
    if kind in ("live", "ema"):
        return Weights(scores=partial(learner.teacher_pass, weights=kind), head=partial(learner.head, kind))
    if kind == "frozen" and frozen is None:
        return Weights(scores=partial(learner.teacher_pass, weights="adapter_off"), head=partial(learner.head, "adapter_off"))
    if kind == "external" and isinstance(choice, dict):
        frozen = external_model(str(choice["external"].get("path", "")), recipe, tokenizer, name)
    if frozen is None:
        raise ValueError(f"signals.{name}.weights is {choice!r}; write live, frozen, {{ema: {{rate: 0.05}}}} or {{external: {{path: FOLDER}}}}")
    le = recipe.learner
    teacher = LocalTeacher(
        frozen, temperature=recipe.sampling.temperature, token_budget=le.token_budget, chunk_bytes=le.chunk_bytes, packed=le.packed,
        vocab_size=len(tokenizer),
    )  # fmt: skip
    return Weights(scores=teacher.scores, head=teacher.head)


def external_model(path: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, name: str) -> torch.nn.Module:
    """Another model as teacher. Raises ValueError unless its tokenizer gives the student's ids (heads may be padded differently)."""
    if not path:
        raise ValueError(f"signals.{name}: an external teacher needs a path: {{external: {{path: FOLDER}}}}")
    found = find_model(path)
    theirs = _from_pretrained(AutoTokenizer, found)
    ours, other = tokenizer.get_vocab(), theirs.get_vocab()
    differing = sorted(token for token in {*ours, *other} if ours.get(token) != other.get(token))
    if differing:
        raise ValueError(
            f"teacher {path!r} has another tokenizer than the student ({len(other)} tokens against {len(ours)}; first difference "
            f"{differing[0]!r}): token-level distillation needs the same ids. Choose a teacher of the student's family."
        )
    model = _from_pretrained(AutoModelForCausalLM, found, dtype=getattr(torch, recipe.model.dtype), attn_implementation=recipe.model.attention)
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise ValueError(f"teacher {path!r}: its head has {rows} rows, fewer than the tokenizer's {len(tokenizer)} tokens")
    return model


def check_support_sizes(objective: Objective, vocab_size: int) -> None:
    """Raises ValueError for a support larger than the vocabulary."""
    for term in objective.terms:
        if term.support and term.support.kind.endswith("topk") and term.support.k > vocab_size:
            raise ValueError(
                f"term {term.name!r}: support k is {term.support.k} but the vocabulary has {vocab_size} tokens; "
                f"lower objective support k to at most {vocab_size}, or use support: full"
            )


def sampling_of(recipe: Recipe, stop_ids: tuple[int, ...]) -> Sampling:
    s = recipe.sampling
    return Sampling(temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, max_tokens=s.max_tokens, stop_ids=stop_ids)


def source_settings(recipe: Recipe, room: int) -> SourceSettings:
    share, hint = parse_source(recipe.rollout.source)
    r = recipe.rollout
    return SourceSettings(
        num_prompts=r.prompts, group=recipe.group, seed=recipe.seed, student_share=share, dataset_hint=hint, filter=r.filter,
        max_refill=r.max_refill, overlong=r.overlong, max_prompt_tokens=min(recipe.data.max_prompt_tokens, room),
    )  # fmt: skip


def view_function(parts: Parts) -> Callable[[Sequence[Judged]], Mapping[str, Sequence[tuple[int, ...] | None]]]:
    """What every signal reads before each answer, as token ids; None where it has nothing to show."""

    def views(judged: Sequence[Judged]) -> Mapping[str, Sequence[tuple[int, ...] | None]]:
        return {name: render_views(parts.tokenizer, judged, spec, parts.max_context)[0] for name, spec in parts.views.items()}

    return views


def open_sink(recipe: Recipe, folder: Path, run_id: str) -> Sink:
    """W&B as the recipe says, or nothing."""
    if recipe.track.wandb == "disabled":
        return NoSink()
    from opd.track import WandbSink, wandb_mode

    config = recipe.model_dump(mode="json")
    return WandbSink(folder=folder, project=recipe.track.project, name=folder.name, mode=wandb_mode(recipe.track.wandb), config=config, run_id=run_id)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names the chat template in the run's record."""
    return hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=8).hexdigest()


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    return chat.render(tokenizer, prompt.messages)
